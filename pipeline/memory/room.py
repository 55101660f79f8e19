"""Whether something so large can be held at all: asked before it is allocated, where the answer would be a kill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ConfigError

_MEMINFO, _GROUPS, _OWN_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """Memory of a device.

    Attributes:
        free: Bytes that can be had now, by giving up caches and using swap.
        total: Bytes that there are for all processes of this machine, or of this container.
        words: What memory it is.
    """

    free: int
    total: int
    words: str


def room_on(device: torch.device) -> Room | None:
    """The memory of a device.

    Args:
        device: The device.

    Returns:
        Its room; None where that cannot be known.
    """
    if device.type == "cpu":
        return _host_room()
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(free + cached, total, "accelerator")


def check_room(needed: int, device: torch.device, *, num_ranks: int) -> None:
    """Checks that a memory bank can be held. Refuses only what surely cannot: a run that fits must not be lost to it.

    Args:
        needed: Bytes of this rank's bank.
        device: Where it will be.
        num_ranks: Ranks of this machine. Each has as large a bank; on the host they have one memory.

    Raises:
        ConfigError: It cannot.
    """
    room = room_on(device)
    sharing = num_ranks if device.type == "cpu" else 1
    if room is None or (needed <= room.free and sharing * needed <= room.total):
        return
    elsewhere = "" if device.type == "cpu" else "memory.device host, "
    raise ConfigError(
        [
            f"the memory bank does not fit into {room.words} memory; got: {needed:,} bytes for a rank, {sharing} "
            f"rank(s) with {room.total:,} bytes in all, {room.free:,} of them free; do: {elsewhere}a smaller "
            "memory.tokens, fewer data.lanes, a larger memory.group_size with more ranks; launch/plan.py says what fits"
        ]
    )


def _host_room() -> Room | None:
    try:
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        found = {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines}
        free, total = found["MemAvailable"] + found["SwapFree"], found["MemTotal"] + found["SwapTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    limit = _container_limit()
    return Room(free, total, "host") if limit is None else Room(min(free, limit), min(total, limit), "host")


def _container_limit() -> int | None:
    """The least limit of the control groups (version 2) that this process is in, swap included; None without one."""
    try:
        own = _OWN_GROUP.read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        return None
    limits = []
    for group in (_GROUPS / own, *(_GROUPS / own).parents):
        if group == _GROUPS.parent:
            break
        try:
            memory = (group / "memory.max").read_text().strip()
            swap = (group / "memory.swap.max").read_text().strip()
        except OSError:
            continue
        if memory.isdecimal():
            # Without a limit for swap all of the machine's may be used.
            limits.append(int(memory) + (int(swap) if swap.isdecimal() else _swap_bytes()))
    return min(limits, default=None)


def _swap_bytes() -> int:
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("SwapTotal:"):
            return 1024 * int(line.split()[1])
    return 0
