"""The collectives of a memory group, with what they cost; a group of one rank exchanges nothing.

Shapes: `G` ranks of the group; `...` the same on all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    """How the ranks of a memory group talk.

    Attributes:
        size: `G`.
        rank: This rank's number in the group: it reads segment `rank` of every `G` consecutive ones.
        traffic: Bytes that this rank sent to others, by purpose.
    """

    size: int
    rank: int
    traffic: Counter[str]

    def all_gather(self, x: Tensor, *, purpose: str) -> Callable[[], Tensor]:
        """Starts to collect a tensor of every rank.

        Collective: every rank of the group must call it.

        Args:
            x: `[...]`.
            purpose: What the bytes are counted under.

        Returns:
            Waits for, and returns, `[G, ...]`, in rank order.
        """
        ...

    def all_to_all(self, parts: Sequence[Tensor], *, rows: Sequence[int], purpose: str) -> Callable[[], list[Tensor]]:
        """Starts to give part `g` to rank `g`.

        Collective: every rank of the group must call it.

        Args:
            parts: One a rank, `[n_g, ...]`; may be empty.
            rows: How many rows every rank has for this one.
            purpose: What the bytes are counted under.

        Returns:
            Waits for, and returns, what every rank had for this one, `[rows[g], ...]` each.
        """
        ...


class Alone:
    """A group of one rank."""

    size = 1
    rank = 0

    def __init__(self) -> None:
        self.traffic: Counter[str] = Counter()

    def all_gather(self, x: Tensor, *, purpose: str) -> Callable[[], Tensor]:
        """Returns its argument.

        Args:
            x: `[...]`.
            purpose: Unused.

        Returns:
            Returns `[1, ...]`.
        """
        return lambda: x[None]

    def all_to_all(self, parts: Sequence[Tensor], *, rows: Sequence[int], purpose: str) -> Callable[[], list[Tensor]]:
        """Returns its argument.

        Args:
            parts: One part.
            rows: Unused.
            purpose: Unused.

        Returns:
            Returns the part.
        """
        return lambda: list(parts)


class RankGroup:
    """The ranks of a process group.

    Args:
        group: The process group; gloo for tensors on the CPU, NCCL on NVIDIA GPUs.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.traffic: Counter[str] = Counter()

    def all_gather(self, x: Tensor, *, purpose: str) -> Callable[[], Tensor]:
        """Starts to collect a tensor of every rank.

        Collective: every rank of the group must call it.

        Args:
            x: `[...]`.
            purpose: What the bytes are counted under.

        Returns:
            Waits for, and returns, `[G, ...]`.
        """
        x = x.contiguous()
        gathered = x.new_empty((self.size, *x.shape))
        self.traffic[purpose] += (self.size - 1) * x.numel() * x.element_size()
        work = dist.all_gather(list(gathered.unbind(0)), x, group=self.group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return gathered

        return wait

    def all_to_all(self, parts: Sequence[Tensor], *, rows: Sequence[int], purpose: str) -> Callable[[], list[Tensor]]:
        """Starts to give part `g` to rank `g`.

        Collective: every rank of the group must call it.

        Args:
            parts: One a rank, `[n_g, ...]`; may be empty.
            rows: How many rows every rank has for this one.
            purpose: What the bytes are counted under.

        Returns:
            Waits for, and returns, `[rows[g], ...]` of every rank.
        """
        sent = torch.cat(list(parts))
        received = sent.new_empty((sum(rows), *sent.shape[1:]))
        away = len(sent) - len(parts[self.rank])
        self.traffic[purpose] += away * sent[:1].numel() * sent.element_size()
        work = dist.all_to_all_single(
            received, sent, list(rows), [len(part) for part in parts], group=self.group, async_op=True
        )

        def wait() -> list[Tensor]:
            if work is not None:
                work.wait()
            return list(received.split(list(rows)))

        return wait


def exchange_of(group: dist.ProcessGroup | None) -> Exchange:
    """An exchange, with counters of its own, of the ranks of a process group; None: of this rank alone."""
    return Alone() if group is None else RankGroup(group)
