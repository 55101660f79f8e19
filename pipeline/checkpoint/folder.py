"""Checkpoints that are whole or absent, written by all ranks while training goes on.

checkpoints/step_00000040/manifest.json      format, step, world, every file with size and SHA-256; written last
                         /<owner>/...        one folder for each owner of state
checkpoints/latest                           name of the newest one

A save has three parts. Inside `save`, which training waits for, every owner writes what cannot wait and takes snapshots
of the rest. Then a thread of each rank writes its snapshots. When those of all ranks are done, which the ranks ask each
other after every step, threads again read the files: they hash them and flush them to the disk. When those are done
rank 0 adds the manifest and renames the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from pipeline.checkpoint.manifest import (
    FORMAT,
    DamageError,
    Manifest,
    check_names_and_sizes,
    damaged,
    manifest_text,
    raise_damage,
    read_manifest,
)
from pipeline.checkpoint.shelf import LATEST, Shelf, step_of
from pipeline.checkpoint.writing import Writing, change, describe, unwritten
from pipeline.config.untrusted import shown
from pipeline.distributed.ranks import check_agreement, gather_objects, on_rank_zero, rank, together, world_size
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)
_POLL_S = 0.2
TOKEN_STORE, MEMORY_TOKENS, CONTEXT_TOKENS = "token store", "memory tokens", "left context"
"""Names of the parts of the identity that older checkpoints do not have; those were without left context."""
_NAMED, _REASON = 10, 300  # damaged checkpoints in one message, and characters on each


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

    def least_bytes(self) -> int:
        """Bytes that `save` writes on this rank at least: more than is free is not begun."""

    def save(self, folder: Path) -> Callable[[], None] | None:
        """Writes this rank's part, or takes a snapshot of it that can be written while training goes on.

        Collective: every rank calls it.

        Args:
            folder: The owner's own folder, made and shared by all ranks.

        Returns:
            The rest of the writing, from a snapshot, to be run on a thread of this rank: it holds no collective. None
            if everything is written.
        """

    def check(self, folder: Path, saved: SavedWorld) -> None:
        """Checks, before any state is read, that this rank's part can be read; changes nothing, holds no collective.

        Args:
            folder: The folder that `save` wrote; its files are what the manifest says.
            saved: The ranks that wrote it.

        Raises:
            DamageError: It cannot: hashes show accidents, not a manifest that was written to fit.
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
        timeout_s: Seconds after which a checkpoint that is waited for and still not written ends the run.
    """

    def __init__(
        self, folder: Path, *, keep: int, group_size: int, identity: Mapping[str, Any], timeout_s: float = 1800.0
    ) -> None:
        self.group_size, self.identity, self.timeout_s = group_size, dict(identity), timeout_s
        self._shelf = Shelf(folder, keep=keep)
        self._writing: Writing | None = None
        self._damage: dict[str, str] = {}

    def save(self, step: int, owners: Sequence[StateOwner]) -> Path:
        """Begins to save all state after an optimizer step; waits for the save before it.

        Collective: every rank must call it.

        Args:
            step: Optimizer steps done.
            owners: Who holds state.

        Returns:
            The checkpoint's folder: there once `publish_if_written` has found it whole.

        Raises:
            CheckpointError: A file could not be written; older checkpoints are untouched.
        """
        self.publish_if_written(wait=True)
        names = [owner.name for owner in owners]
        work = self._shelf.folder / f"writing_{step:08d}"
        needed = sum(gather_objects(sum(owner.least_bytes() for owner in owners)))
        change(self._shelf, step, lambda: self._shelf.begin(work, names, needed=needed), needed=needed)
        try:
            rests = [owner.save(work / owner.name) for owner in owners]
        except (OSError, RuntimeError, SafetensorError) as error:
            # Some owners save with collectives, so the others cannot be told: they end when this rank has left the job.
            words = f"{describe(error, self._shelf.folder, needed)}"
            raise unwritten(self._shelf, step, {rank(): words}) from error
        self._writing = Writing(self._shelf, step, work, rests, needed=needed)
        return self._shelf.place(step)

    def publish_if_written(self, *, wait: bool = False) -> None:
        """Goes on with the checkpoint that is being written, if there is one, and publishes it once it is whole.

        Collective: every rank must call it, after every step.

        Args:
            wait: Whether to return only when nothing is being written.

        Raises:
            CheckpointError: A file could not be written on some rank, or not in time; older checkpoints are untouched.
        """
        waited_s = 0.0  # counted in polls, in which the ranks are in step: all of them give up together
        while (writing := self._writing) is not None:
            self._writing = None  # if it fails, it is over
            files = writing.files(wait_s=_POLL_S if wait else 0.0)
            if files is not None:
                self._publish(writing, files)
                return
            self._writing = writing
            if not wait:
                return
            waited_s += _POLL_S
            if waited_s > self.timeout_s:
                words = f"still not written, or not seen by every rank, after {waited_s:.0f} s of waiting for it"
                raise unwritten(self._shelf, writing.step, dict.fromkeys(writing.busy or range(world_size()), words))

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole as far as can be seen without reading its files.

        Returns:
            Its folder; None if nothing was saved yet.

        Raises:
            CheckpointError: There are checkpoints, but none is whole; or the newest belongs to another run.
        """
        candidates, named = self._shelf.newest_first(), self._shelf.named_latest()
        if named is not None and not self._shelf.has(named):
            missing = f"{self._shelf.folder / LATEST} names {shown(named)}, which is not there"
            if not candidates:
                raise self._none_whole(missing)
            _say_loudly(missing)
        found = self._first_whole(candidates)
        if found is None and candidates:
            raise self._none_whole(self._all_damage())
        return found

    def load(self, checkpoint: Path, owners: Sequence[StateOwner], *, or_older: bool = False) -> int:
        """Puts all state back.

        Collective: every rank must call it.

        Args:
            checkpoint: The checkpoint's folder.
            owners: Who holds state.
            or_older: Whether the next older whole one will do if this one is damaged.

        Returns:
            Optimizer steps done when it was saved.

        Raises:
            CheckpointError: It is damaged, or belongs to another run; no state was read.
        """
        manifest = None
        while manifest is None:
            try:
                manifest = self._verify(checkpoint, owners)
            except DamageError as error:
                if not or_older:
                    raise
                checkpoint = together(self._older_than(checkpoint, error))
                check_agreement("the checkpoint to go on from", str(checkpoint))
        saved = SavedWorld(manifest.world_size, manifest.group_size)
        for owner in owners:
            owner.load(checkpoint / owner.name, saved)
        return manifest.step

    def truncate_after(self, step: int) -> None:
        """Lets nothing newer than a step count any more: the run goes on from there. Newer ones are put aside.

        Collective: every rank must call it.

        Args:
            step: Optimizer steps done.
        """
        on_rank_zero(lambda: self._shelf.truncate_after(step))

    def check(self, checkpoint: Path) -> Manifest:
        """Checks what can be seen without reading a checkpoint's files: manifest, run, names, sizes.

        Args:
            checkpoint: The checkpoint's folder.

        Returns:
            Its manifest.

        Raises:
            CheckpointError: It is damaged, or belongs to another run.
        """
        manifest = read_manifest(checkpoint)
        saved = {CONTEXT_TOKENS: 0, **manifest.identity}
        other = {
            name: (saved.get(name), value)
            for name, value in self.identity.items()
            if saved.get(name) != value and (name in saved or name not in (TOKEN_STORE, MEMORY_TOKENS))
        }
        if other:
            raise CheckpointError(
                f"the checkpoint {checkpoint} belongs to another run",
                got="; ".join(f"{name} {shown(found)}" for name, (found, _) in other.items()),
                expected="; ".join(f"{name} {wanted!r}" for name, (_, wanted) in other.items()),
                do="start with the settings, the data and the backbone that it was saved with",
            )
        check_names_and_sizes(checkpoint, manifest.files)
        return manifest

    def _publish(self, writing: Writing, files: Mapping[str, Any]) -> None:
        content = {
            "format": FORMAT,
            "step": writing.step,
            "world_size": world_size(),
            "group_size": self.group_size,
            "identity": self.identity,
            "files": dict(sorted(files.items())),
        }
        change(
            self._shelf,
            writing.step,
            lambda: self._shelf.publish(writing.step, writing.work, manifest_text(content)),
            needed=writing.needed,
        )

    def _verify(self, checkpoint: Path, owners: Sequence[StateOwner]) -> Manifest:
        """Checks everything; the ranks share the reading."""
        manifest = together(lambda: self.check(checkpoint))
        found = gather_objects(damaged(checkpoint, manifest.files, _share(sorted(manifest.files))))
        raise_damage(checkpoint, [problem for part in found for problem in part])
        saved = SavedWorld(manifest.world_size, manifest.group_size)
        unreadable = gather_objects([words for owner in owners for words in _unreadable(owner, checkpoint, saved)])
        raise_damage(checkpoint, sorted({problem for part in unreadable for problem in part}))
        return manifest

    def _older_than(self, checkpoint: Path, error: DamageError) -> Callable[[], Path]:
        def find() -> Path:
            self._note(checkpoint, error)
            step = step_of(checkpoint.name)
            older = [path for path in self._shelf.newest_first() if step is not None and _step(path) < step]
            found = self._first_whole(older)
            if found is None:
                raise self._none_whole(self._all_damage())
            return found

        return find

    def _first_whole(self, candidates: Sequence[Path]) -> Path | None:
        for path in candidates:
            try:
                self.check(path)
            except DamageError as error:
                self._note(path, error)
            else:
                return path
        return None

    def _note(self, checkpoint: Path, error: DamageError) -> None:
        _say_loudly(error)
        self._damage[checkpoint.name] = str(error.got)

    def _all_damage(self) -> str:
        """What is wrong with each, so that who sees the last line only sees it all."""
        problems = []
        for path in self._shelf.newest_first()[:_NAMED]:
            if path.name not in self._damage:  # the search began below it: it was passed over before
                try:
                    self.check(path)
                    self._damage[path.name] = "passed over before"
                except DamageError as error:
                    self._damage[path.name] = str(error.got)
            problems.append(f"{path.name} ({self._damage[path.name][:_REASON]})")
        return "all are damaged: " + ", ".join(problems)

    def _none_whole(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"no whole checkpoint is left in {self._shelf.folder}",
            got=problem,
            do="put a whole one back, or start anew in another run.output_dir",
        )


def _say_loudly(problem: object) -> None:
    if rank() == 0:
        logger.error("%s\nThe newest whole checkpoint is looked for.", problem)


def _unreadable(owner: StateOwner, checkpoint: Path, saved: SavedWorld) -> list[str]:
    """What this rank finds wrong with its part of an owner's state, in words."""
    try:
        owner.check(checkpoint / owner.name, saved)
    except DamageError as error:
        return [f"{owner.name}: {error}"]
    return []


def _step(path: Path) -> int:
    """The step of a checkpoint of the shelf."""
    step = step_of(path.name)
    assert step is not None, path
    return step


def _share(names: Sequence[str]) -> Sequence[str]:
    """This rank's share of the work on a list that is the same on all ranks."""
    return names[rank() :: world_size()]
