"""Files that change whole or not at all, their hashes, and names of folders."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""End of the name of a file that is being written; a process that is killed leaves it."""


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step: readers see the old one or the new, after a crash or an OSError, too."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


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
