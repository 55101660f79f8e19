"""One read of a memory layer with gradients into the queries, by the ranks of a memory group together.

One rank alone is a group of one: the same road, without traffic. For every block of queries:

    1. gather the block's queries of all ranks;
    2. each rank searches its own shard for its best `k` chunks of every query;
    3. give every query's owner the scores of what was found; it tells all ranks the `k`-th best;
    4. each rank attends to those of its chunks that reach it;
    5. give the owner the partial results (maximum, sum, weighted values); it adds them up.

Backward: the owner gives each query's gradient to the ranks that hold chunks it read; they attend backward and give
partial gradients back. No key or value travels, and nothing to or from a rank that holds nothing a query read.

Shapes: `G` ranks of the group, `B` rows, `H` query heads, `T` segment tokens, `t` of a block, `D` head size, `n` units
of a block of one rank (`pipeline.memory.pools`), `u` queries of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.memory.attend import Partial, attend, attend_backward, combine
from pipeline.memory.bank import LayerStore, MemoryBank
from pipeline.memory.exchange import Exchange
from pipeline.memory.layer import NOTHING, Geometry, LayerView, Queries
from pipeline.memory.pools import Pools
from pipeline.memory.search import search
from pipeline.memory.segment import Reading, ReadSettings, SegmentView
from pipeline.memory.window import attend_window, attend_window_backward
from pipeline.memory.winners import Shared, Winners, share
from pipeline.positions import PositionRule


@dataclass(frozen=True)
class Window:
    """The recent window of every rank's segment, as this shard holds it.

    Attributes:
        segments: Its slots here, for each rank.
        views: Of one memory layer.
        answers: For which ranks' queries this shard holds some of it.
        holders: Which ranks hold some of this rank's own.
    """

    segments: list[SegmentView]
    answers: list[bool]
    holders: list[bool]
    views: list[LayerView] = field(default_factory=list)

    @classmethod
    def of(cls, bank: MemoryBank, settings: ReadSettings, readings: list[Reading], exchange: Exchange) -> Window:
        """Finds out who holds what. Collective: every rank of the group."""
        true = PositionRule("true")
        segments = [SegmentView(bank, settings, each, true, is_window=True) for each in readings]
        answers = [bool(segment.runs) for segment in segments]
        if exchange.size == 1:
            return cls(segments, answers, answers)
        held = exchange.all_gather(torch.tensor(answers, dtype=torch.uint8, device=bank.device), purpose="window")()
        return cls(segments, answers, held[:, exchange.rank].bool().tolist())

    def of_layer(self, store: LayerStore, geometry: Geometry) -> Window:
        """The same with views of a memory layer."""
        return replace(self, views=[LayerView(segment, store, geometry) for segment in self.segments])


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
class GroupRead:
    """One memory layer, as the segments of all ranks of the group see this rank's shard of it.

    Attributes:
        views: Of each rank's segment.
        window: The recent window of each; None: there is none.
        exchange: The group.
        observe_ages: As in `BankReader`.
        kept: What the blocks of an earlier read of the same queries chose, or a place for it; None: nothing is kept.
    """

    views: list[LayerView]
    window: Window | None
    exchange: Exchange
    observe_ages: Callable[[Tensor], None] | None
    kept: list[Shared] | None = None

    @property
    def own(self) -> LayerView:
        """As this rank's own segment sees it."""
        return self.views[self.exchange.rank]

    @property
    def pools(self) -> list[Pools]:
        """How units are sorted for what is retrieved and, if there is one, for the window."""
        searched = self.own.segment.pools
        return [searched] if self.window is None else [searched, self.window.segments[self.exchange.rank].pools]

    def blocks(self, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of a segment's queries `[B, H, T, D]`, gathered from all ranks, `[G, B, H, t, D]`.

        The next block travels while the caller works on this one.
        """
        size, length = self.own.segment.settings.query_block_tokens, query.shape[2]
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

    @property
    def is_waited_for(self) -> bool:
        """Whether the host, which nobody else asks for anything, should not wait for the device that searches."""
        return self.exchange.size == 1 and self.own.segment.device.type != "cpu"

    def choose(self, number: int, queries: list[Queries], unsure: list[Tensor] | None) -> Callable[[], Shared]:
        """Starts to find out what a block reads, or remembers it; `unsure` as in `search`."""
        if self.kept is not None and number < len(self.kept):
            known = self.kept[number]
            return lambda: known
        found = [search(view, own, unsure=unsure) for view, own in zip(self.views, queries, strict=True)]
        k = self.own.segment.settings.top_k_chunks
        return share(found, self.exchange, k=k, is_waited_for=self.is_waited_for)

    def attend(self, block: _Block, queries: list[Queries]) -> list[Tensor]:
        """What this shard finds for every rank, packed: of `m` units, then of `n` where it holds some of the window."""
        parts = []
        for rank, (view, own, winners) in enumerate(zip(self.views, queries, block.shared.winners, strict=True)):
            found = [attend(view, own, winners).packed()]
            if self.window is not None and self.window.answers[rank]:
                recent = self.window.views[rank]
                found.append(attend_window(recent, recent.queries(block.query[rank], block.tokens)).packed())
            parts.append(torch.cat(found) if len(found) > 1 else found[0])
        return parts

    def attend_backward(self, block: _Block, received: list[Tensor]) -> list[Tensor]:
        """Gradients of the queries in `attend`, from what `send_back` sent, in the same order."""
        parts, dim = [], block.query.shape[-1]
        queries = self.queries(block.tokens, block.query)
        for rank, (view, own, winners, rows) in enumerate(
            zip(self.views, queries, block.shared.winners, received, strict=True)
        ):
            of_winners, of_window = rows.split([len(winners.members), len(rows) - len(winners.members)])
            found = [attend_backward(view, own, winners, **_unpacked(of_winners, dim))]
            if self.window is not None and len(of_window):
                recent = self.window.views[rank]
                asked = recent.queries(block.query[rank], block.tokens)
                found.append(attend_window_backward(recent, asked, **_unpacked(of_window, dim)))
            parts.append(torch.cat(found) if len(found) > 1 else found[0])
        return parts

    def observe(self, blocks: list[_Block]) -> None:
        """Tells how far back the chunks lie that were chosen here."""
        for block in blocks if self.observe_ages is not None else []:
            queries = self.queries(block.tokens, block.query)
            for view, own, winners in zip(self.views, queries, block.shared.winners, strict=True):
                ages = view.token_distance(own, winners.members, winners.slots)[..., 0]
                self.observe_ages(ages[winners.valid])  # type: ignore[misc]

    def to_owners(self, block: _Block, parts: list[Tensor], *, purpose: str) -> Callable[[], list[list[Tensor]]]:
        """Starts to give what this shard found out for the queries of every rank to that rank.

        Args:
            block: The block.
            parts: For each rank what `attend` or `attend_backward` gives.
            purpose: What the bytes are counted under.

        Returns:
            Waits for, and returns, what every rank found out: what was retrieved `[m, ...]`, and `[n, ...]` of the
            window, empty where that rank holds none.
        """
        own, sizes = self._units(block), [len(held) for held in block.shared.holders]
        holds = [False] * len(sizes) if self.window is None else self.window.holders
        rows = [size + own * held for size, held in zip(sizes, holds, strict=True)]
        waiting = self.exchange.all_to_all(parts, rows=rows, purpose=purpose)
        return lambda: [list(part.split([size, len(part) - size])) for part, size in zip(waiting(), sizes, strict=True)]

    def send_back(self, block: _Block, packed: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Starts to give gradients of this rank's queries to the ranks that hold what they read.

        Args:
            block: The block.
            packed: Of what was retrieved and, if there is one, of the window, `[B, H, T, D + 2]` each.

        Returns:
            Waits for, and returns, what every rank sent: `[m, u, D + 2]`, then `[n, u, D + 2]` if this shard holds some
            of its window.
        """
        rows = [p.by_pool(x[:, :, block.tokens]).flatten(0, 2) for p, x in zip(self.pools, packed, strict=True)]
        parts = [rows[0][held] for held in block.shared.holders]
        sizes = [len(winners.members) for winners in block.shared.winners]
        if self.window is not None:
            parts = [
                torch.cat([part, rows[1]]) if holds else part
                for part, holds in zip(parts, self.window.holders, strict=True)
            ]
            own = self._units(block)
            sizes = [size + own * answers for size, answers in zip(sizes, self.window.answers, strict=True)]
        return self.exchange.all_to_all(parts, rows=sizes, purpose="gradients")

    def _units(self, block: _Block) -> int:
        """`n` of the window, of every rank alike; 0 without one."""
        _, num_rows, num_heads, num_tokens, _ = block.query.shape
        return self.pools[-1].num_units(num_rows, num_heads=num_heads, num_tokens=num_tokens)


def _unpacked(rows: Tensor, dim: int) -> dict[str, Tensor]:
    """Undoes the packing of gradients `[n, u, D + 2]`."""
    return {"grad": rows[..., :dim], "offset": rows[..., dim], "log_sum_exp": rows[..., dim + 1]}


def read(query: Tensor, group: GroupRead) -> tuple[Tensor, ...]:
    """Searches and attends; gradients flow into the query. Collective: every rank of the group, and backward too.

    Args:
        query: This rank's unrotated queries, float32 `[B, H, T, D]`, on the bank's device.
        group: The memory layer.

    Returns:
        Values `[B, H, T, D]` and log-sum-exp `[B, H, T]` of what was retrieved, then of the window if there is one.
    """
    results: tuple[Tensor, ...] = _Read.apply(query, group)
    return results


def _forward(query: Tensor, group: GroupRead, unsure: list[Tensor] | None) -> tuple[list[Tensor], list[_Block]]:
    """What `read` returns, and what its backward pass needs. Scores and partial results travel while it works on.

    `unsure` as in `search`.
    """
    results = [
        x for _ in group.pools for x in (torch.empty_like(query), query.new_empty(query.shape[:-1]))
    ]  # values and log-sum-exp of what was retrieved, and of the window
    blocks: list[_Block] = []
    on_the_way: list[tuple[_Block, Callable[[], list[list[Tensor]]]]] = []

    def land() -> None:
        block, wait = on_the_way.pop(0)
        received = wait()
        for kind, pools in enumerate(group.pools):
            parts = [(part[kind], held) for part, held in zip(received, block.shared.holders, strict=True)]
            if kind == 1:
                parts = [(part, torch.arange(len(part), device=part.device)) for part, _ in parts]
            sizes = {"num_heads": query.shape[1], "num_tokens": block.tokens.stop - block.tokens.start}
            num_units = pools.num_units(len(query), **sizes)
            partial = combine(
                [Partial.unpacked(part) for part, _ in parts], [members for _, members in parts], num_units
            )
            total = partial.total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 only where nothing is visible
            values, log_sum_exp = results[2 * kind : 2 * kind + 2]
            values[:, :, block.tokens] = pools.by_row(partial.weighted / total[..., None], **sizes)
            log_sum_exp[:, :, block.tokens] = pools.by_row(partial.maximum + total.log(), **sizes)

    def read(tokens: slice, gathered: Tensor, queries: list[Queries], sharing: Callable[[], Shared]) -> None:
        block = _Block(tokens, gathered, sharing())
        on_the_way.append((block, group.to_owners(block, group.attend(block, queries), purpose="partials")))
        if len(on_the_way) > 1:
            land()
        blocks.append(block)

    searched: tuple[slice, Tensor, list[Queries], Callable[[], Shared]] | None = None
    for number, (tokens, gathered) in enumerate(group.blocks(query)):
        queries = group.queries(tokens, gathered)
        sharing = group.choose(number, queries, unsure)
        if searched is not None:
            read(*searched)
        searched = (tokens, gathered, queries, sharing)
    assert searched is not None
    read(*searched)
    land()
    return results, blocks


class _Read(torch.autograd.Function):
    """Search and attention, with what was chosen kept between them and their gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, group: GroupRead) -> tuple[Tensor, ...]:
        unsure: list[Tensor] | None = [] if group.is_waited_for else None
        results, blocks = _forward(query, group, unsure)
        if unsure and bool(torch.stack(unsure).any()):  # the host's only wait
            results, blocks = _forward(query, group, None)
        if not group.kept:
            group.observe(blocks)
            if group.kept is not None:
                group.kept.extend(block.shared for block in blocks)
        ctx.save_for_backward(*results, *(tensor for block in blocks for tensor in block.tensors()))
        ctx.group, ctx.tokens = group, [block.tokens for block in blocks]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group: GroupRead = ctx.group
        saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
        results, kept = saved[: len(grads)], saved[len(grads) :]
        each = len(kept) // len(ctx.tokens)
        blocks = [_Block.of(tokens, kept[i * each : (i + 1) * each]) for i, tokens in enumerate(ctx.tokens)]
        packed = [_packed_gradients(*results[at : at + 2], *grads[at : at + 2]) for at in range(0, len(grads), 2)]
        grad_query = torch.empty_like(results[0])
        on_the_way: list[tuple[_Block, Callable[[], list[list[Tensor]]]]] = []

        def land() -> None:
            block, wait = on_the_way.pop(0)
            received = wait()
            sizes = {"num_heads": grad_query.shape[1], "num_tokens": block.tokens.stop - block.tokens.start}
            of_kinds = []
            for kind, pools in enumerate(group.pools):
                num_units = pools.num_units(len(grad_query), **sizes)
                rows = grad_query.new_zeros(num_units, *received[0][0].shape[1:])
                for part, held in zip(received, block.shared.holders, strict=True):
                    if kind == 0:
                        rows[held] += part[0]
                    elif len(part[1]):
                        rows += part[1]
                of_kinds.append(pools.by_row(rows, **sizes))
            grad_query[:, :, block.tokens] = of_kinds[0] if len(of_kinds) == 1 else of_kinds[0] + of_kinds[1]

        waiting = group.send_back(blocks[0], packed)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            received = waiting()
            if following is not None:
                waiting = group.send_back(following, packed)
            parts = group.attend_backward(block, received)
            on_the_way.append((block, group.to_owners(block, parts, purpose="query_gradients")))
            if len(on_the_way) > 1:
                land()
        land()
        return grad_query, None


def _packed_gradients(values: Tensor, log_sum_exp: Tensor, grad_values: Tensor, grad_lse: Tensor) -> Tensor:
    """What a holder needs of each query to attend backward, `[B, H, T, D + 2]`.

    d loss / d logit_j = p_j (grad . value_j + offset): the softmax's own term and the log-sum-exp's gradient.
    """
    offset = torch.where(log_sum_exp != NOTHING, grad_lse, 0.0) - (grad_values * values).sum(dim=-1)
    return torch.cat([grad_values, offset[..., None], log_sum_exp[..., None]], dim=-1)
