"""One past in several banks, read as one: what was given, what rows share, what each has read since. Without gradients.

The chunks that a query reads are the best of all banks together, and what they say is one softmax, as if all lay in one
bank. While a segment is read in pieces its memory does not change, so that what depends on the segment alone (which
slots are visible, keys at their real distance) is worked out once for all pieces.

Shapes: `B` rows that stand at the same place and read the same, `H` query heads, `q` tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.memory.attend import Partial, attend, chunk_log_sum_exps, combine
from pipeline.memory.bank import MemoryBank
from pipeline.memory.layer import NOTHING, Geometry, LayerView, Queries
from pipeline.memory.quick import can_read, read_few
from pipeline.memory.reader import MemoryRead
from pipeline.memory.search import Retrieved, search
from pipeline.memory.segment import Reading, ReadSettings, SegmentView
from pipeline.memory.window import attend_window
from pipeline.memory.winners import Winners
from pipeline.positions import PositionRule


@dataclass(frozen=True)
class Source:
    """A bank of one lane.

    Attributes:
        bank: The bank.
        shift: Place, in the lane of what reads it, of the first token of its own lane.
        is_open: Whether what is read may be added to it.
    """

    bank: MemoryBank
    shift: int = 0
    is_open: bool = False

    @property
    def end(self) -> int:
        """Place after its newest token."""
        return self.shift + self.bank.end


@dataclass(frozen=True)
class ChunksRead:
    """The chunks that some queries read, `w` places for each query; not all hold one.

    Attributes:
        places: Place of each chunk's first token, int64 `[B, H, q, w]`.
        scores: What it was retrieved by, float32, same shape; `-inf` where there is no chunk.
        shares: Of a query's attention inside memory, float32, same shape; 0 where there is no chunk.
    """

    places: Tensor
    scores: Tensor
    shares: Tensor


class SourcesReader:
    """Reads some banks for the queries of one segment of each row.

    Args:
        sources: The banks; none may change while this is used.
        settings: How memory is read; as scope `lane`, for all of it is the rows' own.
        geometries: The attention of each memory layer.
        start: Place of the segment's first token: what lies at or after it is invisible.
        num_rows: `B`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: ReadSettings,
        geometries: Sequence[Geometry],
        *,
        start: int,
        num_rows: int,
    ) -> None:
        self.sources, self.geometries, self.num_rows = sources, geometries, num_rows
        self.settings, self._start = replace(settings, scope="lane"), start
        self._rules = [geometry.rule(settings.rule) for geometry in geometries]
        self._segments = {rule: self._views_of(rule, start) for rule in set(self._rules)}
        self._recent = self._views_of(PositionRule("true"), start, is_window=True) if settings.window_tokens else []
        self._layers: dict[int, tuple[list[LayerView], list[LayerView]]] = {}

    def move(self, first: int, num_tokens: int) -> None:
        """Says which tokens of the segment the next queries are: so many, from place `first` of it on."""
        documents = torch.zeros(self.num_rows, num_tokens, dtype=torch.int64)
        for segment in [*self._recent, *(view for views in self._segments.values() for view in views)]:
            segment.reading = replace(segment.reading, first=first, documents=documents)

    def read(self, index: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer.

        Args:
            index: Index of the memory layer.
            query: Unrotated queries `[B, H, q, D]`, any floating dtype.

        Returns:
            Values and log-sum-exp, on the query's device.
        """
        searched, recent = self._views(index)
        window = _nothing(query) if self.settings.window_tokens and not recent else None
        if not searched:
            return replace(_nothing(query), window=window)
        asked = query.to(searched[0].segment.device, torch.float32)
        if len(searched) == 1 and can_read(searched[0], recent, num_tokens=asked.shape[2]):
            quick = read_few(searched[0], recent, asked)
            if quick.window is not None:
                window = quick.window.to(query.device)
            return replace(quick.to(query.device), window=window)
        found, of_window = [], []
        for first in range(0, asked.shape[2], self.settings.query_block_tokens):
            block = asked[:, :, first : first + self.settings.query_block_tokens]
            tokens = slice(first, first + block.shape[2])
            found.append(_joined(searched, _retrieved(searched, block, tokens), block))
            if recent:
                whole = [attend_window(view, view.queries(block, tokens)) for view in recent]
                everyone = [torch.arange(len(part.total), device=block.device) for part in whole]
                of_window.append(_joined(recent, list(zip(whole, everyone, strict=True)), block))
        if recent:
            window = _of_blocks(of_window, query.device)
        return replace(_of_blocks(found, query.device), window=window)

    def chunks(self, index: int, query: Tensor) -> ChunksRead:
        """Which chunks `read` reads for the same queries; they are searched for once more."""
        searched, _ = self._views(index)
        size, parts = self.settings.query_block_tokens, []
        for first, block in enumerate(query.split(size, dim=2)):
            asked = block.to(searched[0].segment.device, torch.float32) if searched else block
            tokens = slice(first * size, first * size + block.shape[2])
            parts.append(_chunks_of_block(searched, asked, tokens, start=self._start))
        places, scores, log_sum_exp = (torch.cat(each, dim=2).to(query.device) for each in zip(*parts, strict=True))
        shares = torch.where(scores == NOTHING, 0.0, log_sum_exp.softmax(dim=-1))
        return ChunksRead(places, scores, shares)

    def _views(self, index: int) -> tuple[list[LayerView], list[LayerView]]:
        """Of one memory layer: what is searched, and what is read whole."""
        if index not in self._layers:
            geometry = self.geometries[index]
            stores = [source.bank.layers[index] for source in self.sources]
            searched = [
                LayerView(segment, store, geometry)
                for segment, store in zip(self._segments[self._rules[index]], stores, strict=True)
            ]
            recent = [
                LayerView(segment, store, geometry)
                for segment, store in zip(self._recent, stores, strict=bool(self._recent))
                if segment.runs
            ]
            self._layers[index] = searched, recent
        return self._layers[index]

    def _views_of(self, rule: PositionRule, start: int, *, is_window: bool = False) -> list[SegmentView]:
        documents = torch.zeros(self.num_rows, 1, dtype=torch.int64)
        found = []
        for source in self.sources:
            lanes = torch.zeros(self.num_rows, dtype=torch.int64) if self.num_rows > 1 else None
            reading = Reading(start - source.shift, documents, lane_of_row=lanes)
            found.append(SegmentView(source.bank, self.settings, reading, rule, is_window=is_window))
        return found


Found = list[tuple[Partial, Tensor]]
"""Partial attention, and which units it is of."""


class _Chosen(NamedTuple):
    """What some queries read in one bank."""

    queries: Queries
    found: Retrieved
    winners: Winners


def _chosen(views: list[LayerView], query: Tensor, tokens: slice) -> list[_Chosen]:
    """The best chunks of all banks together."""
    queries = [view.queries(query, tokens) for view in views]
    k = views[0].segment.settings.top_k_chunks
    found = [search(view, asked) for view, asked in zip(views, queries, strict=True)]
    smallest = None
    if len(found) > 1 and k:
        found = [each.padded(k) for each in found]
        # Keys of chunks are all different, for their places are: exactly k reach the k-th best.
        smallest = torch.cat([each.keys for each in found], dim=-1).topk(k, dim=-1).values[..., -1].flatten()
    winners = [Winners.of(each, smallest) for each in found]
    return [_Chosen(*each) for each in zip(queries, found, winners, strict=True)]


def _retrieved(views: list[LayerView], query: Tensor, tokens: slice) -> Found:
    """Attention to the best chunks of all banks together."""
    chosen = _chosen(views, query, tokens)
    return [
        (attend(view, of_bank.queries, of_bank.winners), of_bank.winners.members)
        for view, of_bank in zip(views, chosen, strict=True)
    ]


def _chunks_of_block(views: list[LayerView], query: Tensor, tokens: slice, *, start: int) -> list[Tensor]:
    """Places, scores and log-sum-exps of the chunks that a block of queries reads, `[B, H, t, banks * k]` each."""
    nothing = torch.full((*query.shape[:3], 0), NOTHING, device=query.device)
    found = [nothing.long(), nothing, nothing]
    for view, (queries, retrieved, winners) in zip(views, _chosen(views, query, tokens) if views else [], strict=True):
        segment, sizes = view.segment, {"num_heads": query.shape[1], "num_tokens": query.shape[2]}
        units = (segment.pools.num_units(len(query), **sizes), queries.far.shape[3], segment.settings.top_k_chunks)
        width = winners.slots.shape[1]
        of_bank = [
            segment.slot_offset[winners.slots.long()][:, None] + start,
            retrieved.scores.flatten(0, 2)[winners.members, None, :width].masked_fill(~winners.valid[:, None], NOTHING),
            chunk_log_sum_exps(view, queries, winners),
        ]
        whole = [torch.full(units, NOTHING, device=segment.device) for _ in of_bank]
        whole[0] = torch.zeros(units, dtype=torch.int64, device=segment.device)
        for into, part in zip(whole, of_bank, strict=True):
            into[winners.members, :, :width] = part
        by_row = [segment.pools.by_row(each, **sizes).to(query.device) for each in whole]
        found = [torch.cat(pair, dim=-1) for pair in zip(found, by_row, strict=True)]
    return found


def _joined(views: list[LayerView], found: Found, query: Tensor) -> MemoryRead:
    """One softmax over the parts, row by row."""
    pools, sizes = views[0].segment.pools, {"num_heads": query.shape[1], "num_tokens": query.shape[2]}
    num_units = pools.num_units(len(query), **sizes)
    whole = combine([part for part, _ in found], [members for _, members in found], num_units)
    total = whole.total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 only where nothing is visible
    values = pools.by_row(whole.weighted / total[..., None], **sizes)
    return MemoryRead(values, pools.by_row(whole.maximum + total.log(), **sizes))


def _nothing(query: Tensor) -> MemoryRead:
    """What queries read that see nothing."""
    log_sum_exp = torch.full(query.shape[:-1], NOTHING, device=query.device)
    return MemoryRead(torch.zeros_like(query, dtype=torch.float32), log_sum_exp)


def _of_blocks(blocks: Sequence[MemoryRead], device: torch.device) -> MemoryRead:
    values = torch.cat([block.values for block in blocks], dim=2).to(device)
    return MemoryRead(values, torch.cat([block.log_sum_exp for block in blocks], dim=2).to(device))
