"""The log-sum-exp of a layer's local attention logits, which joint fusion needs and no attention kernel returns.

Shapes: `B` rows, `H` query heads, `Hkv` key/value heads, `T` tokens, `q` of them that ask, `D` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.masks import visible_in_segment

_BLOCK_TOKENS = 128  # bounds the logits in memory


@dataclass(frozen=True)
class LocalAttention:
    """What local attention does besides the dot product.

    Attributes:
        scale: Factor on `q k^T`.
        slopes: ALiBi slopes `[H]`, or None.
        window: Sliding window in tokens, or None.
        documents: int64 `[B, T]`, of every key, where attention must not cross documents, or None.
    """

    scale: float
    slopes: Tensor | None = None
    window: int | None = None
    documents: Tensor | None = None


def local_log_sum_exp(query: Tensor, key: Tensor, local: LocalAttention) -> Tensor:
    """Log-sum-exp, float32 `[B, H, q]`, of rotated queries and keys; has gradients.

    Args:
        query: `[B, H, q, D]`, of the last `q` tokens.
        key: `[B, Hkv, T, D]`.
        local: What attention does besides.

    Returns:
        The log-sum-exp.
    """
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        # A step of generation: nothing need be kept, and the newest token sees all before it.
        (_, logits), *_ = _blocks(query.float().unflatten(1, (key.shape[1], -1)), key.float(), local)
        return logits.logsumexp(dim=-1).flatten(1, 2)
    result: Tensor = _LogSumExp.apply(query.float(), key.float(), local)
    return result


def _blocks(query: Tensor, key: Tensor, local: LocalAttention) -> Iterator[tuple[slice, Tensor]]:
    """Masked logits `[B, Hkv, H / Hkv, t, seen]` of queries `[B, Hkv, H / Hkv, q, D]`, one block after another."""
    num_queries, length, device = query.shape[3], key.shape[2], query.device
    before = length - num_queries
    for first in range(0, num_queries, _BLOCK_TOKENS):
        rows = slice(first, min(first + _BLOCK_TOKENS, num_queries))
        places = slice(before + rows.start, before + rows.stop)
        seen = key[:, :, None, : places.stop].transpose(-1, -2)  # [B, Hkv, 1, D, seen]
        logits = torch.matmul(query[:, :, :, rows], seen).mul_(local.scale)
        if local.slopes is not None:
            index = torch.arange(places.stop, device=device)
            distance = index[places, None] - index[None, :]  # [t, seen]
            logits = logits - local.slopes.to(device).view(1, key.shape[1], -1, 1, 1) * distance
        if num_queries == 1 and local.documents is None and (local.window is None or length <= local.window):
            yield rows, logits
            continue
        # [B or 1, 1, t, T]
        mask = visible_in_segment(places, length, documents=local.documents, window=local.window, device=device)
        yield rows, logits.masked_fill_(~mask[:, :, None, :, : places.stop], float("-inf"))


class _LogSumExp(torch.autograd.Function):
    """Logits are recomputed in the backward pass: `[T, T]` is never kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, local: LocalAttention) -> Tensor:
        result = query.new_empty(query.shape[:-1])
        for rows, logits in _blocks(query.unflatten(1, (key.shape[1], -1)), key, local):
            result[:, :, rows] = logits.logsumexp(dim=-1).flatten(1, 2)  # [B, H, t]
        ctx.save_for_backward(query, key, result)
        ctx.local = local
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, result = ctx.saved_tensors
        by_kv_head = (key.shape[1], -1)
        query = query.unflatten(1, by_kv_head)  # [B, Hkv, H / Hkv, T, D]
        grad, result = grads[0].unflatten(1, by_kv_head), result.unflatten(1, by_kv_head)  # [B, Hkv, H / Hkv, T]
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for rows, logits in _blocks(query, key, ctx.local):
            weights = torch.exp(logits - result[..., rows, None]) * (grad[..., rows, None] * ctx.local.scale)
            seen = weights.shape[-1]
            grad_query[:, :, :, rows] = torch.matmul(weights, key[:, :, None, :seen])
            grad_key[:, :, :seen] += torch.einsum("bgrts,bgrtd->bgsd", weights, query[:, :, :, rows])
        return grad_query.flatten(1, 2), grad_key, None
