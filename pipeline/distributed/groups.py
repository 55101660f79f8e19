"""Memory groups: which ranks share one bank."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist

from pipeline.distributed.ranks import rank, world_size


@dataclass(frozen=True)
class MemoryGroup:
    """The memory group of this rank: consecutive ranks, so that they sit on one node where they can.

    Attributes:
        number: Which group, from 0.
        num_groups: Groups of the job.
        rank: This rank's number in it.
        size: `G`.
        process_group: For its collectives; None for a group of one.
    """

    number: int
    num_groups: int
    rank: int
    size: int
    process_group: dist.ProcessGroup | None

    @classmethod
    def build(cls, size: int, *, timeout_s: float, on_host: bool = False) -> MemoryGroup:
        """Splits the ranks of the job into memory groups.

        Collective: every rank of the job must call it.

        Args:
            size: `G`; divides the world size.
            timeout_s: Seconds after which a collective of the group that does not end fails.
            on_host: Whether its tensors are in host memory, whatever the accelerator: then gloo carries them.

        Returns:
            This rank's group.
        """
        own = None
        if size > 1:
            for first in range(0, world_size(), size):  # every rank must take part in making every group
                members = list(range(first, first + size))
                limit = datetime.timedelta(seconds=timeout_s)
                made = dist.new_group(members, timeout=limit, backend="gloo" if on_host else None)
                if rank() in members:
                    own = made
        return cls(rank() // size, world_size() // size, rank() % size, size, own)
