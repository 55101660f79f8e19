"""Checkpoint folders that are whole or absent: written aside, vouched for by a manifest, then renamed.

checkpoints/step_00000040/manifest.json      format, step, world, every file with size and SHA-256; written last
                         /<owner>/...        one folder for each owner of state
checkpoints/latest                           name of the newest whole checkpoint
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from pipeline.distributed.ranks import barrier, gather, on_rank_zero, rank, together, world_size
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True)
class SavedWorld:
    """The ranks that wrote a checkpoint.

    Attributes:
        world_size: Ranks of the job.
        group_size: Ranks of a memory group.
    """

    world_size: int
    group_size: int


class StateOwner(Protocol):
    """Something that must survive a restart."""

    name: str

    def save(self, folder: Path) -> Callable[[], None] | None:
        """Writes this rank's part, or takes a snapshot of it that can be written while training goes on.

        Collective: every rank calls it.

        Args:
            folder: The owner's own folder, made and shared by all ranks.

        Returns:
            The rest of the writing, from a snapshot, to be run on a thread of this rank: it holds no collective. None
            if everything is written.
        """

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Reads this rank's part back.

        Collective: every rank calls it.

        Args:
            folder: The folder that `save` wrote.
            saved: The ranks that wrote it; may be others than today's.
        """


class Checkpoints:
    """All checkpoints of one run.

    Args:
        folder: `checkpoints/` of the run folder.
        keep: How many to keep.
        group_size: Ranks of a memory group.
        identity: What a checkpoint must have in common with the run that loads it, as plain JSON.
    """

    def __init__(self, folder: Path, *, keep: int, group_size: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.keep, self.group_size, self.identity = folder, keep, group_size, dict(identity)

    def save(self, step: int, owners: Sequence[StateOwner]) -> Path:
        """Saves all state after an optimizer step.

        Collective: every rank must call it.

        Args:
            step: Optimizer steps done.
            owners: Who holds state.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: A file could not be written; older checkpoints are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        work = self.folder / f"writing_{step:08d}"
        on_rank_zero(lambda: self._begin(work, [owner.name for owner in owners]))
        try:
            for owner in owners:
                rest = owner.save(work / owner.name)
                if rest is not None:
                    rest()
        except (OSError, RuntimeError, SafetensorError) as error:
            # Some owners save with collectives, so the others cannot be told: they end when this rank has left the job.
            raise CheckpointError(
                f"rank {rank()} could not write the checkpoint of step {step}; older ones are untouched",
                got=f"{type(error).__name__}: {error}",
                do=f"see to {self.folder}, then start again to go on from the newest checkpoint",
            ) from error
        barrier()
        files = _hash_together(work)
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size(),
            "group_size": self.group_size,
            "identity": self.identity,
            "files": files,
        }
        on_rank_zero(lambda: self._publish(work, final, manifest))
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.is_file() else None

    def load(self, checkpoint: Path, owners: Sequence[StateOwner]) -> int:
        """Puts all state back.

        Collective: every rank must call it.

        Args:
            checkpoint: The checkpoint's folder.
            owners: Who holds state.

        Returns:
            Optimizer steps done when it was saved.

        Raises:
            CheckpointError: It is incomplete or corrupt, or belongs to another run.
        """
        manifest = together(lambda: self.check(checkpoint))
        found = gather(_damaged(checkpoint, manifest["files"]))
        _raise_damage(checkpoint, [problem for part in found for problem in part])
        saved = SavedWorld(manifest["world_size"], manifest["group_size"])
        for owner in owners:
            owner.load(checkpoint / owner.name, saved)
        return int(manifest["step"])

    def check(self, checkpoint: Path) -> dict[str, Any]:
        """Checks what can be seen without reading a checkpoint's files: manifest, run, sizes.

        Args:
            checkpoint: The checkpoint's folder.

        Returns:
            Its manifest.

        Raises:
            CheckpointError: It is incomplete, or belongs to another run.
        """
        manifest = read_manifest(checkpoint)
        other = {
            name: (manifest["identity"].get(name), value)
            for name, value in self.identity.items()
            if manifest["identity"].get(name) != value
        }
        if other:
            raise CheckpointError(
                f"the checkpoint {checkpoint} belongs to another run",
                got="; ".join(f"{name} {found!r}" for name, (found, _) in other.items()),
                expected="; ".join(f"{name} {wanted!r}" for name, (_, wanted) in other.items()),
                do="start with the settings and the backbone that it was saved with",
            )
        sized = (_wrong_size(checkpoint, name, entry) for name, entry in sorted(manifest["files"].items()))
        _raise_damage(checkpoint, [problem for problem in sized if problem is not None])
        return manifest

    def _begin(self, work: Path, names: Sequence[str]) -> None:
        """Makes the folders to write to; what an interrupted save left behind goes."""
        for left_over in self.folder.glob("writing_*"):
            shutil.rmtree(left_over)
        work.mkdir(parents=True)
        for name in names:
            (work / name).mkdir()

    def _publish(self, work: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        _write_durably(work / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # the same step, saved before an interruption: the new one is as good
            os.replace(final, work.with_name(f"{work.name}_replaced"))
        os.replace(work, final)
        shutil.rmtree(work.with_name(f"{work.name}_replaced"), ignore_errors=True)
        pointer = self.folder / f"{LATEST}.writing"
        _write_durably(pointer, final.name)
        os.replace(pointer, self.folder / LATEST)
        # Later ones are left from before the run went back to an older checkpoint; they count once they are passed.
        done = sorted(path for path in self.folder.glob("step_*") if path.is_dir() and path.name <= final.name)
        for old in done[: -self.keep]:
            shutil.rmtree(old)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads what a checkpoint says of itself.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The folder is no checkpoint, or one of another format.
    """
    path = checkpoint / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        known = manifest["format"] == FORMAT
        if known:  # an entry that lacks or is something else is caught below
            int(manifest["step"]), int(manifest["world_size"]), int(manifest["group_size"]), dict(manifest["identity"])
            [(int(entry["size"]), str(entry["sha256"])) for entry in dict(manifest["files"]).values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a whole checkpoint",
            got=f"{type(error).__name__} at {path.name}",
            expected=f"a folder step_* with {MANIFEST}",
            do="give the folder of a checkpoint to run.resume, or 'auto', or 'none' with another run.output_dir",
        ) from error
    if not known:
        raise CheckpointError(
            f"{checkpoint} has another format",
            got=f"format {manifest['format']!r}",
            expected=f"format {FORMAT}",
            do="resume it with the version of LongMem that wrote it",
        )
    return manifest


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _share(names: Sequence[str]) -> Sequence[str]:
    """This rank's share of the work on a list that is the same on all ranks."""
    return names[rank() :: world_size()]


def _hash_together(folder: Path) -> dict[str, Any]:
    """Size and hash of every file below a folder; the ranks share the reading."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    parts = gather({name: _digest(folder / name) for name in _share(names)})
    return {name: entry for part in parts for name, entry in sorted(part.items())}


def _damaged(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """What is wrong with this rank's share of the files that a manifest lists."""
    problems = []
    for name in _share(sorted(files)):
        wrong = _wrong_size(folder, name, files[name])
        if wrong is None and _digest(folder / name)["sha256"] != files[name]["sha256"]:
            wrong = f"{name} has another hash"
        if wrong is not None:
            problems.append(wrong)
    return problems


def _wrong_size(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file without reading it."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    size = (folder / name).stat().st_size
    return None if size == entry["size"] else f"{name} has {size} bytes instead of {entry['size']}"


def _raise_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is corrupt",
            got="; ".join(sorted(problems)),
            do="resume from another one with --run.resume DIR, or start anew in another --run.output_dir",
        )


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
