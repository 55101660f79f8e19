"""Which tokens of its own segment a query may attend to."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_in_segment(
    rows: slice, length: int, *, documents: Tensor | None, window: int | None, device: torch.device
) -> Tensor:
    """Whether the queries of `rows` see each token of the segment: causal, within a window, within a document.

    Args:
        rows: The query tokens.
        length: `T`.
        documents: Document of each token, int64 `[B, T]`, or None when attention may cross documents.
        window: Number of tokens, the query's own among them, that a layer with a sliding window sees; or None.
        device: Where the mask is made.

    Returns:
        bool `[B or 1, 1, len(rows), T]`.
    """
    index = torch.arange(length, device=device)
    distance = index[rows, None] - index[None, :]  # [len(rows), T]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if documents is None:
        return visible[None, None]  # [1, 1, len(rows), T]
    return visible[None, None] & (documents[:, None, rows, None] == documents[:, None, None, :])  # [B, 1, len(rows), T]


def document_mask(
    documents: Tensor, *, dtype: torch.dtype, window: int | None, num_queries: int | None = None
) -> Tensor:
    """Additive mask of documents `[B, T]`: 0 where attention sees, the lowest number elsewhere.

    Args:
        documents: Document of each token.
        dtype: Of the mask.
        window: As in `visible_in_segment`.
        num_queries: How many of the last tokens ask; None: all.

    Returns:
        `[B, 1, num_queries, T]`.
    """
    length = documents.shape[1]
    rows = slice(0 if num_queries is None else length - num_queries, length)
    visible = visible_in_segment(rows, length, documents=documents, window=window, device=documents.device)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
