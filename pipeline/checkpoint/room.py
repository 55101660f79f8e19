"""Room on a disk: whether there is any, in words, and whether a failure was for want of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_WANT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch and safetensors make of it: torch's writer of archives says where it stands, and not why.
_WORDS = ("unexpected pos", "PytorchStreamWriter", "No space left", "File too large", "quota exceeded", "os error 28")


def free_bytes(path: Path) -> int | None:
    """Bytes that can be written where a path is or will be, quotas not known; None if the system does not say."""
    for place in (path, *path.absolute().parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        # Some blocks are kept for root.
        return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize
    return None


def free_words(path: Path) -> str:
    """Such as `free: 56 bytes in /scratch/run`; the path may be missing."""
    free = free_bytes(path)
    return f"free: {'unknown' if free is None else f'{free:,} bytes'} in {path}"


def room_words(path: Path, needed: int) -> str:
    """Such as `needed: at least 1,234 bytes, free: 56 bytes in /scratch/run`."""
    return f"needed: at least {needed:,} bytes, {free_words(path)}"


def is_want_of_room(error: BaseException) -> bool:
    """Whether it failed because a disk is full, or a quota or a limit on files is reached."""
    if isinstance(error, OSError) and error.errno in _WANT:
        return True
    return any(words in str(error) for words in _WORDS)
