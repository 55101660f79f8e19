"""A trained LongMem, whole and without DeepSpeed: from an export, a checkpoint or a run folder, and its backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.backbone.backbone import identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.checkpoint.export import ABOUT, SETTINGS, WEIGHTS, Trained, find_trained
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.model.longmem import DTYPES, LongMem, build


def load_longmem(
    source: Path, *, backbone: str | PreTrainedModel | None = None, device: torch.device | str = "cpu"
) -> LongMem:
    """Joins trained SideNet weights to the backbone that they were trained beside.

    Args:
        source: What `launch/export.py` wrote, a checkpoint (`step_*`), or a run folder: its newest checkpoint.
        backbone: Its folder or hub name, or the causal LM itself, in the run's `train.precision`; None: the run's
            `backbone.path`.
        device: Where the model goes.

    Returns:
        The model as it was trained, in the run's `train.precision`, without memory: make a bank with `LongMem.bank`.

    Raises:
        CheckpointError: The weights are damaged, or belong to another backbone.
        BackboneError: The backbone cannot be loaded.
        ConfigError: The settings are not those of this version.
    """
    trained = _exported(source) if (source / ABOUT).exists() else find_trained(source)
    config = load_config(trained.folder / SETTINGS)
    weights = _weights(trained.folder)
    model = _backbone(backbone if backbone is not None else config.backbone.path, config)
    found, wanted = identity(model), trained.about["backbone"]
    if found != wanted:
        raise CheckpointError(
            f"the weights in {source} were trained beside another backbone",
            got=found,
            expected=wanted,
            do=f"load the backbone that backbone.path of its {SETTINGS} names, in {config.train.precision}",
        )
    settings = config.model
    whole, sidenet = build(settings, model.to(device))
    shapes = {name: parameter.shape for name, parameter in sidenet.named_parameters()}
    other = {name for name in shapes.keys() | weights.keys() if shapes.get(name) != _shape(weights.get(name))}
    if other:
        raise CheckpointError(
            f"the weights in {source} do not fit its {SETTINGS}",
            got=f"{sorted(other)[0]} and {len(other) - 1} others",
            do="export the checkpoint again",
        )
    sidenet.load_state_dict(weights, strict=False)  # buffers came with the copies of the backbone's layers
    return LongMem(settings, whole, sidenet.to(device))


def _exported(folder: Path) -> Trained:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Trained(folder, {"backbone": about["backbone"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_weights(folder, error) from error


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _no_weights(folder, error) from error


def _no_weights(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "the folder is no export",
        got=f"{folder} ({type(error).__name__}: {error})",
        expected=f"{WEIGHTS}, {SETTINGS} and {ABOUT}",
        do="make one with launch/export.py",
    )


def _backbone(backbone: str | PreTrainedModel, config: Config) -> PreTrainedModel:
    if isinstance(backbone, PreTrainedModel):
        return backbone
    check_weights(backbone, read_backbone_config(backbone))
    return load_backbone(backbone, dtype=DTYPES[config.train.precision], attention=config.backbone.attention)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
