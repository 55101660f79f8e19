"""What the SideNet keeps of a segment that is read in pieces, so that the next tokens cost no more than themselves.

Shapes: `B` rows, `Hkv` key/value heads, `n` tokens that were read, `q` that are read now, `D` head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.cache import Roomy, SegmentCache
from pipeline.backbone.masks import document_mask


@dataclass
class SideNetPast:
    """The tokens of each row's segment that the SideNet has read, the newest in the last column.

    Attributes:
        cache: Keys and values of its layers' own attention.
        keys: Keys of memory layers, rotated to their places, float32 `[B, Hkv, n, D]`, by index among them.
        documents: int64 `[B, n + q]`, 0 where a token is and -1 where a row has none; None: all are there.
    """

    cache: DynamicCache = field(default_factory=SegmentCache)
    keys: dict[int, Roomy] = field(default_factory=dict)
    documents: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """`n`, before a call; `n + q` after it."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return layers[0].get_seq_length() if layers else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values)) + sum(
            key.whole.nbytes for key in self.keys.values()
        )

    def mask(self, num_queries: int, *, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """The additive mask `[B or 1, 1, q, n + q]` of a layer; None where every query sees every token.

        Args:
            num_queries: `q`.
            num_keys: `n + q`.
            window: Of a layer whose attention slides, in tokens.
            like: A tensor of the dtype and on the device of the mask.

        Returns:
            The mask.
        """
        if self.documents is None and num_queries == 1 and (window is None or num_keys <= window):
            return None
        documents = self.documents
        if documents is None:
            documents = torch.zeros(1, num_keys, dtype=torch.int64, device=like.device)
        return document_mask(documents, dtype=like.dtype, window=window, num_queries=num_queries)

    def places(self, index: int, num_queries: int, *, device: torch.device) -> Tensor | int:
        """Places in their row's segment of the `q` tokens that come now: int64 `[q]` or `[B, 1, q]`, or that of one."""
        if self.documents is not None:
            return ((self.documents == 0).cumsum(dim=1) - 1)[:, None, -num_queries:]
        kept = self.keys.get(index)
        first = 0 if kept is None else kept.whole.shape[2]
        return first if num_queries == 1 else torch.arange(first, first + num_queries, device=device)

    def extended(self, index: int, key: Tensor) -> Tensor:
        """Adds the rotated keys of new tokens, `[B, Hkv, q, D]`, of a memory layer: all of them."""
        return self.keys.setdefault(index, Roomy()).add(key)
