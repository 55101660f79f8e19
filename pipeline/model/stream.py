"""Rows that read on: the one place that joins encoding, remembering, reading memory and scoring.

Training, replay, evaluation, benches and tests all read this way, so that the same text cut into the same segments
gives the same numbers everywhere. Reading never writes: only `remember` changes what is remembered. A segment is
remembered before it is read for, because in a memory group it is part of what the next rank's segment reads.

Shapes: `B` rows, `T` segment tokens, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.backbone.encoding import Encoding
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Alone, Exchange
from pipeline.memory.place import Turn
from pipeline.memory.reader import AgeObserver, BankReader
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.model.longmem import LongMem
from pipeline.model.opened import OpenSegment
from pipeline.sidenet.past import SideNetPast

Memory = Literal["own", "none"] | Tensor
"""What rows read: each its own memory, nothing, or the memory of a lane of the bank, int64 `[B]`; many may read one."""
Phase = Callable[[str], AbstractContextManager[Any]]


class Context(NamedTuple):
    """Tokens before a segment, and the document of each, int64 `[B, n]`."""

    tokens: Tensor
    documents: Tensor


@dataclass(frozen=True)
class Seen:
    """A segment of every row, as the backbone has encoded it.

    Attributes:
        encoding: What the backbone says of it.
        documents: Document of each token, int64 `[B, T]`.
        start: Lane position of its first token; what is read for it lies before.
        first: Of a segment that is read in pieces: how many of its tokens came before these.
    """

    encoding: Encoding
    documents: Tensor
    start: int
    first: int = 0


class Stream:
    """Rows that read on, with their memory and the place where they are.

    Args:
        model: Backbone and SideNet.
        bank: This rank's shard of the rows' memory; None: nothing is remembered.
        exchange: The memory group, whose ranks take segments in turn; None: this rank alone.
        settings: How memory is read; None: as the model does.
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
        settings: ReadSettings | None = None,
        phase: Phase = lambda _: nullcontext(),
    ) -> None:
        self.model, self.bank, self.exchange, self.phase = model, bank, exchange or Alone(), phase
        self.place = 0
        self._settings = settings or model.read_settings

    @property
    def turn(self) -> Turn:
        """Which segments of each lane this rank takes."""
        return Turn(self.exchange.rank, self.exchange.size, self.model.settings.segment_tokens)

    def feed(
        self, tokens: Tensor, documents: Tensor, context: Context | None = None, *, start: int | None = None
    ) -> Seen:
        """Encodes the next segment of every row and remembers it.

        Collective: with a partitioned backbone every rank must call it together.

        Args:
            tokens: int64 `[B, T]`.
            documents: Document of each token, int64 `[B, T]`.
            context: The tokens before, `backbone.context_tokens` of them or as many as there are; None: there are none.
            start: Lane position of the first token, where somebody else keeps the place; None: this stream does.

        Returns:
            The segment.
        """
        seen = self.look(tokens, documents, context, start=start)
        self.remember(seen)
        return seen

    def look(
        self,
        tokens: Tensor,
        documents: Tensor,
        context: Context | None = None,
        *,
        start: int | None = None,
        opened: OpenSegment | None = None,
    ) -> Seen:
        """Encodes the next segment of every row, and leaves everything else as it is.

        Collective: as `feed`.

        Args:
            tokens: As in `feed`.
            documents: As in `feed`; of a segment that is read in pieces, one document a row.
            context: As in `feed`.
            start: As in `feed`.
            opened: A segment that is read in pieces: these tokens follow those in it, and are added to it.

        Returns:
            The segment, or the piece of it.
        """
        if opened is not None and (first := opened.num_tokens[0]):
            assert context is None and start is not None, "a piece that continues a segment has its context before it"
            with self.phase("backbone"):
                encoding = opened.encode(self.model, tokens)
            return Seen(encoding, documents, start, first)
        own = self.place + self.exchange.rank * tokens.shape[1] if start is None else start
        num_context = 0 if context is None else context.tokens.shape[1]
        wanted = min(self.model.settings.context_tokens, own)
        assert num_context == wanted, f"a segment at {own} is encoded with {wanted} tokens before it, not {num_context}"
        with self.phase("backbone"):
            if opened is not None:
                before = tokens[:, :0] if context is None else context.tokens
                encoding = opened.encode(self.model, torch.cat([before, tokens], dim=1), num_context=num_context)
            elif context is None:
                encoding = self.model.encode(tokens, documents)
            else:
                whole = torch.cat([context.tokens, tokens], dim=1), torch.cat([context.documents, documents], dim=1)
                encoding = self.model.encode(*whole, num_context=num_context)
        return Seen(encoding, documents, own)

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

    def hidden(
        self,
        seen: Seen,
        *,
        memory: Memory = "own",
        retrieve_from: Tensor | None = None,
        visible: Tensor | None = None,
        retrieves: bool = True,
        at_one_place: bool = False,
        observe_ages: AgeObserver | None = None,
        past: SideNetPast | None = None,
    ) -> Tensor:
        """Runs the SideNet, whose memory layers read what lies before the segment.

        Collective: every rank of the memory group must call it together, and its backward pass too.

        Args:
            seen: The newest segment, remembered or not.
            memory: Whose memory each row reads; the same on all ranks of a group. With lanes named, rows need not be
                as many as lanes: suffixes, beams or readers of one text need no copy of its memory.
            retrieve_from: Lanes that rows retrieve from, beside a window of their own, int64 `[B]`; None: as `memory`.
            visible: Chunks that a row may see, as in `Reading`; None: all.
            retrieves: Whether anything is retrieved, beside the recent window.
            at_one_place: Whether the segments of all ranks of the group begin at the same place: other continuations of
                one past.
            observe_ages: As in `BankReader`.
            past: What the SideNet keeps of a segment that is read in pieces, and by one kind of reading.

        Returns:
            Input of the LM head `[B, T, E]`.
        """
        reader = None
        if self.bank is not None and memory != "none":
            lanes = memory if isinstance(memory, Tensor) else None
            reader = BankReader(
                self.bank,
                self._settings if retrieves else replace(self._settings, top_k_chunks=0),
                self.model.geometries,
                Reading(
                    seen.start,
                    seen.documents,
                    seen.first,
                    segment_tokens=0 if at_one_place else None,
                    lane_of_row=lanes,
                    retrieve_from=retrieve_from,
                    visible=visible,
                ),
                exchange=self.exchange,
                observe_ages=observe_ages,
                timed=lambda: self.phase("retrieve_and_read"),
                is_repeated=self.model.settings.sidenet.activation_checkpointing and torch.is_grad_enabled(),
            )
        with self.phase("sidenet"):
            return self.model.hidden(seen.encoding, reader, past)

    def losses(self, seen: Seen, targets: Tensor, **kwargs: Any) -> Tensor:
        """Cross-entropy of every token, given what lies before the segment.

        Collective: as `hidden`, and with a partitioned backbone every rank.

        Args:
            seen: As in `hidden`.
            targets: int64 `[B, T]`; -100 where nothing is predicted.
            **kwargs: As in `hidden`.

        Returns:
            Nats, float32 `[B, T]`.
        """
        hidden = self.hidden(seen, **kwargs)
        with self.phase("loss"):
            return self.model.losses(hidden, targets)

    def backbone_losses(self, seen: Seen, targets: Tensor) -> Tensor:
        """As `losses`, by the backbone alone, which sees context and segment and nothing else; without gradients."""
        return self.model.backbone_losses(seen.encoding, targets)
