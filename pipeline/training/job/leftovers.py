"""What a rank that is killed would leave behind for later jobs of the machine, and how it does not.

Two things of DeepSpeed's start outlive a SIGKILL: the lock file under which torch compiles an extension, for which
every later job would wait without end or word, and the shared memory of all-reduces among CPU ranks, 66 MiB a rank.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from torch.utils import cpp_extension

from pipeline.distributed.ranks import barrier, rank

_SHARED_MEMORY = Path("/dev/shm")


class DyingLock:
    """A lock on a file that is gone when its holder is, however it ends; in place of torch's `FileBaton`.

    Args:
        lock_file_path: The file of torch's lock; this one is beside it.
        wait_seconds: As in torch; not needed.
        warn_after_seconds: As in torch; not needed.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._file = os.open(f"{lock_file_path}.flock", os.O_CREAT | os.O_RDWR, 0o666)

    def try_acquire(self) -> bool:
        """Takes the lock if nobody has it; says whether it is taken."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Waits until nobody has the lock."""
        fcntl.flock(self._file, fcntl.LOCK_SH)
        self.release()

    def release(self) -> None:
        """Gives the lock back."""
        os.close(self._file)


def lock_extensions_for_life() -> None:
    """Has torch lock the folder of an extension only as long as the process lives that compiles it."""
    cpp_extension.FileBaton = DyingLock  # type: ignore[misc,assignment]  # torch 2.13 has no setting for it


def unlink_shared_buffers() -> None:
    """Has DeepSpeed's shared memory end with its last user: removes its names, once all have it open. Collective."""
    barrier()
    job = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    (_SHARED_MEMORY / f"deepspeed_allreduce_buffer_{job}_{rank()}").unlink(missing_ok=True)
