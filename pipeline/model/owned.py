"""Which banks rows add to: a row's own, until rows part; what they read alike afterwards is put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from pipeline.memory.place import ring_chunks
from pipeline.memory.sources import Source
from pipeline.model.longmem import LongMem


@dataclass
class Row:
    """Where a row stands.

    Attributes:
        sources: What it remembers, the oldest first. Rows that have read the same hold the same.
        place: Lane position of the first token of its open segment.
        num_tokens: How far back its memory reaches.
        recent: The newest tokens, the last one last: the open segment's, and the left context before them.
    """

    sources: tuple[Source, ...]
    place: int
    num_tokens: int
    recent: list[int] = field(default_factory=list)

    def move(self, num_tokens: int) -> None:
        """Goes on behind so many tokens, and lets go of banks that end before what is remembered."""
        self.place += num_tokens
        self.sources = tuple(source for source in self.sources if source.end > self.place - self.num_tokens)


def own_bank(model: LongMem, rows: Sequence[Row], number: int, *, num_tokens: int) -> MemoryBank:
    """The bank that a row alone adds to, with room for so many tokens more, or for all that is remembered.

    Args:
        model: Backbone and SideNet.
        rows: All rows.
        number: Which of them.
        num_tokens: Tokens that will be added.

    Returns:
        The bank, which is among the row's sources.
    """
    row = rows[number]
    own = row.sources[-1] if row.sources else None
    if own is None or not own.is_open or sum(own in other.sources for other in rows) > 1:
        own = Source(model.bank(1, num_tokens=min(row.num_tokens, num_tokens)), is_open=True)
        row.sources = (*row.sources, own)
    bank = _with_room(model, own.bank, num_tokens, most=row.num_tokens)
    row.sources = (*row.sources[:-1], replace(own, bank=bank))
    return bank


def put_together(model: LongMem, rows: Sequence[Row]) -> None:
    """Adds what rows hold in common to what the same rows held in common before."""
    while (pair := _alike(rows)) is not None:
        older, newer = pair
        holders = [row for row in rows if older in row.sources]
        whole = replace(older, bank=_extended(model, older.bank, newer.bank, most=holders[0].num_tokens))
        for row in holders:
            row.sources = tuple(whole if source == older else source for source in row.sources if source != newer)


def _alike(rows: Sequence[Row]) -> tuple[Source, Source] | None:
    """Two banks, one after the other, that the same rows hold and add to."""
    for row in rows:
        for older, newer in zip(row.sources, row.sources[1:], strict=False):
            is_alike = all((older in other.sources) == (newer in other.sources) for other in rows)
            if older.is_open and newer.is_open and is_alike:
                return older, newer
    return None


def _with_room(model: LongMem, bank: MemoryBank, num_tokens: int, *, most: int) -> MemoryBank:
    """The bank, or a larger one with the same past: it doubles, so that each chunk is moved a few times at most."""
    filled = bank.num_filled * bank.shape.chunk_size
    if bank.shape.num_chunks >= _ring(model, min(most, filled + num_tokens)):
        return bank
    return bank.grown(model.bank(1, num_tokens=min(most, max(filled + num_tokens, 2 * filled))))


def _extended(model: LongMem, older: MemoryBank, newer: MemoryBank, *, most: int) -> MemoryBank:
    """A bank with the past of both, in which nothing lies between them."""
    slots, num_tokens = newer.filled(), newer.num_filled * newer.shape.chunk_size
    bank = _with_room(model, older, num_tokens, most=most)
    there = slots.to(newer.device)
    memory = [(_in_a_row(store.keys[:, :, there]), _in_a_row(store.values[:, :, there])) for store in newer.layers]
    documents = torch.zeros(1, num_tokens, dtype=torch.int64, device=newer.device)
    bank.append(memory, start=int(newer.positions[slots[0]]), documents=documents)
    return bank


def _in_a_row(chunks: Tensor) -> Tensor:
    """Chunks `[Hkv, 1, F, c, D]` as tokens, `[1, Hkv, F * c, D]`."""
    return chunks.flatten(2, 3).transpose(0, 1)


def _ring(model: LongMem, num_tokens: int) -> int:
    settings = model.settings
    return ring_chunks(
        num_tokens, segment_tokens=settings.segment_tokens, chunk_size=settings.memory.chunk_size, group_size=1
    )
