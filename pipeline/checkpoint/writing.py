"""One checkpoint that is being written beside the training, by a thread of each rank."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.background import Background
from pipeline.checkpoint.manifest import digest, files_below
from pipeline.checkpoint.room import is_want_of_room, room_words
from pipeline.checkpoint.shelf import Shelf
from pipeline.distributed.ranks import gather_objects, rank, world_size
from pipeline.errors import CheckpointError, LongMemError


class Writing:
    """What is left of a save when training goes on.

    Two rounds: every rank writes its snapshots; when all have, the ranks share the reading of all files, which are
    hashed and flushed to the disk.

    Args:
        shelf: Where the checkpoint belongs.
        step: Its step.
        work: The folder that it is written to.
        rests: Write this rank's snapshots.
        needed: Bytes that all ranks write at least.

    Attributes:
        busy: The ranks that were not done when last asked.
    """

    def __init__(
        self, shelf: Shelf, step: int, work: Path, rests: Sequence[Callable[[], None] | None], *, needed: int
    ) -> None:
        self.shelf, self.step, self.work, self.needed = shelf, step, work, needed
        self._writing = Background(lambda: [rest() for rest in rests if rest is not None])
        self._hashing: Background[dict[str, Any]] | None = None
        self.busy: list[int] = []

    def files(self, *, wait_s: float) -> dict[str, Any] | None:
        """Asks how far all ranks are.

        Collective: every rank must call it.

        Args:
            wait_s: Seconds to wait for this rank's thread.

        Returns:
            The manifest's entry of every file; None as long as some rank is not done.

        Raises:
            CheckpointError: Some rank could not write, on every rank.
        """
        if self._hashing is not None:
            if not self._is_done_everywhere(self._hashing, wait_s):
                return None
            entries = gather_objects(self._hashing.result)
            return {name: entry for part in entries for name, entry in part.items()}
        if self._is_done_everywhere(self._writing, wait_s):
            self._begin_hashing(wait_s)
        return None

    def _begin_hashing(self, wait_s: float) -> None:
        names = files_below(self.work)
        seen = gather_objects(hashlib.sha256("\n".join(names).encode()).hexdigest())
        if len(set(seen)) > 1:  # a rank sees the files of others, on some file systems, only after a while
            time.sleep(wait_s)
            return
        mine = names[rank() :: world_size()]
        self._hashing = Background(lambda: {name: digest(self.work / name, flush=True) for name in mine})

    def _is_done_everywhere(self, task: Background[Any], wait_s: float) -> bool:
        done = task.is_done(wait_s=wait_s)
        reports = gather_objects((done, describe(task.error, self.shelf.folder, self.needed)))
        self.busy = [number for number, (done, _) in enumerate(reports) if not done]
        if self.busy:  # a failure waits for those who still write: the folder is removed
            return False
        failed = {number: words for number, (_, words) in enumerate(reports) if words is not None}
        if failed:
            if rank() == 0:
                self.shelf.remove(self.work)  # it may be what fills the disk
            raise unwritten(self.shelf, self.step, failed) from task.error
        return True


def change(shelf: Shelf, step: int, work: Callable[[], None], *, needed: int) -> None:
    """Runs `work` on rank 0. Raises CheckpointError on every rank if that fails. Collective: every rank calls it."""
    error: Exception | None = None
    try:
        if rank() == 0:
            work()
    except (OSError, LongMemError) as caught:
        error = caught
    words = gather_objects(describe(error, shelf.folder, needed))[0]
    if words is not None:
        raise unwritten(shelf, step, {0: words}) from error


def unwritten(shelf: Shelf, step: int, failed: Mapping[int, str]) -> CheckpointError:
    """The error that says which ranks could not write a checkpoint, and why."""
    first, *others = sorted(failed)
    return CheckpointError(
        f"rank {first} could not write the checkpoint of step {step}; older ones are untouched",
        got=failed[first] + (f" (and so it went on rank(s) {others})" if others else ""),
        do=f"see to {shelf.folder}, then start again to go on from the newest checkpoint",
    )


def describe(error: Exception | None, folder: Path, needed: int) -> str | None:
    """The words for what a rank failed with; None if it did not fail."""
    if error is None:
        return None
    words = f"{type(error).__name__}: {error}"
    if not is_want_of_room(error):
        return words
    return f"no room on the disk, or a quota or a limit on files ({words}); {room_words(folder, needed)}"
