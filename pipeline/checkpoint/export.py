"""A checkpoint made into a folder of its own: the trained weights in one file, and their configuration.

DIR/model.safetensors   the SideNet's weights, fp32, by their names in the model
    config.yaml         the settings of the run that trained them
    export.json         step, backbone, layout, hash of the weights

`pipeline/face/export.py` adds what makes it a model of transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import MANIFEST, check_names_and_sizes, damaged, raise_damage, read_manifest
from pipeline.checkpoint.room import is_want_of_room, room_words
from pipeline.checkpoint.shelf import Shelf
from pipeline.config.untrusted import short
from pipeline.errors import CheckpointError
from pipeline.files import new_folder

WEIGHTS, SETTINGS, ABOUT = "model.safetensors", "config.yaml", "export.json"
_OWNER = "sidenet"


@dataclass(frozen=True)
class Trained:
    """Trained weights: WEIGHTS and SETTINGS in a folder, and what an export says about them."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that they are part of."""
        return self.folder.parent


def export(source: Path, output: Path, *, add: Callable[[Trained, Path], None] | None = None) -> Path:
    """Writes the trained weights of a checkpoint into a new folder, which is whole or absent.

    Args:
        source: A checkpoint (`step_*`), or a run folder: its newest one.
        output: The folder to make.
        add: Writes more into it; whatever it raises, nothing is left of the folder.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: The output exists already or cannot be written, there is no checkpoint, or it is damaged;
            nothing was written.
    """
    if os.path.lexists(output):
        raise CheckpointError("the output exists already; nothing was written", got=output, do="name a new folder")
    trained = find_trained(source)
    try:
        _write(trained, output, add)
    except OSError as error:
        needed = sum((trained.folder / part).stat().st_size for part in (WEIGHTS, SETTINGS))
        room = f"; {room_words(output, needed)}" if is_want_of_room(error) else ""
        raise CheckpointError(
            "the output cannot be written; nothing is left of it",
            got=f"{output} ({error}){room}",
            expected="a new folder where one can be made",
            do="name one where you may write and where there is room",
        ) from error
    return trained.checkpoint


def find_trained(source: Path) -> Trained:
    """Finds the trained weights of a checkpoint, all of whose files are read and held against their hashes.

    Args:
        source: A checkpoint (`step_*`), or a run folder: its newest one.

    Returns:
        The weights.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    checkpoint = _find(source)
    manifest = read_manifest(checkpoint)
    check_names_and_sizes(checkpoint, manifest.files)
    raise_damage(checkpoint, damaged(checkpoint, manifest.files, sorted(manifest.files)))
    wanted = [f"{_OWNER}/{part}" for part in (WEIGHTS, SETTINGS)]
    raise_damage(checkpoint, [f"{name} is not in its manifest" for name in wanted if name not in manifest.files])
    about = {"step": manifest.step, "sha256": manifest.files[wanted[0]].sha256, **manifest.identity}
    return Trained(checkpoint / _OWNER, about)


def _write(trained: Trained, output: Path, add: Callable[[Trained, Path], None] | None) -> None:
    with new_folder(output) as whole:
        if add is not None:  # first: it can find that something is wrong
            add(trained, whole)
        for part in (WEIGHTS, SETTINGS):
            shutil.copyfile(trained.folder / part, whole / part)
        (whole / ABOUT).write_text(json.dumps(trained.about, indent=1) + "\n", encoding="utf-8")


def _find(source: Path) -> Path:
    if os.path.isfile(source / MANIFEST):
        return source
    try:
        found = Shelf(source / "checkpoints", keep=1).newest_first()
    except OSError:  # such as a name that is too long
        found = []
    if not found:
        raise CheckpointError(
            "there is no checkpoint",
            got=short(str(source)),
            expected="a folder step_* of a run's checkpoints, or a run folder with one",
            do="name one of them",
        )
    return found[0]
