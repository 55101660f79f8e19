"""The folder of a run's checkpoints, as one process sees it: which there are, adding one, going back to one.

step_00000040      a whole checkpoint
latest             name of the newest one, for people and scripts; nothing here trusts it
writing_00000044   one that is being written, or that a crash left
aside_00000048     one that is newer than the checkpoint that the run went back to
removing_*         one that is being removed
back_to            the step that the run is going back to, while newer ones are put aside

Every change is one rename, flushed to the disk, so a crash at any moment leaves whole checkpoints under `step_*`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.checkpoint.manifest import MANIFEST
from pipeline.checkpoint.room import free_bytes
from pipeline.config.untrusted import read_small, shown
from pipeline.errors import CheckpointError
from pipeline.files import flush_folder, write_text

logger = logging.getLogger(__name__)
LATEST = "latest"
_BACK_TO = "back_to"
_NOTE_BYTES = 1 << 16
_SURELY = 0.75  # a file system that compresses holds somewhat more than it has


def step_of(name: str, *, kind: str = "step") -> int | None:
    """The step in the name of a checkpoint's folder; None if a shelf writes no such name."""
    digits = name.removeprefix(f"{kind}_")
    is_own = digits.isascii() and digits.isdecimal() and len(digits) < 20 and name == f"{kind}_{int(digits):08d}"
    return int(digits) if is_own else None


class Shelf:
    """The checkpoints of one run. No method holds a collective; only one process may change anything.

    Args:
        folder: `checkpoints/` of the run folder; made when the first one is written.
        keep: How many stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step is once it is whole."""
        return self.folder / f"step_{step:08d}"

    def has(self, name: str) -> bool:
        """Whether a name is that of a checkpoint that is there, whole or not."""
        step = step_of(name)
        return step is not None and self.place(step).is_dir()

    def newest_first(self) -> list[Path]:
        """The checkpoints to go on from, whole or not. Raises CheckpointError: a note of going back is damaged."""
        end = self._back_to()
        steps = sorted(self._steps("step"), reverse=True)
        return [self.place(step) for step in steps if end is None or step <= end]

    def named_latest(self) -> str | None:
        """What the file `latest` says, whether or not that is there; None without such a file."""
        path = self.folder / LATEST
        if not os.path.lexists(path):
            return None
        try:
            return read_small(path, limit=_NOTE_BYTES).strip()
        except (OSError, ValueError) as error:
            return f"nothing that can be read ({error})"

    def begin(self, work: Path, names: Sequence[str], *, needed: int = 0) -> None:
        """Clears up and makes `work`, with folders `names`. Raises OSError, also for want of `needed` bytes."""
        self._clear()
        free = free_bytes(self.folder)
        if free is not None and free < _SURELY * needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.folder.mkdir(exist_ok=True)  # without its parents: a run folder that was removed is not made again
        work.mkdir()
        for name in names:
            (work / name).mkdir()

    def publish(self, step: int, work: Path, manifest: str) -> None:
        """Makes what was written to `work`, and is on the disk, the newest checkpoint, and removes old ones."""
        write_text(work / MANIFEST, manifest)
        for parent, _, _ in os.walk(work):
            flush_folder(Path(parent))
        if self.place(step).exists():  # only if somebody put it there: a run that goes back puts newer ones aside
            self._rename(self.place(step), f"aside_{step:08d}")
        self._rename(work, self.place(step).name)
        flush_folder(self.folder.parent)
        self._write(LATEST, self.place(step).name)
        self._prune(step)

    def truncate_after(self, step: int) -> None:
        """Lets nothing newer than a step count: the run goes on from there. Newer ones are put aside.

        They are removed when the run has passed their steps. What a crash left half written or half removed goes at
        once.

        Args:
            step: The step; 0 lets none count.
        """
        self._clear()
        newer = [number for number in self._steps("step") if number > step]
        if newer:
            # Written first: a crash between the renames must not leave one of the newer ones as the newest.
            self._write(_BACK_TO, str(step))
        for number in newer:
            if (self.folder / f"aside_{number:08d}").exists():
                self._drop(f"aside_{number:08d}")
            self._rename(self.place(number), f"aside_{number:08d}")
        if self.place(step).is_dir() and self.named_latest() != self.place(step).name:
            self._write(LATEST, self.place(step).name)
        (self.folder / _BACK_TO).unlink(missing_ok=True)

    def remove(self, folder: Path) -> None:
        """Removes a folder that counts as no checkpoint; if that cannot be done, it is logged."""
        try:
            shutil.rmtree(folder)
        except OSError as error:  # it takes space, but nothing counts on its absence
            logger.warning("%s could not be removed: %s", folder, error)

    def _clear(self) -> None:
        for left_over in (*self.folder.glob("writing_*"), *self.folder.glob("removing_*")):
            self.remove(left_over)
        for left_over in self.folder.glob(".*.partial"):
            left_over.unlink()

    def _back_to(self) -> int | None:
        path = self.folder / _BACK_TO
        if not os.path.lexists(path):
            return None
        try:
            text = read_small(path, limit=_NOTE_BYTES).strip()
            if not (text.isascii() and text.isdecimal() and len(text) < 20):
                raise ValueError(f"it says {shown(text)}")
            return int(text)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: a job was going back to an older checkpoint and was cut short",
                got=error,
                expected="the number of a step",
                do="write the step to go back to into it, or remove it to go on from the newest checkpoint",
            ) from error

    def _steps(self, kind: str) -> list[int]:
        found = (step_of(path.name, kind=kind) for path in self.folder.glob(f"{kind}_*") if path.is_dir())
        return [step for step in found if step is not None]

    def _prune(self, step: int) -> None:
        for old in self.newest_first()[self.keep :]:
            self._drop(old.name)
        for number in self._steps("aside"):
            if number <= step:
                self._drop(f"aside_{number:08d}")

    def _drop(self, name: str) -> None:
        """Removes a checkpoint; half removed it must not look like one."""
        self._rename(self.folder / name, f"removing_{name}")
        self.remove(self.folder / f"removing_{name}")

    def _rename(self, path: Path, name: str) -> None:
        os.replace(path, self.folder / name)
        flush_folder(self.folder)

    def _write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)
        flush_folder(self.folder)
