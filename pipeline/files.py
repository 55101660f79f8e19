"""Files that change whole or not at all, and names of folders."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""End of the name of a file that is being written; a process that is killed leaves it."""


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step: a reader sees the old text or the new, even after a crash.

    Args:
        path: The file; its folder must exist.
        text: What it is to hold.

    Raises:
        OSError: It cannot be written; the old text is still there.
    """
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


def is_a_path(name: str) -> bool:
    """Whether a name cannot be a hub name, which is `model` or `owner/model` of a few kinds of characters."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return name.startswith("~")
