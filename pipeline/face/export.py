"""A checkpoint made into a model of transformers: more files beside those of `pipeline.checkpoint.export`.

DIR/config.json             `LongMemConfig`: the backbone by name and hash, the settings, the training in figures
    generation_config.json  the backbone's
    tokenizer.json, ...     the backbone's, if it has one
    README.md               the model card
    backbone/               the backbone with its tokenizer, if it is asked for

Of the backbone only configuration and tokenizer are read; its weights are copied if asked for, never loaded.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from pipeline.backbone.load import check_weights, read_backbone_config, weight_files
from pipeline.checkpoint import export as weights_only
from pipeline.checkpoint.export import SETTINGS, WEIGHTS, Trained
from pipeline.checkpoint.room import is_want_of_room
from pipeline.config.load import load_config
from pipeline.config.model import ModelSettings
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import BackboneError, CheckpointError, DataError, LongMemError, in_a_line
from pipeline.face.card import card
from pipeline.face.configuration import LongMemConfig
from pipeline.face.figures import figures_of
from pipeline.model.load import check_fit
from pipeline.model.longmem import build
from pipeline.model.saved import BACKBONE, CONFIG, GENERATION

logger = logging.getLogger(__name__)
CARD, ARCHITECTURE = "README.md", "LongMemForCausalLM"
_OF_A_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "spiece*", "sentencepiece*", "*.tiktoken", "*.spm")
_NAME_IT = "name it with --backbone"


def export(source: Path, output: Path, *, backbone: str | None = None, save_backbone: bool = False) -> Path:
    """Makes a checkpoint into a new folder for `LongMemForCausalLM.from_pretrained`, which is whole or absent.

    Args:
        source: A checkpoint (`step_*`), or a run folder: its newest one.
        output: The folder to make.
        backbone: The backbone's folder or hub name; None: the run's `backbone.path`.
        save_backbone: Whether the backbone's files are copied into the folder.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: The output exists already or cannot be written, there is no checkpoint, it is damaged, or the
            backbone is another one; nothing was written.
        BackboneError: The backbone cannot be read from here.
        DataError: Its tokenizer is damaged.
    """
    add = partial(_add, backbone=backbone, save_backbone=save_backbone)
    return weights_only.export(source, output, add=add)


def _add(trained: Trained, folder: Path, *, backbone: str | None, save_backbone: bool) -> None:
    config = load_config(trained.folder / SETTINGS)
    path = backbone or config.backbone.path
    backbone_config = _read_config(path)
    _check_fit(trained, config.model, backbone_config, path)
    tokenizer = _tokenizer(path)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # the export is loaded from other places than the run was started in
    known = figures_of(trained, config)
    made = LongMemConfig(
        backbone_config,
        config.model.model_dump(mode="json"),
        backbone_name=BACKBONE if save_backbone else path,
        backbone_hash=trained.about["backbone"],
        trained=known.to_dict(),
        architectures=[ARCHITECTURE],
        dtype="float32",
    )
    made.save_pretrained(folder)
    _generation_config(path, backbone_config).to_json_file(folder / GENERATION)
    _save_tokenizer(tokenizer, folder)
    if save_backbone:
        _copy_backbone(path, folder / BACKBONE)
        _save_tokenizer(tokenizer, folder / BACKBONE)
    text = card(made, config, known, backbone=path, has_tokenizer=tokenizer is not None)
    (folder / CARD).write_text(text, encoding="utf-8")


def _read_config(path: str) -> Any:
    try:
        return read_backbone_config(path)
    except BackboneError as error:
        raise BackboneError(
            "the backbone's configuration cannot be read, which is part of what is exported",
            got=error.got,
            expected="the folder or hub name of the backbone that the run was trained beside",
            do=_NAME_IT,
        ) from error


def _check_fit(trained: Trained, settings: ModelSettings, backbone_config: Any, path: str) -> None:
    """That the SideNet beside a backbone of this configuration has the weights that were trained, by name and shape."""
    try:
        with torch.device("meta"):
            _, sidenet = build(settings, AutoModelForCausalLM.from_config(backbone_config))
        with safe_open(trained.folder / WEIGHTS, framework="pt") as weights:
            names = weights.keys()
            shapes = {name: weights.get_slice(name).get_shape() for name in names}
        check_fit(sidenet, shapes, trained.checkpoint)
    except LongMemError as error:
        raise CheckpointError(
            "the checkpoint was trained beside another backbone",
            got=f"{path} ({in_a_line(error)})",
            expected="the one of the run",
            do=_NAME_IT,
        ) from error


def _generation_config(path: str, backbone_config: Any) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(backbone_config)


def _tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The backbone's tokenizer; None where no file is of one (of nothing transformers may make an empty one)."""
    folder = Path(path)
    is_there = not folder.is_dir() or any(next(folder.glob(name), None) for name in _OF_A_TOKENIZER)
    try:
        return load_tokenizer(path) if is_there else None
    except DataError as error:
        if folder.is_dir():
            raise
        logger.warning("the output has no tokenizer: %s", error)
        return None


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is None:
        return
    with _full_disk_is_an_os_error():
        tokenizer.save_pretrained(folder)


def _copy_backbone(path: str, folder: Path) -> None:
    """Copies configuration and weights as they are."""
    place = _local(path)
    check_weights(str(place), read_backbone_config(str(place)))
    files = weight_files(str(place))
    if not files:
        raise BackboneError("the backbone's folder holds no weights to copy", got=place, do=_NAME_IT)
    indices = place.glob("*.index.json") if len(files) > 1 else ()
    folder.mkdir()
    for file in (place / CONFIG, place / GENERATION, *indices, *files):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _local(path: str) -> Path:
    """The folder of a backbone; of one on a hub, where its files come to."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # foreign code on a foreign name raises whatever it comes upon
        raise BackboneError("the backbone cannot be copied", got=f"{path} ({in_a_line(error)})", do=_NAME_IT) from error


@contextmanager
def _full_disk_is_an_os_error() -> Iterator[None]:
    """What is written by Rust raises a bare Exception where the disk is full."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if is_want_of_room(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
