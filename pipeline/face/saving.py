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
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from pipeline.backbone.backbone import identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.errors import CheckpointError, in_a_line
from pipeline.face.configuration import LongMemConfig

if TYPE_CHECKING:
    from pipeline.face.model import LongMemForCausalLM

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS, GENERATION, BACKBONE = "config.json", "model.safetensors", "generation_config.json", "backbone"
_OF_A_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
_IGNORED = ("low_cpu_mem_usage", "use_safetensors", "output_loading_info", "weights_only", "_from_auto", "_commit_hash",
            "adapter_kwargs", "trust_remote_code", "code_revision")  # fmt: skip


def load(cls: type[LongMemForCausalLM], name: str, **kwargs: Any) -> LongMemForCausalLM:
    """As `LongMemForCausalLM.from_pretrained`."""
    hub = {key: kwargs.pop(key) for key in _OF_A_HUB if kwargs.get(key) is not None}
    for key in (*_OF_A_HUB, *_IGNORED):
        kwargs.pop(key, None)
    backbone, settings = kwargs.pop("backbone", None), kwargs.pop("settings", None)
    dtype, device = _dtype(kwargs), _device(kwargs.pop("device_map", None))
    attention = kwargs.pop("attn_implementation", None)
    config, generation = kwargs.pop("config", None), kwargs.pop("generation_config", None)
    if kwargs:
        raise CheckpointError("from_pretrained does not know this", got=", ".join(sorted(kwargs)), do="leave it out")
    weights = _weights(_file(name, WEIGHTS, hub))
    if not isinstance(config, LongMemConfig):
        config = LongMemConfig.from_pretrained(Path(_file(name, CONFIG, hub)).parent)
    if settings:
        config.settings = LongMemConfig(config.backbone_config, _laid_over(config.settings, settings)).settings
    causal_lm = _backbone(name, config, backbone, dtype=dtype, attention=attention, hub=hub)
    model = cls(config, causal_lm.to(device))
    _fill(name, model, weights)
    model.sidenet.to(device)
    model.generation_config = generation or _generation_config(name, hub, causal_lm)
    model.config.name_or_path = name
    return model.eval()


def save(model: LongMemForCausalLM, folder: Path, *, save_backbone: bool, **kwargs: Any) -> None:
    """As `LongMemForCausalLM.save_pretrained`."""
    config = model.config
    before = config.backbone_name, config.backbone_hash
    config.backbone_hash = config.backbone_hash or identity(model.backbone)
    if save_backbone:
        config.backbone_name = BACKBONE
    elif not config.backbone_name or config.backbone_name == BACKBONE:
        config.backbone_name = str(getattr(model.backbone.config, "_name_or_path", "") or "")
    weights = {name: weight.detach() for name, weight in model.sidenet.named_parameters()}
    try:
        kwargs.pop("state_dict", None)
        PreTrainedModel.save_pretrained(model, folder, state_dict=weights, **kwargs)
    finally:
        config.backbone_name = before[0]
    if save_backbone:
        model.backbone.save_pretrained(folder / BACKBONE)


def _file(name: str, part: str, hub: Mapping[str, Any]) -> str:
    try:
        found = cached_file(name, part, **hub)
    except Exception as error:  # foreign code on a foreign name raises whatever it comes upon
        raise _no_model(name, part, in_a_line(error)) from error
    if found is None:
        raise _no_model(name, part, "it is not there")
    return str(found)


def _weights(file: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _no_model(str(Path(file).parent), WEIGHTS, in_a_line(error)) from error


def _no_model(name: str, part: str, why: str) -> CheckpointError:
    return CheckpointError(
        "the folder holds no LongMem",
        got=f"{name!r}: {part}: {why}",
        expected=f"{CONFIG} and {WEIGHTS}",
        do="make one with launch/export.py or save_pretrained",
    )


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
    return torch.device("cpu" if place is None else place)


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
    trained = getattr(torch, str(config.trained.get("precision", "float32")).removeprefix("torch."))
    if isinstance(given, PreTrainedModel):
        causal_lm = given
    else:
        path = str(given or config.backbone_name)
        if not given and config.backbone_name == BACKBONE:
            path = str(Path(_file(name, f"{BACKBONE}/{CONFIG}", hub)).parent)
        check_weights(path, read_backbone_config(path))
        causal_lm = load_backbone(path, dtype=trained, attention=attention)
    if config.backbone_hash and causal_lm.dtype == trained:
        found = identity(causal_lm)
        if found != config.backbone_hash:
            raise CheckpointError(
                f"{name} stands beside another backbone",
                got=found,
                expected=config.backbone_hash,
                do=f"load the one that it was trained with ({config.backbone_name or 'unnamed'}): backbone=...",
            )
    elif config.backbone_hash:
        logger.warning("the backbone was given in %s: whether it is the one of %s is not known", causal_lm.dtype, name)
    return causal_lm if dtype is None or isinstance(given, PreTrainedModel) else causal_lm.to(dtype)


def _fill(name: str, model: LongMemForCausalLM, weights: Mapping[str, Tensor]) -> None:
    own = dict(model.sidenet.named_parameters())
    other = sorted(part for part in own.keys() | weights.keys() if _shape(own.get(part)) != _shape(weights.get(part)))
    if other:
        part = other[0]
        raise CheckpointError(
            f"the weights of {name} do not fit its {CONFIG}",
            got=f"{part}: {_shape(weights.get(part))} ({len(other)} in all)",
            expected=_shape(own.get(part)),
            do="put back the files that belong together, or export the checkpoint again",
        )
    with torch.no_grad():
        for part, weight in weights.items():
            own[part].copy_(weight)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _generation_config(name: str, hub: Mapping[str, Any], causal_lm: PreTrainedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(Path(_file(name, GENERATION, hub)).parent)
    except (CheckpointError, OSError):
        return GenerationConfig.from_model_config(causal_lm.config)


def _laid_over(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place, section by section."""
    found = dict(settings)
    for key, value in more.items():
        old = found.get(key)
        found[key] = _laid_over(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return found
