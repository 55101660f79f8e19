"""A segment that is read in pieces: what the backbone keeps of it, so that the next tokens cost only themselves.

Shapes: `B` rows, `q` tokens that are read now.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.encoding import Encoding
from pipeline.model.longmem import LongMem
from pipeline.sidenet.past import SideNetPast


@dataclass
class OpenSegment:
    """The open segment of rows that stand at the same place in it.

    Attributes:
        cache: Keys and values of the backbone's own attention, of left context and segment.
        num_context: Tokens of left context.
        num_tokens: Tokens of the segment that were read.
    """

    cache: DynamicCache = field(default_factory=DynamicCache)
    num_context: int = 0
    num_tokens: int = 0

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
        encoding = model.encode(tokens, None, num_context=num_context, cache=self.cache)
        self.num_context += num_context
        self.num_tokens += tokens.shape[1] - num_context
        return encoding

    def rows(self, index: Tensor) -> OpenSegment:
        """The segment of some rows, each as often as it is named, int64 `[rows]`; a copy."""
        return OpenSegment(rows_of_cache(self.cache, index), self.num_context, self.num_tokens)


def rows_of_cache(cache: DynamicCache, index: Tensor) -> DynamicCache:
    """Some rows of a cache, a copy."""
    found = DynamicCache()
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            found.update(layer.keys[index], layer.values[index], number)
    return found


def rows_of_past(past: SideNetPast, index: Tensor) -> SideNetPast:
    """Some rows of what the SideNet keeps, a copy."""
    keys = {number: key[index] for number, key in past.keys.items()}
    return SideNetPast(
        rows_of_cache(past.cache, index), keys, None if past.documents is None else past.documents[index]
    )
