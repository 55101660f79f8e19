"""Files that change whole or not at all, their hashes, and names of folders."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""End of the name of a file that is being written; a process that is killed leaves it."""


def partial_of(path: Path) -> Path:
    """What a file is called while it is being written."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replaces a file in one step: readers see the old one or the new, after a crash or an error, too.

    Args:
        path: The file.

    Yields:
        Where to write the new one; it takes the old one's place when the `with` ends without an error.
    """
    temporary = partial_of(path)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Makes a folder that is whole or absent; of folders above it none is left that was made for nothing.

    Args:
        output: The folder, which is not there.

    Yields:
        Where to write it; it gets its name when the `with` ends without an error.

    Raises:
        OSError: It cannot be made.
    """
    if os.path.lexists(output.parent) and not output.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(output.parent))
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name[:50]}-", dir=output.parent) as name:
            whole = Path(name, "whole")
            whole.mkdir()
            yield whole
            whole.rename(output)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush_folder(folder: Path) -> None:
    """Has the disk hold the names in a folder: without it a power loss may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that keep no folders on a disk of their own
            raise
    finally:
        os.close(descriptor)


@contextmanager
def the_only_writer(path: Path) -> Iterator[None]:
    """Inside, no other process is writing this file (by `replacing`); what a killed one left is taken over.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        BlockingIOError: Another one is writing it. A file system without locks lets both: the last one wins.
    """
    temporary = partial_of(path)
    while True:
        with temporary.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            if not _is_still(temporary, os.fstat(file.fileno())):
                continue  # its writer was done between our opening and our lock
            yield
            return


def _is_still(path: Path, opened: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), opened)
    except FileNotFoundError:
        return False


def hash_file(
    path: Path, *, progress: Callable[[int], object] = lambda _: None, flush: bool = False
) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; `progress` is told the bytes of each block, `flush` has them on the disk."""
    if not path.is_file():  # opening a pipe would wait for somebody who writes into it
        raise OSError(errno.EINVAL, "Not a plain file", str(path))
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
            size += len(block)
            progress(len(block))
        if flush:
            os.fsync(file.fileno())
    return size, found.hexdigest()


def is_a_path(name: str) -> bool:
    """Whether a name cannot be a hub name, which is `model` or `owner/model` of a few kinds of characters."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith("~")
