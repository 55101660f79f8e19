"""A LongMem in a folder, and out of one.

DIR/config.json             what it is, which backbone it stands beside (`LongMemConfig`)
    model.safetensors       the SideNet, by the names of `pipeline.sidenet`
    generation_config.json  how it generates
    backbone/               the backbone, if it was saved with it
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from pipeline.backbone.backbone import identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.checkpoint.export import WEIGHTS
from pipeline.errors import BackboneError, CheckpointError, in_a_line
from pipeline.face.configuration import LongMemConfig
from pipeline.model.load import check_same, fill, read_weights
from pipeline.model.longmem import DTYPES
from pipeline.model.saved import BACKBONE, CONFIG, GENERATION, MODEL_TYPE, is_saved, no_model, read_saved

if TYPE_CHECKING:
    from pipeline.face.model import LongMemForCausalLM

logger = logging.getLogger(__name__)
_AMISS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_OF_A_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
_IGNORED = ("low_cpu_mem_usage", "use_safetensors", "weights_only", "_from_auto", "_commit_hash",
            "adapter_kwargs", "trust_remote_code", "code_revision")  # fmt: skip


def load(cls: type[LongMemForCausalLM], name: str, *, output_loading_info: bool = False, **kwargs: Any) -> Any:
    """As `LongMemForCausalLM.from_pretrained`."""
    hub = {key: kwargs.pop(key) for key in _OF_A_HUB if kwargs.get(key) is not None}
    for key in (*_OF_A_HUB, *_IGNORED):
        kwargs.pop(key, None)
    backbone, settings = kwargs.pop("backbone", None), kwargs.pop("settings", None)
    dtype, device = _dtype(kwargs), _device(kwargs.pop("device_map", None))
    config, generation = kwargs.pop("config", None), kwargs.pop("generation_config", None)
    attention = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
    if kwargs:
        raise CheckpointError("from_pretrained does not know this", got=", ".join(sorted(kwargs)), do="leave it out")
    weights = read_weights(Path(_file(name, WEIGHTS, hub)).parent)
    if not isinstance(config, LongMemConfig):
        config = _config(Path(_file(name, CONFIG, hub)).parent)
    if settings:
        config = LongMemConfig.from_dict(config.to_dict(), settings=settings)
    if config.backbone_config is None:
        raise no_model(name, CONFIG, "it says nothing of the backbone")
    causal_lm = _backbone(name, config, backbone, dtype=dtype, attention=attention, hub=hub)
    model = cls(config, causal_lm.to(device))
    fill(model.sidenet, weights, name)
    model.sidenet.to(device)
    model.generation_config = generation or _generation_config(name, hub, causal_lm)
    model.config.name_or_path = name
    model.eval()
    # What does not fit was refused.
    return (model, {kind: set() for kind in _AMISS}) if output_loading_info else model


def save(model: LongMemForCausalLM, folder: Path, *, save_backbone: bool | None, **kwargs: Any) -> None:
    """As `LongMemForCausalLM.save_pretrained`."""
    if folder.is_file():  # of which transformers says a word in the log
        raise CheckpointError("this is a file", got=folder, expected="a folder, there or not", do="name another one")
    config = model.config
    before = config.backbone_name, config.backbone_hash
    if not config.backbone_hash:
        config.backbone_hash = identity(model.backbone)
        before = before[0], config.backbone_hash
        config.settings["precision"] = model.longmem.settings.precision  # in which it is to be compared
    name = config.backbone_name
    if name in ("", BACKBONE):
        name = str(getattr(model.backbone.config, "_name_or_path", "") or "")
    save_backbone = not name if save_backbone is None else save_backbone  # without it nobody could load the model
    config.backbone_name = BACKBONE if save_backbone else name
    if save_backbone:  # as it is now: another one than it was if the model was put into another dtype
        config.backbone_hash = identity(model.backbone)
    weights = {name: weight.detach() for name, weight in model.sidenet.named_parameters()}
    try:
        kwargs.pop("state_dict", None)
        # One file, however small the pieces that are asked for: a SideNet is small beside its backbone.
        PreTrainedModel.save_pretrained(model, folder, state_dict=weights, **{**kwargs, "max_shard_size": "1000TB"})
    finally:
        config.backbone_name, config.backbone_hash = before
    if save_backbone:
        model.backbone.save_pretrained(folder / BACKBONE)


def _config(folder: Path) -> LongMemConfig:
    if not is_saved(folder):
        raise no_model(folder, CONFIG, f"its model_type is not {MODEL_TYPE}")
    read_saved(folder)  # with more checks than transformers has
    found: LongMemConfig = LongMemConfig.from_pretrained(folder)
    return found


def _file(name: str, part: str, hub: Mapping[str, Any]) -> str:
    try:
        found = cached_file(name, part, **hub)
    except Exception as error:  # foreign code on a foreign name raises whatever it comes upon
        raise no_model(name, part, in_a_line(error)) from error
    if found is None:
        raise no_model(name, part, "it is not there")
    return str(found)


def _dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    wanted = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    kwargs.pop("torch_dtype", None)
    if wanted in (None, "auto"):
        return None
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError("a LongMem has no such dtype", got=wanted, expected="float32, bfloat16 or float16")
    return found


def _device(wanted: Any) -> torch.device:
    places = set(wanted.values()) if isinstance(wanted, Mapping) else {wanted}
    if len(places) > 1:
        raise CheckpointError(
            "a LongMem is not split over devices",
            got=f"device_map with {len(places)} of them",
            expected="one device",
            do='give device_map="cuda:0", or evaluate with launch/evaluate.py, which splits over ranks',
        )
    place = places.pop()
    if place == "auto":
        place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return torch.device("cpu" if place is None else place)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            "there is no such device", got=f"device_map {place!r}", expected="one device", do='such as "cuda:0"'
        ) from error


def _backbone(
    name: str,
    config: LongMemConfig,
    given: Any,
    *,
    dtype: torch.dtype | None,
    attention: str | None,
    hub: Mapping[str, Any],
) -> PreTrainedModel:
    """The backbone, which must be the one that the SideNet stands beside."""
    trained = DTYPES[config.model_settings.precision]
    if isinstance(given, PreTrainedModel):
        causal_lm = given
    else:
        path = str(given or config.backbone_name)
        if not given and config.backbone_name == BACKBONE:
            path = str(Path(_file(name, f"{BACKBONE}/{CONFIG}", hub)).parent)
        try:
            check_weights(path, read_backbone_config(path))
            causal_lm = load_backbone(path, dtype=trained, attention=attention)
        except BackboneError as error:
            raise BackboneError(
                f"the backbone that {name} stands beside cannot be loaded",
                got=error.got,
                expected="a Hugging Face model folder (config.json, *.safetensors) or hub name",
                do="say where it is: from_pretrained(..., backbone=FOLDER)",
            ) from error
    if config.backbone_hash and causal_lm.dtype == trained:
        beside = f"{config.backbone_name or 'its name is not known'}, by backbone=..."
        check_same(name, identity(causal_lm), config.backbone_hash, beside=beside)
    elif config.backbone_hash:
        logger.warning("the backbone was given in %s: whether it is the one of %s is not known", causal_lm.dtype, name)
    if dtype is not None and not isinstance(given, PreTrainedModel):
        for parameter in causal_lm.parameters():  # and no buffer: frequencies of positions are no weights
            parameter.data = parameter.data.to(dtype)
    return causal_lm


def _generation_config(name: str, hub: Mapping[str, Any], causal_lm: PreTrainedModel) -> GenerationConfig:
    try:
        folder = Path(_file(name, GENERATION, hub)).parent
    except CheckpointError:
        return GenerationConfig.from_model_config(causal_lm.config)
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise no_model(name, GENERATION, in_a_line(error)) from error
