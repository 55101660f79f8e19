"""Reading memory with gradients into the queries, by the ranks of a memory group together.

One rank alone is a group of one: the same road, without traffic. For every block of queries:

    1. gather the block's queries of all ranks;
    2. each rank searches its own shard for its best `k` chunks of every query;
    3. give every query's owner the keys (score and order) of what was found; it tells all ranks the `k`-th best key;
    4. each rank attends to those of its chunks that reach it;
    5. give the owner the partial results (maximum, sum, weighted values); it adds them up.

Backward: gather queries and gradients, attend backward, give the owner the partial gradients. No key or value travels.

Shapes: `G` ranks of the group, `B` lanes, `H` query heads, `T` segment tokens, `t` of a block, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.memory.attend import Partial, attend, attend_backward, combine, token_distance
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Alone, Exchange
from pipeline.memory.search import NOTHING, Retrieved, search
from pipeline.memory.view import Geometry, MemoryView, ReadSettings

AgeObserver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class MemoryRead:
    """What a memory layer reads.

    Attributes:
        values: Attention over the retrieved tokens, `[B, H, T, D]`, dtype of the query; 0 where nothing is visible.
        log_sum_exp: Of the retrieved tokens' logits, float32 `[B, H, T]`; `-inf` where nothing is visible.
    """

    values: Tensor
    log_sum_exp: Tensor


class BankReader:
    """Reads the bank of a memory group for the queries of one segment of each rank. Never writes.

    Collective: every rank of the group must make one together.

    Args:
        bank: This rank's shard; must not change between a read and its backward pass.
        settings: How memory is read.
        geometries: The attention of each memory layer.
        start: Lane position of this rank's segment; only what came before is visible. The other ranks' segments lie
            next to it, in rank order.
        documents: Document of each token of this rank's segment, int64 `[B, T]`.
        exchange: The group.
        observe_ages: Called with the memory layer and the distance, in tokens, to the first token of every chunk
            retrieved from this shard (int64, flat); for statistics. None: not called.
        timed: Context manager that each read runs in (a timer).
    """

    def __init__(
        self,
        bank: MemoryBank,
        settings: ReadSettings,
        geometries: Sequence[Geometry],
        *,
        start: int,
        documents: Tensor,
        exchange: Exchange | None = None,
        observe_ages: AgeObserver | None = None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.bank, self.settings, self.geometries = bank, settings, geometries
        self.exchange = exchange or Alone()
        self.observe_ages, self.timed = observe_ages, timed
        first = start - self.exchange.rank * documents.shape[1]
        self._starts = [first + rank * documents.shape[1] for rank in range(self.exchange.size)]
        self._documents = documents.to(bank.device)[None].expand(self.exchange.size, -1, -1)
        if settings.scope == "document":
            self._documents = self.exchange.all_gather(documents.to(bank.device), purpose="documents")()

    def read(self, layer: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer; gradients flow into the query.

        Collective: every rank of the group must call it together, and its backward pass too.

        Args:
            layer: Memory layer, counted from 0.
            query: Unrotated queries `[B, H, T, D]`, any floating dtype.

        Returns:
            Values and log-sum-exp, on the query's device.
        """
        with self.timed():
            views = [
                MemoryView(self.bank, layer, self.settings, self.geometries[layer], start=start, documents=documents)
                for start, documents in zip(self._starts, self._documents, strict=True)
            ]
            observe = self.observe_ages
            group = _Group(views, self.exchange, None if observe is None else lambda ages: observe(layer, ages))
            values, log_sum_exp = _Read.apply(query.to(self.bank.device, torch.float32), group)
            return MemoryRead(values.to(query.device, query.dtype), log_sum_exp.to(query.device))


@dataclass(frozen=True)
class _Group:
    """One memory layer, as the segments of all ranks of the group see this rank's shard of it."""

    views: list[MemoryView]
    exchange: Exchange
    observe_ages: Callable[[Tensor], None] | None

    @property
    def own(self) -> MemoryView:
        return self.views[self.exchange.rank]

    def blocks(self, x: Tensor, *, purpose: str) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of a segment's tensor `[B, H, T, ...]`, gathered from all ranks, `[G, B, H, t, ...]`.

        The next block travels while the caller works on this one.
        """
        size, length = self.own.settings.query_block_tokens, x.shape[2]
        blocks = [slice(first, min(first + size, length)) for first in range(0, length, size)]
        waiting = self.exchange.all_gather(x[:, :, blocks[0]], purpose=purpose)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            gathered = waiting()
            if following is not None:
                waiting = self.exchange.all_gather(x[:, :, following], purpose=purpose)
            yield block, gathered

    def keep_winners(self, found: list[Retrieved]) -> list[Retrieved]:
        """Of what this shard found for the queries of every rank, what belongs to the best `k` of the whole group."""
        if self.exchange.size == 1:
            return found
        k = self.own.settings.top_k_chunks
        found = [retrieved.padded(k) for retrieved in found]
        offered = self.exchange.all_to_all(torch.stack([retrieved.keys for retrieved in found]), purpose="scores")
        threshold = offered.movedim(0, -2).flatten(-2).topk(k, dim=-1).values[..., -1]  # [Hkv, R, N]
        thresholds = self.exchange.all_gather(threshold, purpose="thresholds")()
        return [retrieved.at_least(smallest) for retrieved, smallest in zip(found, thresholds, strict=True)]

    def add_up(self, partials: list[Partial]) -> Partial:
        """The attention of this rank's own queries over the shards of all ranks."""
        if self.exchange.size == 1:
            return partials[0]
        packed = torch.stack([partial.packed() for partial in partials])
        return combine([Partial.unpacked(part) for part in self.exchange.all_to_all(packed, purpose="partials")])


class _Read(torch.autograd.Function):
    """Search and attention; which chunks were retrieved is kept for the backward pass, keys and values are not."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
        values, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[:-1])
        kept: list[list[Retrieved]] = []
        for tokens, gathered in group.blocks(query, purpose="queries"):
            queries = [view.queries(block, tokens) for view, block in zip(group.views, gathered, strict=True)]
            found = [search(view, block) for view, block in zip(group.views, queries, strict=True)]
            found = group.keep_winners(found)
            work = list(zip(group.views, queries, found, strict=True))
            partial = group.add_up([attend(view, block, retrieved) for view, block, retrieved in work])
            total = partial.total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 only where nothing is visible
            sizes = {"num_lanes": query.shape[0], "num_tokens": tokens.stop - tokens.start}
            values[:, :, tokens] = group.own.ungroup(partial.weighted / total[..., None], **sizes)
            log_sum_exp[:, :, tokens] = group.own.ungroup(partial.maximum + total.log(), **sizes)
            kept.append(found)
            if group.observe_ages is not None:
                for view, block, retrieved in work:
                    group.observe_ages(token_distance(view, block, retrieved)[..., 0][retrieved.valid])
        ctx.save_for_backward(query, values, log_sum_exp)
        ctx.group, ctx.kept = group, kept
        return values, log_sum_exp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, values, log_sum_exp = ctx.saved_tensors
        group: _Group = ctx.group
        grad_values, grad_lse = grads
        visible = log_sum_exp != NOTHING
        # d loss / d logit_j = p_j (grad . value_j + offset): the softmax's own term and the log-sum-exp's gradient.
        offset = torch.where(visible, grad_lse, 0.0) - (grad_values * values).sum(dim=-1)
        finite = torch.where(visible, log_sum_exp, 0.0)
        packed = torch.cat([query, grad_values, offset[..., None], finite[..., None]], dim=-1)
        dim, num_lanes = query.shape[-1], query.shape[0]
        grad_query = torch.empty_like(query)
        for (tokens, gathered), found in zip(group.blocks(packed, purpose="gradients"), ctx.kept, strict=True):
            parts = []
            for view, block, retrieved in zip(group.views, gathered, found, strict=True):
                grad_far, grad_near = attend_backward(
                    view,
                    view.queries(block[..., :dim], tokens),
                    retrieved,
                    grad=view.group(block[..., dim : 2 * dim]),
                    offset=view.group(block[..., 2 * dim]),
                    log_sum_exp=view.group(block[..., 2 * dim + 1]),
                )
                parts.append(view.queries_backward(grad_far, grad_near, tokens, num_lanes=num_lanes))
            received = group.exchange.all_to_all(torch.stack(parts), purpose="query_gradients")
            grad_query[:, :, tokens] = received.sum(dim=0)
        return grad_query, None
