"""Exported weights, made into a model again."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.backbone.backbone import identity
from pipeline.checkpoint.export import ABOUT, SETTINGS, WEIGHTS
from pipeline.config.load import load_config
from pipeline.errors import CheckpointError
from pipeline.model.longmem import LongMem, build


def load_exported(folder: Path, model: PreTrainedModel) -> LongMem:
    """Joins exported SideNet weights to the backbone that they were trained beside.

    Args:
        folder: What `launch/export.py` wrote.
        model: The backbone's causal LM.

    Returns:
        The model as it was trained, without memory: make a bank with `LongMem.bank`.

    Raises:
        CheckpointError: The weights belong to another backbone, or the folder is not whole.
        ConfigError: The settings are not those of this version.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        wanted = about["backbone"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            "the folder is no export",
            got=f"{folder} ({type(error).__name__}: {error})",
            expected=f"{WEIGHTS}, {SETTINGS} and {ABOUT}",
            do="make one with launch/export.py",
        ) from error
    found = identity(model)
    if found != wanted:
        raise CheckpointError(
            f"the weights in {folder} were trained beside another backbone",
            got=found,
            expected=wanted,
            do="load the backbone that backbone.path of its config.yaml names",
        )
    settings = load_config(folder / SETTINGS).model
    backbone, sidenet = build(settings, model)
    shapes = {name: parameter.shape for name, parameter in sidenet.named_parameters()}
    other = {name for name in shapes.keys() | weights.keys() if shapes.get(name) != _shape(weights.get(name))}
    if other:
        raise CheckpointError(
            f"the weights in {folder} do not fit its {SETTINGS}",
            got=f"{sorted(other)[0]} and {len(other) - 1} others",
            do="export the checkpoint again",
        )
    sidenet.load_state_dict(weights, strict=False)  # buffers came with the copies of the backbone's layers
    return LongMem(settings, backbone, sidenet)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
