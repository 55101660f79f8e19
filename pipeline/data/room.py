"""Room on the disk: what a preparation will need, as far as the inputs tell, and the words when there is no more."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import multiprocess

from pipeline.errors import DataError

logger = logging.getLogger(__name__)

# A copy of the text, its tokens (4 bytes each, about one for 4 bytes of text), and the tokens again as the store.
_LIKELY_BYTES_PER_BYTE = 3.0
_LEAST_BYTES_PER_BYTE = 2.0  # tokens of 8 bytes of text on average: no corpus has longer ones
_UNPACKED_BYTES_PER_BYTE = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0}  # text is usually packed to less
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LARGER = "make room there, or choose an --output on a larger disk"


def check_room(files: Iterable[Path], folder: Path) -> int:
    """Check before the work that its disk is large enough; a warning where it may not be.

    Args:
        files: The input files.
        folder: Where the work is done: the disk of the output.

    Returns:
        Bytes that will be needed, an estimate.

    Raises:
        DataError: There is less room than the `.txt` inputs need at the very least.
    """
    sizes = [(path.suffix.lower(), path.stat().st_size) for path in files]
    likely = int(
        sum(size * _UNPACKED_BYTES_PER_BYTE.get(suffix, 1.0) for suffix, size in sizes) * _LIKELY_BYTES_PER_BYTE
    )
    # How much of another file is text, and how it is packed, is not known before it is read.
    least = int(sum(size for suffix, size in sizes if suffix == ".txt") * _LEAST_BYTES_PER_BYTE)
    disk = shutil.disk_usage(folder)
    if disk.total > 0 and disk.free < least:
        raise DataError(
            "the disk of the output has too little room",
            got=f"{in_units(disk.free)} free in {folder}",
            expected=f"{in_units(likely)}, estimated from the sizes of the inputs: their text, and twice their tokens",
            do=_LARGER,
        )
    if disk.total > 0 and disk.free < likely:
        logger.warning(
            "the disk of the output may be too small: %s free in %s, %s needed, estimated from the sizes of the inputs",
            in_units(disk.free), folder, in_units(likely),
        )  # fmt: skip
    return likely


@contextlib.contextmanager
def system_errors_in_words(folder: Path, *, needed: int) -> Iterator[None]:
    """Says in words that the disk is full, or what else the system refused; `datasets` hides it below other errors.

    Args:
        folder: Where is written.
        needed: Bytes needed in all, an estimate.

    Yields:
        Nothing.

    Raises:
        DataError: In place of an OSError, of what was raised from one, and of a worker that died.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        causes = list(filter(None, map(_system_error, _causes(error))))
        full = [cause for cause in causes if cause.errno in _FULL]
        if full:
            raise _full(full[0], folder, needed) from error
        if _lost_a_process(error):
            raise _refused(None) from error
        if causes and isinstance(error, (OSError, MemoryError, datasets.exceptions.DatasetGenerationError)):
            raise _refused(causes[0]) from error
        raise


def in_units(size: float) -> str:
    """Bytes for people: in MB below 1 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _full(cause: OSError, folder: Path, needed: int) -> DataError:
    disk = shutil.disk_usage(folder)
    files = os.statvfs(folder)
    inodes = " and no free inode" if files.f_files and files.f_favail == 0 else ""
    return DataError(
        "the disk of the output is full",
        got=f"{cause.strerror}: {in_units(disk.free)} free{inodes} in {folder}, where this preparation had written "
        f"{in_units(_written(folder))}, which it takes away",
        expected=f"about {in_units(needed)} in all, estimated from the sizes of the inputs",
        do=_LARGER,
    )


def _refused(cause: OSError | None) -> DataError:
    if cause is None:
        return DataError(
            "a worker process was ended from outside",
            got="no word from it: usually the system had no more memory",
            do="give fewer --workers, or more memory",
        )
    if cause.errno in (errno.EAGAIN, errno.ENOMEM):
        return DataError("the system gave no more processes or memory", got=cause, do="give fewer --workers")
    return DataError("the system refused what making the store needs", got=cause, do="mend what it names, start again")


def _lost_a_process(error: Exception) -> bool:
    """Whether a worker is gone (`datasets.utils.py_utils` says so), or the process that hands on their results."""
    if isinstance(error, RuntimeError):
        return "abruptly died" in str(error)
    return isinstance(error, (EOFError, ConnectionError, multiprocess.TimeoutError))


def _system_error(error: BaseException) -> OSError | None:
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    if isinstance(error, OSError):
        return error
    # A worker's error comes without its cause, which stands only in the traceback that comes with it as text.
    found = re.findall(r"^\w*Error: \[Errno (\d+)\] (.*)$", str(error), re.MULTILINE)
    return OSError(int(found[-1][0]), found[-1][1]) if found and type(error).__name__ == "RemoteTraceback" else None


def _written(folder: Path) -> int:
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_blocks * 512
    return total


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
