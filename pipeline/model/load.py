"""A trained LongMem, whole and without DeepSpeed: a saved one, a checkpoint or a run folder, and its backbone."""

from __future__ import annotations

import json
import logging
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
from pipeline.config.load import load_config, make_config
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, in_a_line
from pipeline.files import hash_file
from pipeline.model.longmem import DTYPES, LongMem, build
from pipeline.model.saved import is_saved, no_model, read_saved
from pipeline.sidenet.sidenet import SideNet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trained SideNet without its backbone.

    Attributes:
        source: Where it was found.
        config: The settings of the run that trained it.
        weights: By name, fp32 from a training.
        backbone: Identity of the backbone that it was trained beside; empty: it is not known.
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
        source: What `launch/export.py` or `LongMemForCausalLM.save_pretrained` wrote, a checkpoint (`step_*`), or a run
            folder: its newest checkpoint. Of a run that is not in the folder the settings are the defaults, which is
            logged.
        overrides: `--section.key value`, laid over the run's settings.

    Returns:
        Weights and settings.

    Raises:
        CheckpointError: The weights are damaged, or saved by a newer version.
        ConfigError: The settings are not those of this version, or an override is wrong.
    """
    if is_saved(source):
        folder, (config, backbone) = source, _saved(source, overrides)
    elif (source / ABOUT).exists():  # of a version that wrote no config.json
        folder, config, backbone = source, load_config(source / SETTINGS, overrides), _exported(source)
    else:
        files = find_trained(source)
        folder, backbone = files.folder, files.about["backbone"]
        config = load_config(folder / SETTINGS, overrides)
    weights = read_weights(folder)
    return Trained(source, config, weights, backbone, hash_file(folder / WEIGHTS)[1])


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved SideNet, by name. Raises CheckpointError."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise no_model(folder, WEIGHTS, in_a_line(error)) from error


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
    found, config = identity(model, **kwargs), trained.config
    check_same(trained.source, found, trained.backbone, beside=f"{config.backbone.path}, in {config.train.precision}")
    whole, sidenet = build(config.model, model, **kwargs)
    fill(sidenet, trained.weights, trained.source)
    return whole, sidenet.to(device)


def check_same(source: Path | str, found: str, wanted: str, *, beside: str) -> None:
    """Checks that a backbone is the one that a SideNet was trained beside.

    Args:
        source: Where the SideNet's weights are from.
        found: The backbone's identity.
        wanted: What it should be; empty: it is not known.
        beside: The backbone that it was trained beside, for people.

    Raises:
        CheckpointError: It is another one.
    """
    if wanted and found != wanted:
        raise CheckpointError(
            f"the weights in {source} were trained beside another backbone",
            got=found,
            expected=wanted,
            do=f"load the one that they were trained beside ({beside})",
        )


def check_fit(sidenet: SideNet, shapes: Mapping[str, Sequence[int]], source: Path | str) -> None:
    """Checks names and shapes of weights against a SideNet that is to have them. Raises CheckpointError."""
    own = {name: list(parameter.shape) for name, parameter in sidenet.named_parameters()}
    given = {name: list(shape) for name, shape in shapes.items()}
    other = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if other:
        raise CheckpointError(
            f"the weights in {source} do not fit its settings and backbone",
            got=f"{other[0]}: {given.get(other[0])} ({len(other)} in all)",
            expected=own.get(other[0]),
            do="put back the files that belong together, or export the checkpoint again",
        )


def fill(sidenet: SideNet, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Gives a SideNet weights that were read. Raises CheckpointError: they do not fit."""
    check_fit(sidenet, {name: weight.shape for name, weight in weights.items()}, source)
    sidenet.load_state_dict(dict(weights), strict=False)  # buffers came with the copies of the backbone's layers


def _saved(folder: Path, overrides: Sequence[str]) -> tuple[Config, str]:
    """The settings of a saved model and its backbone's identity: config.json decides, config.yaml says the rest."""
    saved = read_saved(folder)
    if (folder / SETTINGS).exists():
        sections = load_config(folder / SETTINGS).model_dump(mode="json")
    else:
        # Required of a run, not known of this one. `data.path` shows in the error of a task that looks for it.
        sections = {"run": {"output_dir": str(folder)}, "backbone": {"path": "not known"}}
        sections["data"] = {"lanes": 1}
        if not any(override.startswith("--data.sources") for override in overrides):
            sections["data"]["path"] = "not known: the model was saved without its run"
        sections["train"] = {"steps": max(saved.step, 1)}
        logger.warning(
            "%s says what the model is, not how it was trained: data.path is not known (add --data.path DIR, or give "
            "each task its data), and what stands under data, train and evaluation is by default",
            folder,
        )
    for name, keys in Config.sections_of(saved.settings).items():
        sections[name] = {**sections.get(name, {}), **keys}
    if saved.backbone:
        sections["backbone"]["path"] = saved.backbone
    return make_config(sections, overrides, source=str(folder)), saved.backbone_hash


def _exported(folder: Path) -> str:
    """The backbone's identity that an export of an older version names."""
    try:
        return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["backbone"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise no_model(folder, ABOUT, in_a_line(error)) from error
