"""Room on a disk, in words."""

from __future__ import annotations

import shutil
from pathlib import Path


def free_bytes(path: Path) -> int | None:
    """Bytes that can still be written where a path is or will be.

    Args:
        path: A file or folder; may be missing.

    Returns:
        What the file system says: it knows no quotas, and other jobs write, too. None if it says nothing.
    """
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def room_words(path: Path, needed: int) -> str:
    """Room, needed and free.

    Args:
        path: Where something was to be written.
        needed: Bytes that it takes.

    Returns:
        Such as `needed: 1,234 bytes, free: 56 bytes`.
    """
    free = free_bytes(path)
    return f"needed: {needed:,} bytes, free: {'unknown' if free is None else f'{free:,} bytes'}"
