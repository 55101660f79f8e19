"""The configuration of a LongMem as transformers keeps it."""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from pipeline.config.model import ModelSettings
from pipeline.errors import CheckpointError
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
        if isinstance(backbone_config, dict):
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


def _configuration(known: dict[str, Any]) -> PreTrainedConfig:
    model_type = known.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            "the backbone's model type is not known",
            got=f"model_type {model_type!r}",
            expected="one that this version of transformers has",
            do="install the version of transformers that saved the model, or a newer one",
        )
    found: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(known))
    return found
