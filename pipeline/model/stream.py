"""Rows that read on: the one place that joins encoding, remembering, reading memory and scoring.

Training, replay, evaluation, benches and tests all read this way, so that the same text cut into the same segments
gives the same numbers everywhere. Reading never writes: only `remember` changes what is remembered. A segment is
remembered before it is read for, because in a memory group it is part of what the next rank's segment reads.

Shapes: `B` rows, `T` segment tokens, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.backbone.encoding import Encoding
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Alone, Exchange
from pipeline.memory.place import Turn
from pipeline.memory.reader import AgeObserver, MemoryRead
from pipeline.model.longmem import LongMem
from pipeline.sidenet.fusion import MemoryReader

Memory = Literal["own", "none"] | Tensor
"""Whose memory rows read: each its own, none, or that of a lane of the bank, int64 `[B]`; many may read one."""
_NOBODYS = -3  # document of a query that nobody asks: no chunk has it
Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Seen:
    """A segment of every row, as the backbone has encoded it.

    Attributes:
        encoding: What the backbone says of it.
        documents: Document of each token, int64 `[B, T]`.
        start: Lane position of its first token; what is read for it lies before.
    """

    encoding: Encoding
    documents: Tensor
    start: int


class Stream:
    """Rows that read on, with their memory and the place where they are.

    Args:
        model: Backbone and SideNet.
        bank: This rank's shard of the rows' memory; None: nothing is remembered.
        exchange: The memory group, whose ranks take segments in turn; None: this rank alone.
        scope: Which past a query sees; None: `memory.scope`.
        phase: Context manager around `backbone`, `append`, `retrieve_and_read`, `sidenet` and `loss` (a timer).

    Attributes:
        place: Lane position of the group's next segments.
    """

    def __init__(
        self,
        model: LongMem,
        bank: MemoryBank | None,
        *,
        exchange: Exchange | None = None,
        scope: Literal["document", "lane", "group"] | None = None,
        phase: Phase = lambda _: nullcontext(),
    ) -> None:
        self.model, self.bank, self.exchange, self.phase = model, bank, exchange or Alone(), phase
        self.place = 0
        self._settings = model.read_settings if scope is None else replace(model.read_settings, scope=scope)

    @property
    def turn(self) -> Turn:
        """Which segments of each lane this rank takes."""
        return Turn(self.exchange.rank, self.exchange.size, self.model.settings.segment_tokens)

    def feed(self, tokens: Tensor, documents: Tensor, *, start: int | None = None) -> Seen:
        """Encodes the next segment of every row and remembers it.

        Collective: with a partitioned backbone every rank must call it together.

        Args:
            tokens: int64 `[B, T]`.
            documents: Document of each token, int64 `[B, T]`.
            start: Lane position of the first token, where somebody else keeps the place; None: this stream does.

        Returns:
            The segment.
        """
        seen = self.look(tokens, documents, start=start)
        self.remember(seen)
        return seen

    def look(self, tokens: Tensor, documents: Tensor, *, start: int | None = None) -> Seen:
        """Encodes the next segment of every row, and leaves everything else as it is.

        Collective: as `feed`.

        Args:
            tokens: As in `feed`.
            documents: As in `feed`.
            start: As in `feed`.

        Returns:
            The segment.
        """
        with self.phase("backbone"):
            encoding = self.model.encode(tokens, documents)
        own = self.place + self.exchange.rank * tokens.shape[1]
        return Seen(encoding, documents, own if start is None else start)

    def remember(self, seen: Seen) -> None:
        """Appends a segment to memory, and moves on behind those of the whole group.

        Args:
            seen: The segment, the next one of each row.
        """
        num_tokens = seen.documents.shape[1]
        if self.bank is not None:
            with self.phase("append"):
                self.model.append(self.bank, seen.encoding, start=seen.start, documents=seen.documents)
        self.place = seen.start + (self.exchange.size - self.exchange.rank) * num_tokens

    def hidden(self, seen: Seen, *, memory: Memory = "own", observe_ages: AgeObserver | None = None) -> Tensor:
        """Runs the SideNet, whose memory layers read what lies before the segment.

        Collective: every rank of the memory group must call it together, and its backward pass too.

        Args:
            seen: The newest segment, remembered or not.
            memory: Whose memory each row reads; the same on all ranks of a group. With lanes named, rows need not be
                as many as lanes: suffixes, beams or readers of one text need no copy of its memory.
            observe_ages: As in `BankReader`.

        Returns:
            Input of the LM head `[B, T, E]`.
        """
        reader = self._reader(seen, memory, observe_ages)
        with self.phase("sidenet"):
            return self.model.hidden(seen.encoding, reader)

    def losses(
        self, seen: Seen, targets: Tensor, *, memory: Memory = "own", observe_ages: AgeObserver | None = None
    ) -> Tensor:
        """Cross-entropy of every token, given what lies before the segment.

        Collective: as `hidden`, and with a partitioned backbone every rank.

        Args:
            seen: As in `hidden`.
            targets: int64 `[B, T]`; -100 where nothing is predicted.
            memory: As in `hidden`.
            observe_ages: As in `hidden`.

        Returns:
            Nats, float32 `[B, T]`.
        """
        hidden = self.hidden(seen, memory=memory, observe_ages=observe_ages)
        with self.phase("loss"):
            return self.model.losses(hidden, targets)

    def backbone_losses(self, seen: Seen, targets: Tensor) -> Tensor:
        """As `losses`, by the backbone alone, which sees the segment and nothing else; without gradients."""
        return self.model.backbone_losses(seen.encoding, targets)

    def _reader(self, seen: Seen, memory: Memory, observe_ages: AgeObserver | None) -> MemoryReader | None:
        if self.bank is None or memory == "none":
            return None
        if not isinstance(memory, Tensor):
            return self._lanes_reader(seen, seen.documents, observe_ages)
        num_lanes, parts = self.bank.shape.num_lanes, []
        for rows in _rounds(memory.cpu(), num_lanes=num_lanes):
            lanes = memory.cpu()[rows]
            documents = seen.documents.new_full((num_lanes, seen.documents.shape[1]), _NOBODYS)
            documents[lanes] = seen.documents[rows]
            parts.append((rows, lanes, self._lanes_reader(seen, documents, observe_ages)))
        return _OtherLanes(parts, num_lanes)

    def _lanes_reader(self, seen: Seen, documents: Tensor, observe_ages: AgeObserver | None) -> MemoryReader:
        assert self.bank is not None
        return self.model.reader(
            self.bank,
            start=seen.start,
            documents=documents,
            settings=self._settings,
            exchange=self.exchange,
            observe_ages=observe_ages,
            timed=lambda: self.phase("retrieve_and_read"),
        )


def _rounds(lane_of_row: Tensor, *, num_lanes: int) -> list[Tensor]:
    """Rows by rounds, in each of which a lane is read by one row at most, int64 each."""
    assert bool(((lane_of_row >= 0) & (lane_of_row < num_lanes)).all()), f"lanes are 0 to {num_lanes - 1}"
    rows_of_lane = [(lane_of_row == lane).nonzero()[:, 0] for lane in range(num_lanes)]
    most = max(map(len, rows_of_lane))
    return [torch.cat([rows[number : number + 1] for rows in rows_of_lane]) for number in range(most)]


class _OtherLanes:
    """Lets each row read the memory of a lane: queries go to the lane and what they read comes back.

    Nothing in the bank is copied. Lanes that nobody reads in a round get queries of zeros, whose answers are dropped.

    Args:
        parts: For each round its rows, their lanes, and a reader of all lanes.
        num_lanes: Lanes of the bank.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor, MemoryReader]], num_lanes: int) -> None:
        self.parts, self.num_lanes = parts, num_lanes

    def read(self, layer: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer; `query` `[B, H, T, D]`."""
        order, values, log_sum_exp = [], [], []
        for rows, lanes, reader in self.parts:
            rows, lanes = rows.to(query.device), lanes.to(query.device)
            of_lanes = query.new_zeros(self.num_lanes, *query.shape[1:]).index_copy(0, lanes, query[rows])
            read = reader.read(layer, of_lanes)
            order.append(rows)
            values.append(read.values[lanes])
            log_sum_exp.append(read.log_sum_exp[lanes])
        back = torch.cat(order).argsort()
        return MemoryRead(torch.cat(values)[back], torch.cat(log_sum_exp)[back])
