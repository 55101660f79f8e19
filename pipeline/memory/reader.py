"""Reading memory with gradients into the queries, by the ranks of a memory group together.

One rank alone is a group of one: the same road, without traffic. For every block of queries:

    1. gather the block's queries of all ranks;
    2. each rank searches its own shard for its best `k` chunks of every query;
    3. give every query's owner the scores of what was found; it tells all ranks the `k`-th best;
    4. each rank attends to those of its chunks that reach it;
    5. give the owner the partial results (maximum, sum, weighted values); it adds them up.

Backward: the owner gives each query's gradient to the ranks that hold chunks it read; they attend backward and give
partial gradients back. No key or value travels, and nothing to or from a rank that holds nothing a query read.

Shapes: `G` ranks of the group, `B` lanes, `H` query heads, `T` segment tokens, `t` of a block, `D` head size,
`n = B H t` queries of a block of one rank.
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
from pipeline.memory.search import NOTHING, search
from pipeline.memory.view import Geometry, MemoryView, Queries, ReadSettings
from pipeline.memory.winners import Shared, Winners, share

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
        observe_ages: Called with a memory layer's index and the distance, in tokens, to the first token of every chunk
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

    def read(self, index: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer; gradients flow into the query.

        Collective: every rank of the group must call it together, and its backward pass too.

        Args:
            index: Index of the memory layer.
            query: Unrotated queries `[B, H, T, D]`, any floating dtype.

        Returns:
            Values and log-sum-exp, on the query's device.
        """
        with self.timed():
            views = [
                MemoryView(self.bank, index, self.settings, self.geometries[index], start=start, documents=documents)
                for start, documents in zip(self._starts, self._documents, strict=True)
            ]
            observe = self.observe_ages
            group = _Group(views, self.exchange, None if observe is None else lambda ages: observe(index, ages))
            values, log_sum_exp = _Read.apply(query.to(self.bank.device, torch.float32), group)
            return MemoryRead(values.to(query.device, query.dtype), log_sum_exp.to(query.device))


@dataclass(frozen=True)
class _Block:
    """A block of queries after its search: what the backward pass needs of it. Keys and values are not kept.

    Attributes:
        tokens: Which tokens of the segment.
        query: The queries of all ranks, float32 `[G, B, H, t, D]`.
        shared: What they read, and where.
    """

    tokens: slice
    query: Tensor
    shared: Shared

    def tensors(self) -> list[Tensor]:
        """Everything in it, for autograd to keep: so activation checkpointing can drop it and read again."""
        winners = [tensor for of in self.shared.winners for tensor in (of.members, of.slots, of.counts)]
        return [self.query, *self.shared.holders, *winners]

    @classmethod
    def of(cls, tokens: slice, tensors: Sequence[Tensor]) -> _Block:
        """Undoes `tensors`."""
        query, *rest = tensors
        holders, winners = rest[: len(query)], rest[len(query) :]
        shared = Shared([Winners(*winners[first : first + 3]) for first in range(0, len(winners), 3)], holders)
        return cls(tokens, query, shared)


@dataclass(frozen=True)
class _Group:
    """One memory layer, as the segments of all ranks of the group see this rank's shard of it."""

    views: list[MemoryView]
    exchange: Exchange
    observe_ages: Callable[[Tensor], None] | None

    @property
    def own(self) -> MemoryView:
        return self.views[self.exchange.rank]

    def blocks(self, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of a segment's queries `[B, H, T, D]`, gathered from all ranks, `[G, B, H, t, D]`.

        The next block travels while the caller works on this one.
        """
        size, length = self.own.settings.query_block_tokens, query.shape[2]
        blocks = [slice(first, min(first + size, length)) for first in range(0, length, size)]
        waiting = self.exchange.all_gather(query[:, :, blocks[0]], purpose="queries")
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            gathered = waiting()
            if following is not None:
                waiting = self.exchange.all_gather(query[:, :, following], purpose="queries")
            yield block, gathered

    def queries(self, tokens: slice, gathered: Tensor) -> list[Queries]:
        """The queries of every rank `[G, B, H, t, D]`, as this shard is asked."""
        return [view.queries(query, tokens) for view, query in zip(self.views, gathered, strict=True)]

    def to_owners(self, block: _Block, parts: list[Tensor], *, purpose: str) -> Callable[[], list[Tensor]]:
        """Starts to give what this shard found out for the queries of every rank `[m, ...]` to that rank."""
        return self.exchange.all_to_all(parts, rows=[len(held) for held in block.shared.holders], purpose=purpose)

    def to_holders(self, block: _Block, x: Tensor, *, purpose: str) -> Callable[[], list[Tensor]]:
        """Starts to give rows of this rank's queries `[n, ...]` to the ranks that hold what they read."""
        rows = [len(winners.members) for winners in block.shared.winners]
        return self.exchange.all_to_all([x[held] for held in block.shared.holders], rows=rows, purpose=purpose)


class _Read(torch.autograd.Function):
    """Search and attention. Scores of a block travel while the next one is searched, partial results as well."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
        values, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[:-1])
        k, num_lanes = group.own.settings.top_k_chunks, query.shape[0]
        blocks: list[_Block] = []
        on_the_way: list[tuple[_Block, Callable[[], list[Tensor]]]] = []

        def land() -> None:
            block, wait = on_the_way.pop(0)
            sizes = {"num_lanes": num_lanes, "num_tokens": block.tokens.stop - block.tokens.start}
            num_queries = num_lanes * query.shape[1] * sizes["num_tokens"]
            partial = combine([Partial.unpacked(part) for part in wait()], block.shared.holders, num_queries)
            total = partial.total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 only where nothing is visible
            values[:, :, block.tokens] = group.own.by_query_head(partial.weighted / total[:, None], **sizes)
            log_sum_exp[:, :, block.tokens] = group.own.by_query_head(partial.maximum + total.log(), **sizes)

        def read(tokens: slice, gathered: Tensor, queries: list[Queries], sharing: Callable[[], Shared]) -> None:
            block = _Block(tokens, gathered, sharing())
            work = list(zip(group.views, queries, block.shared.winners, strict=True))
            parts = [attend(*one).packed() for one in work]
            on_the_way.append((block, group.to_owners(block, parts, purpose="partials")))
            if len(on_the_way) > 1:
                land()
            blocks.append(block)
            if group.observe_ages is not None:
                for view, own, winners in work:
                    group.observe_ages(token_distance(view, own, winners)[..., 0][winners.valid])

        searched: tuple[slice, Tensor, list[Queries], Callable[[], Shared]] | None = None
        for tokens, gathered in group.blocks(query):
            queries = group.queries(tokens, gathered)
            found = [search(view, own) for view, own in zip(group.views, queries, strict=True)]
            sharing = share(found, group.exchange, k=k)
            if searched is not None:
                read(*searched)
            searched = (tokens, gathered, queries, sharing)
        assert searched is not None
        read(*searched)
        land()
        ctx.save_for_backward(values, log_sum_exp, *(tensor for block in blocks for tensor in block.tensors()))
        ctx.group, ctx.tokens = group, [block.tokens for block in blocks]
        return values, log_sum_exp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, log_sum_exp, *kept = ctx.saved_tensors
        group: _Group = ctx.group
        each = len(kept) // len(ctx.tokens)
        blocks = [_Block.of(tokens, kept[i * each : (i + 1) * each]) for i, tokens in enumerate(ctx.tokens)]
        grad_values, grad_lse = grads
        visible = log_sum_exp != NOTHING
        # d loss / d logit_j = p_j (grad . value_j + offset): the softmax's own term and the log-sum-exp's gradient.
        offset = torch.where(visible, grad_lse, 0.0) - (grad_values * values).sum(dim=-1)
        packed = torch.cat([grad_values, offset[..., None], log_sum_exp[..., None]], dim=-1)
        grad_query, (num_lanes, _, _, dim) = torch.empty_like(values), values.shape
        on_the_way: list[tuple[_Block, Callable[[], list[Tensor]]]] = []

        def send(block: _Block) -> Callable[[], list[Tensor]]:
            rows = group.own.by_kv_head(packed[:, :, block.tokens]).flatten(0, 2)
            return group.to_holders(block, rows, purpose="gradients")

        def land() -> None:
            block, wait = on_the_way.pop(0)
            length = block.tokens.stop - block.tokens.start
            rows = values.new_zeros(num_lanes * values.shape[1] * length, dim)
            for held, part in zip(block.shared.holders, wait(), strict=True):
                rows[held] += part
            grad_query[:, :, block.tokens] = group.own.by_query_head(rows, num_lanes=num_lanes, num_tokens=length)

        waiting = send(blocks[0])
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            received = waiting()
            if following is not None:
                waiting = send(following)
            queries = group.queries(block.tokens, block.query)
            work = zip(group.views, queries, block.shared.winners, received, strict=True)
            parts = [
                attend_backward(view, own, winners, grad=row[:, :dim], offset=row[:, dim], log_sum_exp=row[:, dim + 1])
                for view, own, winners, row in work
            ]
            on_the_way.append((block, group.to_owners(block, parts, purpose="query_gradients")))
            if len(on_the_way) > 1:
                land()
        land()
        return grad_query, None
