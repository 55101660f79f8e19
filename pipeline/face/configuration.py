"""The configuration of a LongMem as transformers keeps it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from pipeline.config.model import ModelSettings
from pipeline.config.untrusted import shown
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.saved import FORMAT, MODEL_TYPE, check_format, check_settings

_PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id")


class LongMemConfig(PreTrainedConfig):
    """What a LongMem is: its backbone, its settings, and what is known of both.

    Args:
        backbone_config: The backbone's, or the same as a dictionary.
        settings: `ModelSettings` as a dictionary; None: all by default.
        backbone_name: Folder or hub name that the backbone is loaded from.
        backbone_hash: Its identity (`pipeline.backbone.backbone.identity`); empty: it is not known.
        trained: What is said of the training: step, run, figures; for people.
        longmem_format: Version of this form.
        **kwargs: As any configuration takes them.

    Raises:
        CheckpointError: It is of a version that does not exist yet.
        ConfigError: The settings hold what this version does not know, or contradict each other.
    """

    model_type = MODEL_TYPE
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  # transformers' own way
    has_no_defaults_at_init = True

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        backbone_name: str = "",
        backbone_hash: str = "",
        trained: dict[str, Any] | None = None,
        longmem_format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        check_format(longmem_format)
        if backbone_config is not None and not isinstance(backbone_config, PreTrainedConfig):
            backbone_config = _configuration(backbone_config)
        # A copy: transformers writes into the configurations below a model's own; the backbone's must stay as it is.
        self.backbone_config = copy.deepcopy(backbone_config)
        self.settings = check_settings(settings or {}).model_dump(mode="json")  # with all that is left to defaults
        self.backbone_name, self.backbone_hash = backbone_name, backbone_hash
        self.trained, self.longmem_format = trained or {}, longmem_format
        for name in _PASSED_ON:
            kwargs.setdefault(name, getattr(backbone_config, name, None))
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it, with `settings=` laid over those that the dictionary holds."""
        more = kwargs.pop("settings", None)  # or the sections that it does not name would be lost
        if more:
            config_dict = {**config_dict, "settings": laid_over(config_dict.get("settings") or {}, more)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def model_settings(self) -> ModelSettings:
        """What the model is, as all of LongMem knows it."""
        return ModelSettings.model_validate(self.settings)

    @property
    def vocab_size(self) -> int:
        """`V`, the backbone's."""
        return int(self._text().vocab_size)

    @property
    def hidden_size(self) -> int:
        """`E`, the backbone's."""
        return int(self._text().hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the backbone."""
        return int(self._text().num_hidden_layers)

    @property
    def num_attention_heads(self) -> int:
        """`H`, the backbone's."""
        return int(self._text().num_attention_heads)

    def _text(self) -> Any:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise AttributeError("a LongMemConfig without backbone_config has no sizes")
        return self.backbone_config.get_text_config()


def laid_over(settings: Mapping[str, Any], more: Any) -> dict[str, Any]:
    """Settings with others in their place, section by section. Raises ConfigError: those are no sections."""
    if not isinstance(more, Mapping):
        raise ConfigError([f"these are no sections; got: {shown(more)}; do: give a dictionary"], source="settings")
    found = dict(settings)
    for key, value in more.items():
        old = found.get(key)
        found[key] = laid_over(old, value) if isinstance(old, Mapping) else value
    return found


def _configuration(known: Any) -> PreTrainedConfig:
    model_type = known.get("model_type") if isinstance(known, Mapping) else known
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            "the backbone's model type is not known",
            got=f"model_type {model_type!r}",
            expected="one that this version of transformers has",
            do="install the version of transformers that saved the model, or a newer one",
        )
    found: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(known))
    return found
