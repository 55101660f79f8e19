"""Segments that are read in pieces: what is kept of them, so that the next tokens cost no more than themselves.

Shapes: `B` rows, `q` tokens that are read now, `W` columns: of the row that has most. A row's tokens end in the last
column; what it lacks lies before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.cache import Roomy, SegmentCache
from pipeline.backbone.encoding import Encoding, KeyValue
from pipeline.model.longmem import LongMem
from pipeline.sidenet.past import SideNetPast


@dataclass
class OpenSegment:
    """The open segment of rows.

    Attributes:
        num_context: Tokens of left context of each row, `B` of them.
        num_tokens: Tokens of its segment that were read.
        cache: Keys and values of the backbone's own attention, of left context and segment.
        pieces: What the memory layers will remember of each piece, `[B, Hkv, n, D]`.
    """

    num_context: list[int]
    num_tokens: list[int]
    cache: DynamicCache = field(default_factory=SegmentCache)
    pieces: list[Sequence[KeyValue]] = field(default_factory=list)

    @classmethod
    def empty(cls, num_rows: int) -> OpenSegment:
        """Of rows that have read nothing."""
        return cls([0] * num_rows, [0] * num_rows)

    def encode(self, model: LongMem, tokens: Tensor, *, num_context: int = 0) -> Encoding:
        """Encodes the next tokens of every row; the first piece begins with the left context.

        Collective: with a partitioned backbone every rank must call it together.

        Args:
            model: The model.
            tokens: int64 `[B, num_context + q]`.
            num_context: Tokens of left context among them.

        Returns:
            What is said of the `q` tokens.
        """
        num_new = tokens.shape[1] - num_context
        self.num_context = [count + num_context for count in self.num_context]
        self.num_tokens = [count + num_new for count in self.num_tokens]
        lengths = [sum(counts) for counts in zip(self.num_context, self.num_tokens, strict=True)]
        columns = which_are_there(lengths, tokens.device)
        encoding = model.encode(tokens, None, num_context=num_context, cache=self.cache, columns=columns)
        self.pieces.append(encoding.memory)
        return encoding

    @property
    def memory(self) -> Sequence[KeyValue]:
        """What the memory layers will remember of the segment so far, `[B, Hkv, W, D]`; none before the first piece."""
        if len(self.pieces) > 1:
            layers = zip(*self.pieces, strict=True)
            self.pieces = [[KeyValue(*(torch.cat(part, dim=2) for part in zip(*kvs, strict=True))) for kvs in layers]]
        return self.pieces[0] if self.pieces else []

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        kept = [x for _, *pair in _layers(self.cache) for x in pair]
        kept += [x for piece in self.pieces for kv in piece for x in kv]
        return sum(x.nbytes for x in kept)

    def columns(self, device: torch.device) -> Tensor | None:
        """Which columns of the segment, without its context, a row has: as `which_are_there`."""
        return which_are_there(self.num_tokens, device)

    def rows(self, index: Tensor) -> OpenSegment:
        """The segment of some rows, each as often as it is named, int64 `[rows]`; a copy."""
        numbers = index.tolist()
        context, tokens = ([counts[number] for number in numbers] for counts in (self.num_context, self.num_tokens))
        width = max(sum(counts) for counts in zip(context, tokens, strict=True))
        memory = [KeyValue(*(x[index][:, :, x.shape[2] - max(tokens) :] for x in kv)) for kv in self.memory]
        return OpenSegment(context, tokens, rows_of_cache(self.cache, index, width), [memory] if memory else [])

    @classmethod
    def joined(cls, parts: Sequence[OpenSegment]) -> OpenSegment:
        """The rows of all parts, in order."""
        context, tokens = (
            [count for part in parts for count in getattr(part, name)] for name in ("num_context", "num_tokens")
        )
        sizes = [len(part.num_tokens) for part in parts]
        kept = [part.memory for part in parts]
        memory = [
            KeyValue(*(join_columns([None if not of else of[layer][kind] for of in kept], sizes) for kind in range(2)))
            for layer in range(max(len(of) for of in kept))
        ]
        return cls(context, tokens, join_caches([part.cache for part in parts], sizes), [memory] if memory else [])


def which_are_there(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Columns that rows of these lengths have, as documents: int64 `[B, W]`, -1 where there is none; None: all."""
    width = max(lengths)
    if min(lengths) == width:
        return None
    missing = width - torch.tensor(lengths, device=device)
    return torch.where(torch.arange(width, device=device) < missing[:, None], -1, 0)


def rows_of_cache(cache: DynamicCache, index: Tensor, width: int) -> DynamicCache:
    """The last `width` columns of some rows of a cache, a copy."""
    found = SegmentCache()
    for number, keys, values in _layers(cache):
        found.update(keys[index][:, :, keys.shape[2] - width :], values[index][:, :, values.shape[2] - width :], number)
    return found


def rows_of_past(past: SideNetPast, index: Tensor, width: int | None = None) -> SideNetPast:
    """The last `width` columns (None: all) of some rows of what the SideNet keeps, a copy."""
    width = past.num_tokens if width is None else width
    keys = {number: Roomy.of(key.whole[index][:, :, key.whole.shape[2] - width :]) for number, key in past.keys.items()}
    return SideNetPast(rows_of_cache(past.cache, index, width), keys)


def join_pasts(pasts: Sequence[SideNetPast], sizes: Sequence[int]) -> SideNetPast:
    """What the SideNet keeps of the rows of all parts, which have so many."""
    layers = sorted({number for past in pasts for number in past.keys})
    parts = {number: [past.keys[number].whole if number in past.keys else None for past in pasts] for number in layers}
    keys = {number: Roomy.of(join_columns(columns, sizes)) for number, columns in parts.items()}
    return SideNetPast(join_caches([past.cache for past in pasts], sizes), keys)


def join_caches(caches: Sequence[DynamicCache], sizes: Sequence[int]) -> DynamicCache:
    """A cache of the rows of all parts, which have so many."""
    parts = [{number: (keys, values) for number, keys, values in _layers(cache)} for cache in caches]
    found = SegmentCache()
    for number in sorted({number for part in parts for number in part}):
        pairs = [part.get(number, (None, None)) for part in parts]
        found.update(*(join_columns([pair[kind] for pair in pairs], sizes) for kind in range(2)), number)
    return found


def join_columns(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Tensors `[rows, H, W, D]` one below the other, filled up on the left; None: of a part that has no columns."""
    width = max(part.shape[2] for part in parts if part is not None)
    like = next(part for part in parts if part is not None)
    filled = [
        like.new_zeros(size, like.shape[1], width, like.shape[3])
        if part is None
        else F.pad(part, (0, 0, width - part.shape[2], 0))
        for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(filled)


def _layers(cache: DynamicCache) -> Iterator[tuple[int, Tensor, Tensor]]:
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            yield number, layer.keys, layer.values
