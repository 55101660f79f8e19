"""The most memory that something took: an accelerator's allocated bytes, or this process's resident ones."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(device: torch.device) -> int | None:
    """Forgets the peak so far.

    Args:
        device: Whose memory is meant.

    Returns:
        Bytes that are in use now; None where no peak can be known (a host without Linux's /proc).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    with suppress(OSError, AttributeError):  # only glibc keeps what was freed, and has this to give it back
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _FORGET.write_text("5")
    except OSError:
        return None
    return _of_status("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use at once since `forget_peak`, bytes; None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _of_status("VmHWM")


def _of_status(name: str) -> int | None:
    with suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return None
