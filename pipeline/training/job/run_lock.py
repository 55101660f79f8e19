"""One job at a time writes into a run folder: a POSIX lock on `RUN/lock`, held by the process of rank 0.

The lock ends with its process, however that ends. By their documentation it holds between machines on NFS 4, on NFS 3
with lockd, and on Lustre mounted with `flock`. A file system without locks says so: there the run goes on with a
warning.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import struct
from pathlib import Path
from typing import IO

from pipeline.errors import TrainingError

logger = logging.getLogger(__name__)
LOCK_NAME = "lock"
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


class RunLock:
    """The lock of a run folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Takes the lock, if this object has not yet; the folder must exist.

        Raises:
            TrainingError: Another job has it.
        """
        if self._file is not None:
            return
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise TrainingError(
                "another job writes into the run folder",
                got=f"{self.path} is held by {holder or 'a process that has not said its name'}",
                do="wait for its end or stop it, or choose another run.output_dir; if that machine is lost for good "
                "and its lock stays, remove the file",
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that no other job writes here", self.path, error)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Lets it go."""
        if self._file is not None:
            self._file.close()
            self._file = None


def is_held(folder: Path) -> bool | None:
    """Whether a job holds the lock of a run folder; None if that cannot be known here."""
    try:
        # Opening a pipe, if somebody put one there, would wait for a writer.
        with open(os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
