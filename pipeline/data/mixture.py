"""The order in which a lane reads the documents of all sources, endless, from nothing but seed, lane and lengths.

Each source goes through its own documents of the lane, epoch after epoch. If a source had its share `w` of the lane's
tokens to the token, its document that comes after `n` tokens of it and has `l` would lie at `n / w` to `(n + l) / w` of
the lane. It is due at `(n + u l) / w`, with `u` in [0, 1) drawn for each lane and source, and what is due first is read
first: the source that is furthest behind its share, were `u` 0; drawn, it lets lanes begin with different sources and
spreads sources of small shares. With `L` the longest document of a source in the lane, the tokens of source `s` are, at
every place of the lane, less than its share of the tokens read by no more than

    (1 - w_s) u_s L_s + w_s (sum of (1 - u_t) L_t over the other sources)

and more by no more than the same with `1 - u` for `u`. So the share of a stretch is kept, too, wherever it begins.
What is due before a place is known without what comes before it: lanes skip, go back and resume by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
_ORDER_STREAM, _DUE_STREAM = 2, 3  # keep the seeds of orders and of `u` apart, and from the deal's


class Block(NamedTuple):
    """Readings of a lane, one after another: those that are due in a piece of it.

    Attributes:
        number: Counted from 0.
        first: Readings of the lane before.
        start: Tokens of the lane before.
        before: Tokens of each source before.
        sources: Of each reading, int64 `[n]`.
        documents: Number of the document in its source, int64 `[n]`.
        ends: Tokens from the beginning of the block to the end of each, int64 `[n]`.
    """

    number: int
    first: int
    start: int
    before: tuple[int, ...]
    sources: Int64Array
    documents: Int64Array
    ends: Int64Array

    def begin(self, place: int) -> int:
        """Tokens of the block before one of its readings."""
        return int(self.ends[place - 1]) if place else 0

    def of_sources(self, place: int, offset: int) -> list[int]:
        """Tokens of each source in the lane before token `offset` of a reading."""
        lengths = np.diff(self.ends[: place + 1], prepend=0)
        lengths[place] = offset
        return [
            before + int(lengths[self.sources[: place + 1] == source].sum())
            for source, before in enumerate(self.before)
        ]


class Schedule:
    """The readings of one lane.

    Args:
        lengths: Of each source the tokens of its documents.
        dealt: Of each source the numbers of the documents that the lane has.
        shares: Of each source its share of the tokens; they add up to 1.
        lane: Number of the lane.
        seed: Seed of orders and of what is due when.
    """

    def __init__(
        self,
        lengths: Sequence[Int64Array],
        dealt: Sequence[Int64Array],
        *,
        shares: Sequence[float],
        lane: int,
        seed: int,
    ) -> None:
        fractions = np.random.default_rng([seed, _DUE_STREAM, lane]).random(len(dealt))
        self._sources = [
            _Source(lengths[number], dealt[number], share=share, fraction=float(fraction), seeds=(seed, lane, number))
            for number, (share, fraction) in enumerate(zip(shares, fractions, strict=True))
        ]
        # No source has much more than an epoch in a block, and one alone has just that.
        self._block_tokens = min(source.epoch_tokens / source.share for source in self._sources)
        self._documents_per_token = sum(one.share * one.num_documents / one.epoch_tokens for one in self._sources)
        self._block = self._make(0)

    def with_reading(self, ordinal: int) -> Block:
        """The block of a reading, counted from 0 over all epochs of all sources."""
        if not self._block.first <= ordinal < self._block.first + len(self._block.ends):
            guess = int(ordinal / self._documents_per_token / self._block_tokens)
            self._block = self._make(_last(self._num_before, ordinal, guess=guess))
        return self._block

    def with_token(self, token: int) -> Block:
        """The block of a token of the lane, counted from 0."""
        begin = token - self._block.start
        if not 0 <= begin < self._block.begin(len(self._block.ends)):
            self._block = self._make(_last(self._tokens_before, token, guess=int(token / self._block_tokens)))
        return self._block

    def _num_before(self, block: int) -> int:
        return sum(source.num_due(block * self._block_tokens) for source in self._sources)

    def _tokens_before(self, block: int) -> int:
        return sum(source.tokens_before(source.num_due(block * self._block_tokens)) for source in self._sources)

    def _make(self, number: int) -> Block:
        firsts, lasts = (
            [source.num_due(at * self._block_tokens) for source in self._sources] for at in (number, number + 1)
        )
        parts = [source.readings(first, last) for source, first, last in zip(self._sources, firsts, lasts, strict=True)]
        lengths = [source.lengths[part.documents] for source, part in zip(self._sources, parts, strict=True)]
        # Stable: of what is due at the same place the earlier source comes first.
        order = np.argsort(np.concatenate([part.due for part in parts]), kind="stable")
        before = [source.tokens_before(first) for source, first in zip(self._sources, firsts, strict=True)]
        return Block(
            number,
            first=sum(firsts),
            start=sum(before),
            before=tuple(before),
            sources=np.repeat(np.arange(len(parts)), [len(part.due) for part in parts])[order],
            documents=np.concatenate([part.documents for part in parts])[order],
            ends=np.cumsum(np.concatenate(lengths)[order]),
        )


class _Readings(NamedTuple):
    """Readings of one source, in order: the document of each, tokens of the epoch before it, and where it is due."""

    documents: Int64Array
    begins: Int64Array
    due: Float64Array


class _Source:
    """A source as one lane reads it: its documents in a new order each epoch."""

    def __init__(
        self, lengths: Int64Array, documents: Int64Array, *, share: float, fraction: float, seeds: tuple[int, int, int]
    ) -> None:
        self.share, self.num_documents, self.epoch_tokens = share, len(documents), int(lengths[documents].sum())
        self.lengths, self._documents, self._fraction, self._seeds = lengths, documents, fraction, seeds
        self._epochs: dict[int, _Readings] = {}

    def num_due(self, place: float) -> int:
        """Readings that are due before a place of the lane. It never falls: each is between two places, once."""
        epoch = int(place * self.share / self.epoch_tokens)
        return epoch * self.num_documents + int(np.searchsorted(self._epoch(epoch).due, place, side="left"))

    def tokens_before(self, reading: int) -> int:
        """Tokens of all readings before one."""
        epoch, place = divmod(reading, self.num_documents)
        return epoch * self.epoch_tokens + (int(self._epoch(epoch).begins[place]) if place else 0)

    def readings(self, first: int, last: int) -> _Readings:
        """Some, without the last."""
        number = self.num_documents
        parts = []
        for epoch in range(first // number, max(first, last - 1) // number + 1):
            part = slice(max(0, first - epoch * number), max(0, last - epoch * number))
            whole = self._epoch(epoch)
            parts.append(_Readings(whole.documents[part], whole.begins[part], whole.due[part]))
        return _Readings(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def _epoch(self, epoch: int) -> _Readings:
        """All of an epoch, from nothing but seed, lane, source and epoch."""
        if epoch not in self._epochs:
            seed, lane, source = self._seeds
            # The first source is drawn as if it were alone.
            random = np.random.default_rng([seed, _ORDER_STREAM, lane, epoch, *([source] if source else [])])
            documents = random.permutation(self._documents)
            lengths = self.lengths[documents]
            begins = np.cumsum(lengths) - lengths
            due = (float(epoch * self.epoch_tokens) + begins + self._fraction * lengths) / self.share
            while len(self._epochs) > 1:  # two meet in a block
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Readings(documents, begins, due)
        return self._epochs[epoch]


def _last(value: Callable[[int], int], wanted: int, *, guess: int) -> int:
    """The last number whose value is not above `wanted`, for a value that begins with 0 and never falls."""
    low, step = guess, 1
    while low > 0 and value(low) > wanted:
        low, step = max(0, low - step), 2 * step
    high, step = low + 1, 1
    while value(high) <= wanted:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if value(middle) <= wanted else (low, middle)
    return low
