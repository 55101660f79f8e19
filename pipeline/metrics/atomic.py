"""Files that change whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step: a reader sees the old text or the new, even after a crash.

    Args:
        path: The file; its folder must exist.
        text: What it is to hold.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
