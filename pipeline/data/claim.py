"""One preparation at a time for an output: a POSIX lock on a file, which ends with its process, however that ends.

The file names the holder and its work folder. Who finds the lock free but the file there knows that its writer is dead,
and whose the work folder was: that one is removed, and no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.data.ending import StopSignals
from pipeline.data.text import readable
from pipeline.errors import DataError

logger = logging.getLogger(__name__)
_claimed: set[str] = set()  # by this process, which its own POSIX locks would not keep out
_CHANCES = 100


class Claim:
    """The lock of an output, and the name of the folder of its preparation.

    Args:
        folder: Where lock and work folder are made.
        prefix: Begins their names.

    Attributes:
        lock: The file with the lock.
        work: The work folder; nobody has made it yet.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.lock = folder / f"{prefix}.lock"
        self.work = folder / f"{prefix}-{secrets.token_hex(4)}"
        self._prefix = prefix

    @contextlib.contextmanager
    def held(self, *, rescue: Callable[[Path], None], stop: StopSignals) -> Iterator[None]:
        """Holds the lock; at the end its file goes away.

        Args:
            rescue: Saves from the work folder of a dead one what must not go away with it.
            stop: Has the file go away when a signal ends the process.

        Yields:
            Nothing.

        Raises:
            DataError: Another preparation holds it.
        """
        if str(self.lock) in _claimed:
            raise self._refusal("this process")
        _claimed.add(str(self.lock))
        try:
            descriptor, is_locked = self._acquire()
            try:
                left = self._read(descriptor)
                if is_locked and left is not None:
                    self._remove_left(left, rescue)
                with stop.undoing(self._unlink):  # while it is held: whoever opened it looks again for its name
                    self._write(descriptor)
                    yield
            finally:
                os.close(descriptor)
        finally:
            _claimed.discard(str(self.lock))

    def _acquire(self) -> tuple[int, bool]:
        """The open lock file, and whether the file system has locks; never one that its holder has just removed."""
        for _ in range(_CHANCES):
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = self._words(descriptor)
                os.close(descriptor)
                raise self._refusal(holder) from error
            except OSError as error:
                logger.warning("%s cannot be locked (%s): see to it that no other preparation runs", self.lock, error)
                return descriptor, False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.lock), os.fstat(descriptor)):
                    return descriptor, True
            os.close(descriptor)
        raise self._refusal("others, one after another")

    def _refusal(self, holder: str) -> DataError:
        return DataError(
            "another preparation is making this store",
            got=f"{self.lock} is held by {holder}",
            do="wait for its end or stop it, or choose another --output",
        )

    def _words(self, descriptor: int) -> str:
        return (
            os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip() or "a process that has not said its name"
        )

    def _read(self, descriptor: int) -> Path | None:
        """The work folder that the last holder named, if it is one of this output's."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            name = json.loads(os.pread(descriptor, 4096, 0))["work"]
            if name.startswith(f"{self._prefix}-") and "/" not in name:
                return self.lock.with_name(name)
        return None

    def _write(self, descriptor: int) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "work": self.work.name}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self.lock.unlink()

    def _remove_left(self, left: Path, rescue: Callable[[Path], None]) -> None:
        if left.is_dir() and not left.is_symlink():
            rescue(left)
            remove(left)
            if not left.exists():
                logger.info("removed %s, which a preparation that was killed had left", readable(left))


def remove(folder: Path) -> None:
    """Removes a work folder; a warning names it where that does not succeed."""
    for _ in range(_CHANCES):  # a worker that is just being ended may still make a file
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
    logger.warning("%s cannot be removed wholly; it can be deleted", readable(folder))
