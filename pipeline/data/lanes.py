"""Lanes: whole documents dealt to endless rows of tokens, cut into segments without loss. B lanes, T segment tokens."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

IGNORED_TARGET = -100  # what torch's cross-entropy ignores
_DEAL_STREAM, _ORDER_STREAM = 1, 2  # keep the seeds of the deal and of the orders apart

Int64Array = npt.NDArray[np.int64]


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


def deal(lengths: npt.ArrayLike, *, num_lanes: int, seed: int) -> list[Int64Array]:
    """Deal whole documents to lanes, balanced by tokens: the longest first, each to the least full lane.

    Args:
        lengths: Tokens of each document, ``[num_documents]``, at least 1 each.
        num_lanes: Number of lanes of the whole job.
        seed: Decides between documents of equal length.

    Returns:
        For each lane its document numbers, int64, ascending.

    Raises:
        DataError: There are more lanes than documents.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    _check_enough(len(counts), num_lanes)
    shuffled = np.random.default_rng([seed, _DEAL_STREAM]).permutation(len(counts))
    longest_first = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    fill = [(0, lane) for lane in range(num_lanes)]
    dealt: list[list[int]] = [[] for _ in range(num_lanes)]
    for document in longest_first.tolist():
        tokens, lane = fill[0]
        dealt[lane].append(document)
        heapq.heapreplace(fill, (tokens + int(counts[document]), lane))
    return [np.array(sorted(documents), dtype=np.int64) for documents in dealt]


class Lanes:
    """Some lanes of a job, read in lockstep. What a lane yields does not depend on which others are read with it.

    Args:
        source: The documents, usually an open TokenStore.
        num_lanes: Number of lanes of the whole job.
        lanes: Numbers of the lanes to read, in row order.
        segment_tokens: Tokens of a segment.
        seed: Seed of the deal and of the order of documents in every epoch.
        context_tokens: Tokens before each segment that are given with it.

    Raises:
        DataError: There are more lanes than documents.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
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
        dealt = deal(source.lengths, num_lanes=num_lanes, seed=seed)
        self._rows = [_Lane(source, lane, num_lanes=num_lanes, documents=dealt[lane], seed=seed) for lane in self.lanes]
        self._segment_tokens, self._context_tokens = segment_tokens, context_tokens
        self._index = 0
        self._fingerprint = {
            "num_lanes": num_lanes,
            "segment_tokens": segment_tokens,
            "seed": seed,
            "documents": hashlib.sha256(source.lengths.astype("<i8").tobytes()).hexdigest(),
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
                    do="use the data.path, data.lanes, train.segment_tokens and run.seed of the first run",
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
    """One endless row: its documents in a new order each epoch, and a mark of what is read next.

    ``ordinal`` counts the documents begun over all epochs, ``offset`` the tokens read of the current one.
    """

    def __init__(self, source: TokenSource, number: int, *, num_lanes: int, documents: Int64Array, seed: int) -> None:
        self.number = number
        self.ordinal = 0
        self.offset = 0
        self._source = source
        self._num_lanes = num_lanes
        self._documents = documents
        self._epoch_tokens = int(source.lengths[documents].sum())
        self._seed = seed
        self._epoch = -1
        self._order = documents

    def read_into(self, segment: _Tokens, row: int) -> None:
        """Fill one row and move the mark behind it."""
        filled, wanted = 0, segment.tokens.shape[1]
        while filled < wanted:
            document = self._document()
            length = int(self._source.lengths[document])
            taken = min(wanted - filled, length - self.offset)
            # One token more than is taken, where the document has it: the target of the last one.
            piece = self._source.tokens(document, self.offset, min(self.offset + taken + 1, length))
            here = slice(filled, filled + taken)
            segment.tokens[row, here] = piece[:taken]
            segment.targets[row, here] = IGNORED_TARGET
            segment.targets[row, filled : filled + len(piece) - 1] = piece[1:]
            segment.documents[row, here] = self.ordinal * self._num_lanes + self.number
            filled += taken
            self.offset += taken
            if self.offset == length:
                self.seek(self.ordinal + 1, 0)

    def skip(self, num_tokens: int) -> None:
        """Move the mark by some tokens, on or back, over any number of epochs, without reading tokens."""
        epoch, place = divmod(self.ordinal, len(self._documents))
        before = int(self._source.lengths[self._order_of(epoch)[:place]].sum()) + self.offset
        epochs, target = divmod(before + num_tokens, self._epoch_tokens)
        ends = np.cumsum(self._source.lengths[self._order_of(epoch + epochs)])
        place = int(np.searchsorted(ends, target, side="right"))
        begin = int(ends[place - 1]) if place > 0 else 0
        self.seek((epoch + epochs) * len(self._documents) + place, target - begin)

    def seek(self, ordinal: int, offset: int) -> None:
        """Put the mark on a token of a document, counted over all epochs. Raises DataError: there is no such token."""
        self.ordinal, self.offset = ordinal, offset
        if ordinal < 0 or not 0 <= offset < self._source.lengths[self._document()]:
            raise DataError(
                "the state of the lanes points outside a document",
                got=f"lane {self.number}, document {ordinal}, token {offset}",
            )

    def _document(self) -> int:
        epoch, place = divmod(self.ordinal, len(self._documents))
        return int(self._order_of(epoch)[place])

    def _order_of(self, epoch: int) -> Int64Array:
        """The lane's documents in the order of one epoch, from nothing but seed, lane and epoch."""
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, _ORDER_STREAM, self.number, epoch])
            self._order = random.permutation(self._documents)
            self._epoch = epoch
        return self._order


def check_documents(source: TokenSource, *, chunk_size: int, num_lanes: int) -> None:
    """Raises DataError if a document is shorter than a chunk of memory, or there are fewer documents than lanes."""
    num_short = int((source.lengths < chunk_size).sum())
    if num_short:
        raise DataError(
            f"{num_short} of {len(source.lengths)} documents are shorter than a chunk of memory",
            got=f"the shortest has {source.lengths.min()} tokens",
            expected=f"at least memory.chunk_size, {chunk_size} tokens",
            do=f"prepare the data again with --min-tokens {chunk_size}",
        )
    _check_enough(len(source.lengths), num_lanes)


def _check_enough(num_documents: int, num_lanes: int) -> None:
    if num_documents < num_lanes:
        raise DataError(
            "there are more lanes than documents to deal to them",
            got=f"data.lanes {num_lanes}, {num_documents} documents",
            do=f"lower data.lanes to at most {num_documents}, or prepare more documents",
        )
