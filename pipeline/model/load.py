"""A trained LongMem, whole and without DeepSpeed: from an export, a checkpoint or a run folder, and its backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.backbone.backbone import Backbone, identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.checkpoint.export import ABOUT, SETTINGS, WEIGHTS, find_trained
from pipeline.checkpoint.export import Trained as Files
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.files import hash_file
from pipeline.model.longmem import DTYPES, LongMem, build
from pipeline.sidenet.sidenet import SideNet


@dataclass(frozen=True)
class Trained:
    """A trained SideNet without its backbone.

    Attributes:
        source: Where it was found.
        config: The settings of the run that trained it.
        weights: By name, fp32.
        backbone: Identity of the backbone that it was trained beside.
        sha256: Of its file of weights.
    """

    source: Path
    config: Config
    weights: Mapping[str, Tensor]
    backbone: str
    sha256: str


def read_trained(source: Path, overrides: Sequence[str] = ()) -> Trained:
    """Reads trained SideNet weights.

    Args:
        source: What `launch/export.py` wrote, a checkpoint (`step_*`), or a run folder: its newest checkpoint.
        overrides: `--section.key value`, laid over the run's settings.

    Returns:
        Weights and settings.

    Raises:
        CheckpointError: The weights are damaged.
        ConfigError: The settings are not those of this version, or an override is wrong.
    """
    files = _exported(source) if (source / ABOUT).exists() else find_trained(source)
    config = load_config(files.folder / SETTINGS, overrides)
    weights, sha256 = _weights(files.folder), hash_file(files.folder / WEIGHTS)[1]
    return Trained(source, config, weights, files.about["backbone"], sha256)


def load_longmem(
    source: Path, *, backbone: str | PreTrainedModel | None = None, device: torch.device | str = "cpu"
) -> LongMem:
    """Joins trained SideNet weights to the backbone that they were trained beside.

    Args:
        source: As in `read_trained`.
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
    return load_whole(read_trained(source), backbone, device)


def load_whole(
    trained: Trained, backbone: str | PreTrainedModel | None = None, device: torch.device | str = "cpu"
) -> LongMem:
    """As `load_longmem`, of weights that were read before."""
    if isinstance(backbone, PreTrainedModel):
        model = backbone
    else:
        path = backbone or trained.config.backbone.path
        check_weights(path, read_backbone_config(path))
        model = load_for(trained, path)
    return LongMem(trained.config.model, *join(trained, model.to(device), device))


def load_for(trained: Trained, backbone: str | None = None, *, who: str = "") -> PreTrainedModel:
    """Loads the causal LM that weights were trained beside, in the run's precision.

    Args:
        trained: The weights.
        backbone: Its folder or hub name; None: the run's `backbone.path`.
        who: Whose progress bar it is.

    Returns:
        The causal LM.

    Raises:
        BackboneError: It cannot be loaded.
    """
    config = trained.config
    path = backbone or config.backbone.path
    return load_backbone(path, dtype=DTYPES[config.train.precision], attention=config.backbone.attention, who=who)


def join(
    trained: Trained, model: PreTrainedModel, device: torch.device | str, **kwargs: Any
) -> tuple[Backbone, SideNet]:
    """Puts trained weights beside their backbone.

    Collective: with a partitioned model every rank must call it together.

    Args:
        trained: The weights.
        model: The causal LM, on its device.
        device: Where the SideNet goes.
        **kwargs: `made_whole`, as in `Backbone`.

    Returns:
        Backbone and SideNet.

    Raises:
        CheckpointError: The weights belong to another backbone, or do not fit their settings.
    """
    found, source = identity(model, **kwargs), trained.source
    if found != trained.backbone:
        raise CheckpointError(
            f"the weights in {source} were trained beside another backbone",
            got=found,
            expected=trained.backbone,
            do=f"load the backbone that backbone.path of its {SETTINGS} names, in {trained.config.train.precision}",
        )
    whole, sidenet = build(trained.config.model, model, **kwargs)
    weights = trained.weights
    shapes = {name: parameter.shape for name, parameter in sidenet.named_parameters()}
    other = {name for name in shapes.keys() | weights.keys() if shapes.get(name) != _shape(weights.get(name))}
    if other:
        raise CheckpointError(
            f"the weights in {source} do not fit its {SETTINGS}",
            got=f"{sorted(other)[0]} and {len(other) - 1} others",
            do="export the checkpoint again",
        )
    sidenet.load_state_dict(dict(weights), strict=False)  # buffers came with the copies of the backbone's layers
    return whole, sidenet.to(device)


def _exported(folder: Path) -> Files:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Files(folder, {"backbone": about["backbone"]})
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


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
