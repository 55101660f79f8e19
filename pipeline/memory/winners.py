"""Which of the chunks that the shards of a group found are among the best `k` of the whole group.

Scores travel, then each query's `k`-th best. Only where equal scores straddle the `k`-th place do the orders that
decide between them (`SegmentView.slot_order`) travel too.

Shapes: `G` ranks of the group, `n = Hkv * P * U` units of a block of one rank (all ranks have as many), `k` chunks of
a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.exchange import Exchange
from pipeline.memory.layer import NOTHING
from pipeline.memory.search import Retrieved, sort_keys

_NO_ORDER = -1


@dataclass(frozen=True)
class Winners:
    """What some queries of a block attend to in one shard: queries without any are left out.

    Attributes:
        members: Which queries, as numbers in the flattened `[Hkv, P, U]`, ascending, int64 `[m]`.
        slots: Their chunks, best first, int32 `[m, w]` with `w <= k`; meaningless beyond the count.
        counts: How many chunks each has, int32 `[m]`; 0 only in `whole`.
    """

    members: Tensor
    slots: Tensor
    counts: Tensor

    @property
    def valid(self) -> Tensor:
        """Which entries hold a chunk, bool `[m, w]`."""
        return torch.arange(self.slots.shape[1], device=self.slots.device) < self.counts[:, None]

    @classmethod
    def of(cls, found: Retrieved, smallest: Tensor | None = None) -> Winners:
        """Keeps what reaches a threshold.

        Args:
            found: What a shard found, best first.
            smallest: Smallest key kept, int64 `[n]`; None: all are kept.

        Returns:
            The chunks that are kept.
        """
        kept = found.valid.flatten(0, 2)
        if smallest is not None:
            kept &= found.keys.flatten(0, 2) >= smallest[:, None]
        counts = kept.sum(dim=-1, dtype=torch.int32)
        members = counts.nonzero()[:, 0]
        counts = counts[members]
        width = int(counts.max()) if len(counts) else 0
        return cls(members, found.slots.flatten(0, 2)[members, :width].to(torch.int32), counts)

    @classmethod
    def whole(cls, found: Retrieved) -> Winners:
        """Keeps everything, of all units: nothing is counted on the host, which would wait for an accelerator."""
        slots, valid = found.slots.flatten(0, 2).to(torch.int32), found.valid.flatten(0, 2)
        if slots.shape[-1] == 0:
            slots, valid = slots[:0], valid[:0]
        members = torch.arange(len(slots), device=slots.device)
        return cls(members, slots, valid.sum(dim=-1, dtype=torch.int32))

    def pieces(self, num_chunks: int) -> Iterator[tuple[Tensor, Winners]]:
        """Cuts them up into queries with equally many chunks, so that every entry holds one.

        Args:
            num_chunks: Of a piece, at most; one query's are not cut.

        Yields:
            Which rows they are, int64 `[p]`, and those winners.
        """
        order = self.counts.argsort(stable=True)
        widths, lengths = self.counts[order].unique_consecutive(return_counts=True)
        for width, rows in zip(widths.tolist(), order.split(lengths.tolist()), strict=True):
            for part in rows.split(max(1, num_chunks // width)):
                yield part, Winners(self.members[part], self.slots[part, :width], self.counts[part])


@dataclass(frozen=True)
class Shared:
    """The best `k` of a block's queries, as the group holds them.

    Attributes:
        winners: What the queries of each rank attend to in this rank's shard.
        holders: Which of this rank's queries each rank holds winners of, int64 `[m_g]` as `Winners.members`.
    """

    winners: list[Winners]
    holders: list[Tensor]


def share(found: list[Retrieved], exchange: Exchange, *, k: int, is_waited_for: bool = False) -> Callable[[], Shared]:
    """Starts to find out what, of what this shard found for the queries of every rank, is of the group's best `k`.

    Collective: every rank of the group must call it, and what it returns.

    Args:
        found: For the queries of each rank, in rank order.
        exchange: The group.
        k: Chunks that each query reads.
        is_waited_for: Whether a rank alone must not count on the host what was found.

    Returns:
        Waits for the scores, and returns the winners and where those of this rank's own queries are.
    """
    if exchange.size == 1 or k == 0:
        found_here = [Winners.whole(each) if is_waited_for else Winners.of(each) for each in found]
        return lambda: Shared(found_here, [winners.members for winners in found_here])
    found = [retrieved.padded(k) for retrieved in found]
    scores = [retrieved.scores.flatten(0, 2) for retrieved in found]
    rows = [len(scores[exchange.rank])] * exchange.size
    waiting = exchange.all_to_all(scores, rows=rows, purpose="scores")
    return lambda: _decide(found, torch.stack(waiting()), exchange, k=k)


def _decide(found: list[Retrieved], offered: Tensor, exchange: Exchange, *, k: int) -> Shared:
    """The rest of `share`; `offered` `[G, n, k]` are the scores that every rank found for this rank's queries."""
    own_length = offered.shape[1]
    smallest = offered.movedim(0, 1).flatten(1).topk(k, dim=-1).values[:, -1]
    better, equal = (offered > smallest[:, None]), (offered == smallest[:, None])
    is_tied = ((better | equal).sum(dim=(0, 2)) > k) & (smallest != NOTHING)
    thresholds, ties = _gather_thresholds(smallest, is_tied, exchange)
    holds = (better | equal & (offered != NOTHING)).any(dim=-1)  # [G, n]
    orders = [torch.zeros(own_length, dtype=torch.int64, device=smallest.device) for _ in found]
    if bool(ties.any()):
        places = k - better[:, is_tied].sum(dim=(0, 2))
        mine, theirs = _decide_ties(found, thresholds, ties, places, exchange)
        for order, tie, decided in zip(orders, ties, theirs, strict=True):
            order[tie] = decided
        holds[:, is_tied] = better[:, is_tied].any(dim=-1) | mine
    keys = [sort_keys(threshold, order) for threshold, order in zip(thresholds, orders, strict=True)]
    return Shared(
        [Winners.of(retrieved, key) for retrieved, key in zip(found, keys, strict=True)],
        [held.nonzero()[:, 0] for held in holds],
    )


def _gather_thresholds(smallest: Tensor, is_tied: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Every rank's `k`-th best scores, float32 `[G, n]`, and where equal ones straddle it, bool `[G, n]`; 5 bytes."""
    packed = torch.cat([smallest[:, None].view(torch.uint8), is_tied[:, None].to(torch.uint8)], dim=-1)
    gathered = exchange.all_gather(packed, purpose="thresholds")()
    return gathered[..., :4].contiguous().view(torch.float32)[..., 0], gathered[..., 4].bool()


def _decide_ties(
    found: list[Retrieved], thresholds: Tensor, ties: Tensor, places: Tensor, exchange: Exchange
) -> tuple[Tensor, list[Tensor]]:
    """Decides between equal scores by their orders.

    Args:
        found: As in `share`.
        thresholds: Every rank's `k`-th best scores, float32 `[G, n]`.
        ties: Which queries of every rank are to be decided, bool `[G, n]`.
        places: How many of the equal ones are kept, for each such query of this rank, int64 `[u]`.
        exchange: The group.

    Returns:
        Which ranks hold a kept one of this rank's queries, bool `[G, u]`, and the smallest order kept of every rank's
        queries, int64 `[u_g]` each.
    """
    parts = []
    for retrieved, threshold, tie in zip(found, thresholds, ties, strict=True):
        keys, scores = retrieved.keys.flatten(0, 2)[tie], retrieved.scores.flatten(0, 2)[tie]
        order = (keys - sort_keys(scores, torch.zeros_like(keys))).to(torch.int32)
        parts.append(order.masked_fill(scores != threshold[tie][:, None], _NO_ORDER))
    own = len(places)
    offered = torch.stack(exchange.all_to_all(parts, rows=[own] * exchange.size, purpose="ties")())  # [G, u, k]
    ordered = offered.movedim(0, 1).flatten(1).sort(dim=-1, descending=True).values
    smallest = ordered.gather(1, places[:, None] - 1)[:, 0]
    rows = ties.sum(dim=-1).tolist()
    decided = exchange.all_to_all([smallest] * exchange.size, rows=rows, purpose="ties")()
    return (offered >= smallest[:, None]).any(dim=-1), [order.long() for order in decided]
