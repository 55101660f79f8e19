"""What the tokens of a row look up in memory while it reads on, and where that is from.

Shapes: `H` query heads, `t` tokens that are read at once, `w` chunks of a query and head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from heapq import nlargest
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.face.memory import Memory
from pipeline.face.remembering import Start
from pipeline.memory.sources import ChunksRead
from pipeline.sidenet.fusion import MemoryReader
from pipeline.sidenet.sidenet import SideNet


class LookedUp(NamedTuple):
    """A chunk that a token read in one memory layer; all but `place` as in `ReadChunk`."""

    share: float
    place: int
    """Place of its first token in the row's lane."""
    score: float
    layer: int
    heads: tuple[int, ...]


Note = Callable[[int, ChunksRead, Tensor], None]
"""Is told of a read: the memory layer, counted from 1, the chunks, the weight of memory `[1, H, t]`."""


class _Reader(Protocol):
    def chunks(self, index: int, query: Tensor) -> ChunksRead: ...


def chosen_layers(sidenet: SideNet, layers: Collection[int] | None) -> tuple[int, ...]:
    """Some of a SideNet's memory layers, counted from 1.

    Args:
        sidenet: The SideNet.
        layers: Which; None: all.

    Returns:
        Those, in order.

    Raises:
        DataError: One is no memory layer.
    """
    unknown = sorted(set(layers or ()) - set(sidenet.fusions))
    if unknown:
        raise DataError(
            "the model reads no memory in a layer",
            got=unknown[0],
            expected=f"of {', '.join(map(str, sidenet.fusions))}",
            do="name some of these, or none: all are shown",
        )
    return tuple(number for number in sidenet.fusions if layers is None or number in layers)


@contextmanager
def watching(sidenet: SideNet, layers: Collection[int], note: Note) -> Iterator[None]:
    """Tells of every read of some memory layers inside; one row, read on by `Rows`."""
    layer_of_index = {sidenet.fusions[layer].index: layer for layer in layers}

    def see(index: int, reader: MemoryReader, query: Tensor, weight: Tensor) -> None:
        note(layer_of_index[index], cast(_Reader, reader).chunks(index, query), weight)

    try:
        for layer in layers:
            sidenet.fusions[layer].observe = see
        yield
    finally:
        for layer in layers:
            sidenet.fusions[layer].observe = None


class LookUps:
    """The chunks that every token looked up, those of the largest share.

    Args:
        layers: Memory layers that are noted.
        most: How many chunks of a token are kept.

    Attributes:
        kept: Of every token, the chunks that are kept, the largest share first.
        num_read: Of every token, how many chunks it read in all layers.
        weights: Of every memory layer, the weight of memory `[H, t]`, read after read.
    """

    def __init__(self, layers: Collection[int], *, most: int) -> None:
        self._most = most
        self.kept: list[list[LookedUp]] = []
        self.num_read: list[int] = []
        self.weights: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def note(self, layer: int, read: ChunksRead, weight: Tensor) -> None:
        """As `Note`."""
        first = sum(part.shape[1] for part in self.weights[layer])
        self.weights[layer].append(weight[0])
        missing = first + weight.shape[2] - len(self.kept)
        self.kept += [[] for _ in range(missing)]
        self.num_read += [0] * max(0, missing)
        for token, count, best in _by_token(read, weight, layer, self._most):
            self.num_read[first + token] += count
            self.kept[first + token] = nlargest(self._most, self.kept[first + token] + best, key=_share)


class Peaks:
    """The chunks that a token of an answer gave much of its attention to, in some memory layer.

    Of the tokens that an answer's are predicted from: of a read of several, a prompt, the last.
    """

    def __init__(self) -> None:
        self._of_layer: dict[int, dict[int, LookedUp]] = {}

    def note(self, layer: int, read: ChunksRead, weight: Tensor) -> None:
        """As `Note`."""
        peaks = self._of_layer.setdefault(layer, {})
        if weight.shape[2] > 1:
            peaks.clear()
        last = ChunksRead(*(each[:, :, -1:] for each in (read.places, read.scores, read.shares)))
        for _, _, found in _by_token(last, weight[:, :, -1:], layer, sys.maxsize):
            for each in found:
                peaks[each.place] = max(peaks.get(each.place, each), each, key=_share)

    def largest(self, count: int) -> list[LookedUp]:
        """Those of the largest share, each chunk once, where it was looked up most."""
        whole: dict[int, LookedUp] = {}
        for peaks in self._of_layer.values():
            for place, each in peaks.items():
                whole[place] = max(whole.get(place, each), each, key=_share)
        return nlargest(count, whole.values(), key=_share)


def _share(looked_up: LookedUp) -> float:
    return looked_up.share


def _by_token(read: ChunksRead, weight: Tensor, layer: int, most: int) -> Iterator[tuple[int, int, list[LookedUp]]]:
    """Of each token that read something: its number, how many chunks, and those of the largest share.

    A chunk that several heads read is one, of the mean share over all heads and the best score.
    """
    there = read.scores[0] != float("-inf")  # [H, t, w]
    num_heads = len(there)
    head, token, _ = there.nonzero().unbind(1)
    place, score = read.places[0][there], read.scores[0][there]
    share = (read.shares[0] * weight[0, :, :, None])[there] / num_heads
    if not len(place):
        return
    span = int(place.max()) + 1
    key, chunk = (token * span + place).unique(return_inverse=True)  # sorted: token by token
    shares = share.new_zeros(len(key)).index_add(0, chunk, share)
    scores = score.new_full((len(key),), float("-inf")).scatter_reduce(0, chunk, score, "amax")
    by_head = torch.zeros(len(key), num_heads, dtype=torch.bool, device=key.device)
    by_head[chunk, head] = True
    first = 0
    tokens, counts = (key // span).unique_consecutive(return_counts=True)
    for number, count in zip(tokens.tolist(), counts.tolist(), strict=True):
        chosen = first + shares[first : first + count].topk(min(most, count)).indices
        columns = (shares[chosen], key[chosen] % span, scores[chosen], by_head[chosen])
        found = zip(*(column.tolist() for column in columns), strict=True)
        yield number, count, [LookedUp(a, b, c, layer, _numbers(d)) for a, b, c, d in found]
        first += count


def _numbers(flags: Sequence[bool]) -> tuple[int, ...]:
    return tuple(number for number, flag in enumerate(flags) if flag)


class Lane:
    """What lies where in the lane that a row reads on: documents of its memories, then what it has read itself.

    Args:
        memories: The row's memories.
        start: Where it began with them.
        tokenizer: Turns ids into text.
        own_name: What is said of chunks of what the row has read itself.

    Attributes:
        read: The ids that the row has read since the begin of its segment then, `start.tail` first; add those that it
            reads.
    """

    def __init__(self, memories: Sequence[Memory], start: Start, tokenizer: Any, *, own_name: str) -> None:
        self._memories = list(zip(memories, [source.shift for source in start.row.sources], strict=False))
        self._tail_of = memories[-1].sources[-1].name if len(start.tail) else own_name
        self._own_name = own_name
        self._start, self._num_before, self._tokenizer = start.row.place, len(start.tail), tokenizer
        self.read: list[int] = start.tail.tolist()
        self._known: dict[int, tuple[str, str]] = {}

    @property
    def place(self) -> int:
        """Place of the next token."""
        return self._start + len(self.read)

    def chunk(self, place: int, size: int) -> tuple[str, str]:
        """Name of the document, and text, of the chunk of `size` tokens whose first is at a place."""
        if place not in self._known:
            name, tokens = self._look(place, size)
            self._known[place] = name, text_of(self._tokenizer, tokens)
        return self._known[place]

    def _look(self, place: int, size: int) -> tuple[str, list[int]]:
        at = place - self._start
        if at >= 0:
            return self._tail_of if at < self._num_before else self._own_name, self.read[at : at + size]
        memory, shift = max((each for each in self._memories if each[1] <= place), key=lambda each: each[1])
        number = int(torch.searchsorted(memory.positions, place - shift))
        return memory.sources[int(memory.of_document[number])].name, memory.tokens[number].tolist()


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Token ids as text, nothing left out and nothing made nicer."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
