"""Attention over retrieved chunks, as a partial result that others can be added to, and its backward pass.

Shapes as in `pipeline.memory.view`; `n = Hkv * R * N` queries, `k` chunks of a query, `c` tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.search import NOTHING, Retrieved
from pipeline.memory.view import MemoryView, Queries


@dataclass(frozen=True)
class Partial:
    """Softmax attention over some of the keys, not yet divided.

    Attributes:
        maximum: Largest logit, float32 `[Hkv, R, N]`; `-inf` where nothing was retrieved.
        total: Sum of `exp(logit - maximum)`, float32 `[Hkv, R, N]`.
        weighted: Sum of `exp(logit - maximum) * value`, float32 `[Hkv, R, N, D]`.

    Source:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, FlashAttention.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    def packed(self) -> Tensor:
        """All in one tensor, to travel: float32 `[Hkv, R, N, D + 2]`."""
        return torch.cat([self.maximum[..., None], self.total[..., None], self.weighted], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Partial:
        """Undoes `packed`.

        Args:
            packed: float32 `[Hkv, R, N, D + 2]`.

        Returns:
            The partial result.
        """
        return cls(packed[..., 0], packed[..., 1], packed[..., 2:])


@dataclass(frozen=True)
class _Gathered:
    """Retrieved tokens: keys, values `[n, k * c, D]`, logits `[n, k * c]`; near keys and which tokens they serve."""

    key: Tensor
    value: Tensor
    logits: Tensor
    near_key: Tensor | None
    is_near: Tensor | None


def attend(view: MemoryView, queries: Queries, retrieved: Retrieved) -> Partial:
    """Attends to the retrieved chunks.

    Args:
        view: The memory layer.
        queries: A block of queries.
        retrieved: What they retrieved.

    Returns:
        The partial attention over the tokens of those chunks.
    """
    shape = queries.far.shape[:-1]
    if retrieved.slots.shape[-1] == 0:
        empty = queries.far.new_zeros(shape)
        return Partial(empty + NOTHING, empty, torch.zeros_like(queries.far))
    tokens = _gather(view, queries, retrieved)
    maximum = tokens.logits.amax(dim=-1)
    weights = torch.exp(tokens.logits - maximum.clamp_min(torch.finfo(torch.float32).min)[:, None])
    weighted = torch.bmm(weights[:, None], tokens.value)[:, 0]
    return Partial(maximum.view(shape), weights.sum(dim=-1).view(shape), weighted.view(queries.far.shape))


def combine(partials: list[Partial]) -> Partial:
    """Adds partial results over different keys up, in the order given.

    Args:
        partials: One or more, for the same queries.

    Returns:
        The attention over the keys of all of them.
    """
    maximum = torch.stack([partial.maximum for partial in partials]).amax(dim=0)
    finite = torch.where(maximum == NOTHING, 0.0, maximum)
    factors = [torch.exp(partial.maximum - finite) for partial in partials]
    total = sum(partial.total * factor for partial, factor in zip(partials, factors, strict=True))
    weighted = sum(partial.weighted * factor[..., None] for partial, factor in zip(partials, factors, strict=True))
    assert isinstance(total, Tensor) and isinstance(weighted, Tensor)
    return Partial(maximum, total, weighted)


def attend_backward(
    view: MemoryView, queries: Queries, retrieved: Retrieved, *, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradient of attention with respect to the queries; keys and values are gathered anew, not kept.

    Args:
        view: The memory layer.
        queries: A block of queries.
        retrieved: What they retrieved.
        log_sum_exp: Of all logits of each query, float32 `[Hkv, R, N]`; finite.
        offset: What is added to `grad . value` before the softmax's weight, float32 `[Hkv, R, N]`: the gradient of
            the log-sum-exp minus `grad . output`.
        grad: Gradient of the divided output, float32 `[Hkv, R, N, D]`.

    Returns:
        Gradients of `queries.far` and of `queries.near` (None where there are none), `[Hkv, R, N, D]`.
    """
    shape = queries.far.shape
    if retrieved.slots.shape[-1] == 0:
        nothing = torch.zeros_like(grad)
        return nothing, None if queries.near is None else nothing
    tokens = _gather(view, queries, retrieved)
    weights = torch.exp(tokens.logits - log_sum_exp.reshape(-1, 1))
    of_weight = _dot(tokens.value, grad.reshape(-1, shape[-1]))
    of_logit = weights.mul_(of_weight.add_(offset.reshape(-1, 1))).mul_(view.geometry.scale)
    if tokens.near_key is None:
        return torch.bmm(of_logit[:, None], tokens.key).view(shape), None
    assert tokens.is_near is not None
    far = torch.bmm(of_logit.masked_fill(tokens.is_near, 0.0)[:, None], tokens.key).view(shape)
    near = torch.bmm(of_logit.masked_fill(~tokens.is_near, 0.0)[:, None], tokens.near_key).view(shape)
    return far, near


def token_distance(view: MemoryView, queries: Queries, retrieved: Retrieved) -> Tensor:
    """Real distance from each query to each retrieved token.

    Args:
        view: The memory layer.
        queries: A block of queries.
        retrieved: What they retrieved.

    Returns:
        int64 `[Hkv, R, N, k, c]`.
    """
    position = view.slot_offset[retrieved.slots][..., None] + torch.arange(view.chunk_size, device=view.device)
    return queries.offset[:, None, None] - position


def _gather(view: MemoryView, queries: Queries, retrieved: Retrieved) -> _Gathered:
    rows = torch.arange(view.num_kv_heads * view.num_rows, device=view.device)
    rows = rows.view(view.num_kv_heads, view.num_rows, 1, 1)
    slots = (rows * view.num_slots + retrieved.slots).flatten()
    num_queries, dim = queries.far.shape[:-1].numel(), queries.far.shape[-1]
    key = view.keys.index_select(0, slots).view(num_queries, -1, dim).float()
    value = view.values.index_select(0, slots).view(num_queries, -1, dim).float()
    logits = _dot(key, queries.far.reshape(num_queries, dim))
    near_key = is_near = distance = None
    if queries.near is not None:
        near_key = key
        if view.geometry.encoding.inv_freq is not None:
            near_slots = (rows * len(view.near_slots) + view.near_index[retrieved.slots]).flatten()
            near_key = view.near_keys.index_select(0, near_slots).view(num_queries, -1, dim)
        distance = token_distance(view, queries, retrieved)
        is_near = (distance <= view.rule.near_limit).flatten(3).view(num_queries, -1)
        near_logits = _dot(near_key, queries.near.reshape(num_queries, dim))
        logits = torch.where(is_near, near_logits, logits)
    logits = logits.mul_(view.geometry.scale)
    bias = _bias(view, queries, distance)
    if bias is not None:
        shape = (*queries.far.shape[:-1], retrieved.slots.shape[-1], view.chunk_size)
        logits = logits + bias.expand(shape).reshape(logits.shape)
    hidden = ~retrieved.valid[..., None].expand(*retrieved.slots.shape, view.chunk_size).reshape(logits.shape)
    return _Gathered(key, value, logits.masked_fill_(hidden, NOTHING), near_key, is_near)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of `rows` `[n, t, D]` with one `vector` `[n, D]` each, `[n, t]`."""
    if rows.device.type == "cpu":  # three times as fast there as a batch of matrix-vector products
        return (rows * vector[:, None]).sum(dim=-1)
    return torch.bmm(rows, vector[..., None])[..., 0]


def _bias(view: MemoryView, queries: Queries, distance: Tensor | None) -> Tensor | None:
    """ALiBi's bias of each retrieved token, broadcastable to `[Hkv, R, N, k, c]`; None for other encodings."""
    far = torch.full((1, 1, 1, 1, 1), float(view.rule.distance), device=view.device)
    effective = far if distance is None else torch.where(distance <= view.rule.near_limit, distance.float(), far)
    return view.distance_bias(effective, queries)
