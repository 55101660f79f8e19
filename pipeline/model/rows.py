"""Rows that read on, each at its own pace: what generation needs of a stream.

The same reading as `Stream`'s, in pieces: tokens come a few at a time, a full segment is remembered by itself, and the
next one begins with its left context, exactly as training cuts a text. Rows may stand at different places, remember
apart, share what was remembered before they parted, and be put in another order; no memory is copied for that.

Shapes: `B` rows, `q` tokens that are read now, `T` segment tokens, `N` tokens of left context, `E` hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.encoding import KeyValue
from pipeline.memory.reader import MemoryRead
from pipeline.memory.sources import ChunksRead, SourcesReader
from pipeline.model.longmem import LongMem
from pipeline.model.opened import OpenSegment, join_pasts, rows_of_past
from pipeline.model.owned import Row, own_bank, put_together
from pipeline.model.remember import remember
from pipeline.sidenet.fusion import MemoryReader
from pipeline.sidenet.past import SideNetPast


class Rows:
    """Rows that read on. Without gradients.

    Args:
        model: Backbone and SideNet.
        rows: Where they begin: each at the begin of a segment.
        reads_memory: Whether memory is read and written at all.
    """

    def __init__(self, model: LongMem, rows: Sequence[Row], *, reads_memory: bool = True) -> None:
        self.model, self.rows, self.reads_memory = model, list(rows), reads_memory
        self.open, self.past = OpenSegment.empty(len(self.rows)), SideNetPast()
        self._is_fresh = True  # whether no row has read its left context yet
        self._readers: dict[tuple[Any, ...], SourcesReader] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of open segments and of what rows have remembered, each bank once; not of what they were given."""
        banks = {source.bank for row in self.rows for source in row.sources if source.is_open}
        return self.open.num_bytes + self.past.num_bytes + sum(bank.num_bytes for bank in banks)

    @torch.inference_mode(False)  # banks that are made here must take what is read outside of it, too
    @torch.no_grad()
    def read(self, tokens: Tensor, *, wanted: int | None = None) -> Tensor:
        """Reads the next tokens of every row; whole segments go into memory.

        Args:
            tokens: int64 `[B, q]`, `q` at least 1.
            wanted: Of how many of the last tokens something is asked; None: of all. Segments of which nothing is asked
                are remembered without running the SideNet.

        Returns:
            Input of the LM head `[B, wanted, E]`.
        """
        length, segment = tokens.shape[1], self.model.settings.segment_tokens
        wanted = length if wanted is None else wanted
        found, at = [], 0
        while at < length:
            self._remember_full()
            unasked = (length - wanted - at) // segment * segment
            if unasked > 0 and self._is_fresh:
                self._pass_over(tokens[:, at : at + unasked])
                at += unasked
                continue
            piece = tokens[:, at : at + segment - max(self.open.num_tokens)]
            hidden = self._read_piece(piece, is_asked=at + piece.shape[1] > length - wanted)
            if hidden is not None:
                found.append(hidden[:, max(0, length - wanted - at) :])
            at += piece.shape[1]
        if not found:
            size = (len(self.rows), 0, self.model.backbone.hidden_size)
            return torch.zeros(size, dtype=self.model.dtype, device=tokens.device)
        return torch.cat(found, dim=1)  # made outside of inference mode: as any tensor

    def chosen(self, index: Tensor) -> Rows:
        """Some rows, each as often as it is named, int64 `[rows]`; what they remember is shared, not copied."""
        rows = [self.rows[number] for number in index.tolist()]
        chosen = Rows(
            self.model, [replace(row, recent=list(row.recent)) for row in rows], reads_memory=self.reads_memory
        )
        chosen.open, chosen._is_fresh = self.open.rows(index), self._is_fresh
        chosen.past = rows_of_past(self.past, index, max(chosen.open.num_tokens))
        chosen._readers = self._readers
        return chosen

    def apart(self) -> list[Rows]:
        """Each row alone; what several remember in common is not added to any more."""
        holders = Counter(source for row in self.rows for source in row.sources)
        for row in self.rows:
            row.sources = tuple(
                replace(source, is_open=source.is_open and holders[source] == 1) for source in row.sources
            )
        numbers = torch.arange(len(self.rows), device=self.model.device)
        alone = [self.chosen(number) for number in numbers.split(1)]
        for each in alone:
            each._readers = {}
        return alone

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        for part in parts:
            part._remember_full()
        whole = cls(first.model, [row for part in parts for row in part.rows], reads_memory=first.reads_memory)
        if all(part._is_fresh for part in parts):
            return whole  # each begins a segment, and so do all together
        for part in parts:
            part._read_context()
        whole.open, whole._is_fresh = OpenSegment.joined([part.open for part in parts]), False
        whole.past = join_pasts([part.past for part in parts], [len(part) for part in parts])
        return whole

    @torch.inference_mode()
    def _read_piece(self, tokens: Tensor, *, is_asked: bool) -> Tensor | None:
        """Reads tokens that stay within every row's segment, `[B, q, E]`; None if nothing is asked or needed later."""
        contexts = [self._context(row) for row in self.rows]
        num_context, first = len(contexts[0]), self.open.num_tokens
        if self._is_fresh and all(len(context) == num_context for context in contexts):
            before = torch.tensor(contexts, dtype=torch.int64, device=tokens.device)
            encoding = self.open.encode(self.model, torch.cat([before, tokens], dim=1), num_context=num_context)
            self._is_fresh = False
        else:
            self._read_context()
            encoding = self.open.encode(self.model, tokens)
        self._note(tokens)
        if not is_asked and min(self.open.num_tokens) == self.model.settings.segment_tokens:
            return None
        self.past.documents = self.open.columns(tokens.device)
        reader = self._reader(first, tokens.shape[1]) if self.reads_memory else None
        return self.model.hidden(encoding, reader, self.past)

    def _reader(self, first: Sequence[int], num_tokens: int) -> MemoryReader:
        """What the rows read: those that stand at the same place and remember the same, together."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (row, count) in enumerate(zip(self.rows, first, strict=True)):
            groups.setdefault((row.sources, row.place, row.num_tokens, count), []).append(number)
        readers = []
        for (sources, place, memory_tokens, count), numbers in groups.items():
            key = (sources, place, memory_tokens, numbers[0], len(numbers))
            if key not in self._readers:
                settings = replace(self.model.read_settings, num_tokens=memory_tokens)
                self._readers[key] = SourcesReader(
                    sources, settings, self.model.geometries, start=place, num_rows=len(numbers)
                )
            self._readers[key].move(count, num_tokens)
            readers.append((numbers, self._readers[key]))
        return _Groups(readers)

    def _note(self, tokens: Tensor) -> None:
        most = self.model.settings.context_tokens + self.model.settings.segment_tokens
        for row, new in zip(self.rows, tokens.tolist(), strict=True):
            row.recent = [*row.recent, *new][-most:]

    def _read_context(self) -> None:
        """Reads the left context of rows that begin a segment, where they do not do it together with its tokens."""
        if not self._is_fresh:
            return
        parts = [self._opened(number) for number in range(len(self.rows))]
        self.open, self.past, self._is_fresh = OpenSegment.joined(parts), SideNetPast(), False

    def _opened(self, number: int) -> OpenSegment:
        """The open segment of a row that has read its left context and nothing else."""
        context, opened = self._context(self.rows[number]), OpenSegment.empty(1)
        if context:
            before = torch.tensor([context], dtype=torch.int64, device=self.model.device)
            opened.encode(self.model, before, num_context=len(context))
        return opened

    def _context(self, row: Row) -> list[int]:
        """The left context of a segment that a row begins."""
        return row.recent[len(row.recent) - min(self.model.settings.context_tokens, len(row.recent)) :]

    def _remember_full(self) -> None:
        """Remembers full segments; their rows begin new ones."""
        segment = self.model.settings.segment_tokens
        full = [number for number, count in enumerate(self.open.num_tokens) if count == segment]
        if not full:
            return
        put_together(self.model, self.rows)
        for number in full:
            self._append(number, [KeyValue(*(x[number : number + 1] for x in kv)) for kv in self.open.memory])
        self._readers.clear()
        if len(full) == len(self.rows):
            self.open, self.past, self._is_fresh = OpenSegment.empty(len(self.rows)), SideNetPast(), True
            return
        every = torch.arange(len(self.rows), device=self.model.device)
        parts, pasts = [], []
        for number in range(len(self.rows)):
            if number in full:
                parts.append(self._opened(number))
                pasts.append(SideNetPast())
            else:
                one = every[number : number + 1]
                parts.append(self.open.rows(one))
                pasts.append(rows_of_past(self.past, one, parts[-1].num_tokens[0]))
        self.open, self.past = OpenSegment.joined(parts), join_pasts(pasts, [1] * len(parts))

    def _append(self, number: int, memory: Sequence[KeyValue]) -> None:
        row, tokens = self.rows[number], self.model.settings.segment_tokens
        if self.reads_memory:
            documents = torch.zeros(1, tokens, dtype=torch.int64, device=self.model.device)
            bank = own_bank(self.model, self.rows, number, num_tokens=tokens)
            bank.append([(kv.key, kv.value) for kv in memory], start=row.place, documents=documents)
        row.move(tokens)

    def _pass_over(self, tokens: Tensor) -> None:
        """Remembers whole segments of every row, of which nothing is asked."""
        for number, (row, own) in enumerate(zip(self.rows, tokens, strict=True)):
            if self.reads_memory:
                before = torch.tensor(self._context(row), dtype=torch.int64, device=own.device)
                bank = own_bank(self.model, self.rows, number, num_tokens=len(own))
                remember(self.model, bank, own, start=row.place, before=before)
            row.move(len(own))
        self._readers.clear()
        self._note(tokens)


@dataclass(frozen=True)
class _Groups:
    """Readers of some rows each, as one of all."""

    readers: Sequence[tuple[Sequence[int], SourcesReader]]

    def read(self, index: int, query: Tensor) -> MemoryRead:
        if len(self.readers) == 1:
            return self.readers[0][1].read(index, query)
        parts = [reader.read(index, query[list(numbers)]) for numbers, reader in self.readers]
        order = torch.tensor([number for numbers, _ in self.readers for number in numbers]).argsort()
        whole = _below(parts, order.to(query.device))
        windows = [part.window for part in parts if part.window is not None]
        return replace(whole, window=_below(windows, order.to(query.device)) if windows else None)

    def chunks(self, index: int, query: Tensor) -> ChunksRead:
        """As `SourcesReader.chunks`, of rows that read alike."""
        ((_, reader),) = self.readers
        return reader.chunks(index, query)


def _below(parts: Sequence[MemoryRead], order: Tensor) -> MemoryRead:
    values, log_sum_exp = (
        torch.cat([getattr(part, name) for part in parts])[order] for name in ("values", "log_sum_exp")
    )
    return MemoryRead(values, log_sum_exp)
