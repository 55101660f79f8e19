"""Lanes: whole documents dealt to endless rows of tokens, cut into segments without loss. B lanes, T segment tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.data.deal import deal
from pipeline.data.mixture import Block, Int64Array, Schedule
from pipeline.errors import DataError

IGNORED_TARGET = -100  # what torch's cross-entropy ignores


class TokenSource(Protocol):
    """Where lanes read from; a TokenStore is one."""

    lengths: Int64Array

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> Int64Array:
        """Tokens ``start`` to ``stop`` (exclusive) of a document."""


@dataclass(frozen=True)
class Segment:
    """The next T tokens of B lanes.

    Attributes:
        tokens: int64 ``[B, T]``.
        targets: The token after each, int64 ``[B, T]``; -100 at the last token of a document.
        documents: Which reading of a document a token belongs to, int64 ``[B, T]``; unique over lanes and epochs.
        context_tokens: The tokens before them, int64 ``[B, n]``: as many as were asked for, or as there are.
        context_documents: Their documents, int64 ``[B, n]``.
        start: Lane position of the first token; the same for all lanes.
    """

    tokens: Int64Array
    targets: Int64Array
    documents: Int64Array
    context_tokens: Int64Array
    context_documents: Int64Array
    start: int


class Lanes:
    """Some lanes of a job, read in lockstep. What a lane yields does not depend on which others are read with it.

    Args:
        sources: The documents, usually open TokenStores.
        weights: Of each source, how many tokens of it are read against those of others; None: as many of each.
        num_lanes: Number of lanes of the whole job.
        lanes: Numbers of the lanes to read, in row order.
        segment_tokens: Tokens of a segment.
        seed: Seed of the deal and of the order of documents in every epoch.
        context_tokens: Tokens before each segment that are given with it.

    Raises:
        DataError: There are more lanes than documents of a source.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        *,
        weights: Sequence[float] | None = None,
        num_lanes: int,
        lanes: Sequence[int],
        segment_tokens: int,
        seed: int,
        context_tokens: int = 0,
    ) -> None:
        self.lanes = tuple(lanes)
        assert self.lanes, "there must be a lane to read"
        assert all(0 <= lane < num_lanes for lane in self.lanes), "lanes must be in range(num_lanes)"
        assert segment_tokens >= 1
        assert weights is None or (len(weights) == len(sources) and min(weights) > 0), (
            "a weight above 0 for each source"
        )
        lengths = [source.lengths for source in sources]
        shares = _shares(weights or [1.0] * len(sources))
        dealt = [deal(own, num_lanes=num_lanes, seed=seed, source=number) for number, own in enumerate(lengths)]
        self.num_sources = len(sources)
        self._rows = []
        for lane in self.lanes:
            of_lane = [documents[lane] for documents in dealt]
            schedule = Schedule(lengths, of_lane, shares=shares, lane=lane, seed=seed)
            self._rows.append(_Lane(sources, lane, num_lanes=num_lanes, schedule=schedule))
        self._segment_tokens, self._context_tokens = segment_tokens, context_tokens
        self._index = 0
        hashes = [hashlib.sha256(own.astype("<i8").tobytes()).hexdigest() for own in lengths]
        self._fingerprint = {
            "num_lanes": num_lanes,
            "segment_tokens": segment_tokens,
            "seed": seed,
            # As checkpoints of one source have it.
            "documents": hashes[0] if len(sources) == 1 else [list(pair) for pair in zip(hashes, shares, strict=True)],
        }

    def next_segment(self) -> Segment:
        """The next segment of every lane; there is no end, epoch follows epoch."""
        start = self._index * self._segment_tokens
        before = min(self._context_tokens, start)
        shape = (len(self._rows), before + self._segment_tokens)
        read = _Tokens(*(np.empty(shape, dtype=np.int64) for _ in range(3)))
        for row, lane in enumerate(self._rows):
            if before:
                lane.skip(-before)
            lane.read_into(read, row)
        self._index += 1
        tokens, targets, documents = (array[:, before:] for array in read)
        return Segment(
            tokens=tokens,
            targets=targets,
            documents=documents,
            context_tokens=read.tokens[:, :before],
            context_documents=read.documents[:, :before],
            start=start,
        )

    @property
    def index(self) -> int:
        """Number of the segment that comes next, counted from 0."""
        return self._index

    def tokens_of_sources(self) -> list[int]:
        """Tokens of each source that these lanes have read."""
        return [sum(of_source) for of_source in zip(*(lane.of_sources() for lane in self._rows), strict=True)]

    def next_of_group(self, rank: int, size: int) -> Segment:
        """The segment of one rank of a memory group of `size`; afterwards the lanes stand behind those of all ranks."""
        self.skip(rank)
        segment = self.next_segment()
        self.skip(size - 1 - rank)
        return segment

    def skip(self, num_segments: int) -> None:
        """Go on by some segments, or back by some if negative, without reading tokens."""
        assert self._index + num_segments >= 0, "lanes begin at segment 0"
        for lane in self._rows:
            lane.skip(num_segments * self._segment_tokens)
        self._index += num_segments

    def state_dict(self) -> dict[str, Any]:
        """Where every lane stands, as plain JSON. States of different ranks join by joining their ``lanes``."""
        lanes = {str(lane.number): {"ordinal": lane.ordinal, "offset": lane.offset} for lane in self._rows}
        return {"index": self._index, "lanes": lanes, "fingerprint": dict(self._fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken.

        Args:
            state: What ``state_dict`` returned; it may hold more lanes than are read here.

        Raises:
            DataError: The state is malformed, lacks a lane, or comes from other data or settings.
        """
        try:
            found = {name: state["fingerprint"][name] for name in self._fingerprint}
            other = {name: value for name, value in found.items() if value != self._fingerprint[name]}
            if other:
                raise DataError(
                    "the state of the lanes comes from other data or settings",
                    got=other,
                    expected={name: self._fingerprint[name] for name in other},
                    do="use the data.path (or data.sources), data.lanes, train.segment_tokens and run.seed of the "
                    "first run",
                )
            marks = [state["lanes"][str(lane)] for lane in self.lanes]
            positions = [(int(mark["ordinal"]), int(mark["offset"])) for mark in marks]
            index = int(state["index"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError("the state of the lanes is malformed or lacks a lane", got=repr(error)) from error
        for lane, (ordinal, offset) in zip(self._rows, positions, strict=True):
            lane.seek(ordinal, offset)
        self._index = index


class _Tokens(NamedTuple):
    """Rows of consecutive tokens, as in `Segment`."""

    tokens: Int64Array
    targets: Int64Array
    documents: Int64Array


class _Lane:
    """One endless row: what its schedule says, and a mark of what is read next.

    ``ordinal`` counts the documents begun over all epochs of all sources, ``offset`` the tokens read of the current
    one.
    """

    def __init__(self, sources: Sequence[TokenSource], number: int, *, num_lanes: int, schedule: Schedule) -> None:
        self.number = number
        self.ordinal = 0
        self.offset = 0
        self._sources = sources
        self._num_lanes = num_lanes
        self._schedule = schedule

    def read_into(self, segment: _Tokens, row: int) -> None:
        """Fill one row and move the mark behind it."""
        filled, wanted = 0, segment.tokens.shape[1]
        while filled < wanted:
            block, place = self._here()
            source, document = self._sources[block.sources[place]], int(block.documents[place])
            length = int(source.lengths[document])
            taken = min(wanted - filled, length - self.offset)
            # One token more than is taken, where the document has it: the target of the last one.
            piece = source.tokens(document, self.offset, min(self.offset + taken + 1, length))
            here = slice(filled, filled + taken)
            segment.tokens[row, here] = piece[:taken]
            segment.targets[row, here] = IGNORED_TARGET
            segment.targets[row, filled : filled + len(piece) - 1] = piece[1:]
            segment.documents[row, here] = self.ordinal * self._num_lanes + self.number
            filled += taken
            self.offset += taken
            if self.offset == length:
                self.ordinal, self.offset = self.ordinal + 1, 0

    def skip(self, num_tokens: int) -> None:
        """Move the mark by some tokens, on or back, over any number of epochs, without reading tokens."""
        block, place = self._here()
        token = block.start + block.begin(place) + self.offset + num_tokens
        block = self._schedule.with_token(token)
        place = int(np.searchsorted(block.ends, token - block.start, side="right"))
        self.ordinal, self.offset = block.first + place, token - block.start - block.begin(place)

    def seek(self, ordinal: int, offset: int) -> None:
        """Put the mark on a token of a document, counted over all epochs. Raises DataError: there is no such token."""
        self.ordinal, self.offset = ordinal, offset
        if ordinal >= 0 and offset >= 0:
            block, place = self._here()
            if offset < block.begin(place + 1) - block.begin(place):
                return
        raise DataError(
            "the state of the lanes points outside a document",
            got=f"lane {self.number}, document {ordinal}, token {offset}",
        )

    def of_sources(self) -> list[int]:
        """Tokens of each source that it has read."""
        block, place = self._here()
        return block.of_sources(place, self.offset)

    def _here(self) -> tuple[Block, int]:
        """Where in which block the mark is."""
        block = self._schedule.with_reading(self.ordinal)
        return block, self.ordinal - block.first


def _shares(weights: Sequence[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]
