"""Attention over retrieved chunks, as a partial result that others can be added to, and its backward pass.

Shapes as in `pipeline.memory.view`; `m` queries of a block that have chunks to read, `w` chunks of a query at most, `c`
tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.search import NOTHING
from pipeline.memory.view import MemoryView, Queries, at_once
from pipeline.memory.winners import Winners


@dataclass(frozen=True)
class Partial:
    """Softmax attention over some of the keys, not yet divided.

    Attributes:
        maximum: Largest logit, float32 `[m]`; `-inf` where nothing was read.
        total: Sum of `exp(logit - maximum)`, float32 `[m]`.
        weighted: Sum of `exp(logit - maximum) * value`, float32 `[m, D]`.

    Source:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, FlashAttention.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    def packed(self) -> Tensor:
        """All in one tensor, to travel: float32 `[m, D + 2]`."""
        return torch.cat([self.maximum[:, None], self.total[:, None], self.weighted], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Partial:
        """Undoes `packed`.

        Args:
            packed: float32 `[m, D + 2]`.

        Returns:
            The partial result.
        """
        return cls(packed[:, 0], packed[:, 1], packed[:, 2:])


@dataclass(frozen=True)
class _Fetched:
    """Retrieved tokens: keys, values `[m, w * c, D]`, logits `[m, w * c]`; near keys and which tokens they serve."""

    key: Tensor
    value: Tensor
    logits: Tensor
    near_key: Tensor | None
    is_near: Tensor | None


def attend(view: MemoryView, queries: Queries, winners: Winners) -> Partial:
    """Attends to chunks of a shard.

    Args:
        view: The memory layer.
        queries: A block of queries.
        winners: What some of them read.

    Returns:
        The partial attention of those queries over the tokens of those chunks.
    """
    num_queries = len(winners.members)
    partial = Partial(*(queries.far.new_empty(num_queries, *size) for size in ((), (), queries.far.shape[-1:])))
    for rows, piece in _pieces(view, winners):
        partial.maximum[rows], partial.total[rows], partial.weighted[rows] = _attend(view, queries, piece)
    return partial


def combine(partials: list[Partial], members: list[Tensor], num_queries: int) -> Partial:
    """Adds partial results over different keys up, in the order given.

    Args:
        partials: Each for some of the queries.
        members: Which, int64 `[m]` each, no query twice.
        num_queries: `n`.

    Returns:
        The attention of all queries over the keys of all of them, `[n]` and `[n, D]`.
    """
    total = partials[0].total.new_zeros(num_queries)
    weighted = total.new_zeros(num_queries, partials[0].weighted.shape[-1])
    maximum = torch.full_like(total, NOTHING)
    for partial, member in zip(partials, members, strict=True):
        maximum[member] = torch.maximum(maximum[member], partial.maximum)
    for partial, member in zip(partials, members, strict=True):
        factor = torch.exp(partial.maximum - maximum[member])
        total[member] += partial.total * factor
        weighted[member] += partial.weighted * factor[:, None]
    return Partial(maximum, total, weighted)


def attend_backward(
    view: MemoryView, queries: Queries, winners: Winners, *, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of attention with respect to the queries; keys and values are fetched anew, not kept.

    Args:
        view: The memory layer.
        queries: A block of queries.
        winners: What some of them read.
        log_sum_exp: Of all logits of each of those, float32 `[m]`; finite.
        offset: What is added to `grad . value` before the softmax's weight, float32 `[m]`: the gradient of the
            log-sum-exp minus `grad . output`.
        grad: Gradient of the divided output, float32 `[m, D]`.

    Returns:
        Gradient of those queries, before they were rotated, float32 `[m, D]`.
    """
    grad_query = torch.empty_like(grad)
    for rows, piece in _pieces(view, winners):
        grad_query[rows] = _attend_backward(view, queries, piece, log_sum_exp[rows], offset[rows], grad[rows])
    return grad_query


def token_distance(view: MemoryView, queries: Queries, winners: Winners) -> Tensor:
    """Real distance from each query to each token that it reads.

    Args:
        view: The memory layer.
        queries: A block of queries.
        winners: What some of them read.

    Returns:
        int64 `[m, w, c]`.
    """
    position = view.slot_offset[winners.slots][..., None] + torch.arange(view.chunk_size, device=view.device)
    return queries.offset[winners.members % len(queries.offset)][:, None, None] - position


def _pieces(view: MemoryView, winners: Winners) -> Iterator[tuple[Tensor | slice, Winners]]:
    """What is attended to at once, and which rows it is: all, but on a CPU."""
    num_queries, width = winners.slots.shape
    if view.device.type != "cpu":
        return iter([(slice(None), winners)] if num_queries else [])
    return winners.pieces(at_once(num_queries * width, view.keys[0].numel(), device="cpu"))


# A function of their own, so that the tokens of one piece are gone when the next one's are fetched.
def _attend(view: MemoryView, queries: Queries, winners: Winners) -> tuple[Tensor, Tensor, Tensor]:
    tokens = _fetch(view, queries, winners)
    maximum = tokens.logits.amax(dim=-1)
    weights = torch.exp(tokens.logits - maximum[:, None])
    return maximum, weights.sum(dim=-1), torch.bmm(weights[:, None], tokens.value)[:, 0]


def _attend_backward(
    view: MemoryView, queries: Queries, winners: Winners, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> Tensor:
    tokens = _fetch(view, queries, winners)
    weights = torch.exp(tokens.logits - log_sum_exp[:, None])
    of_weight = _dot(tokens.value, grad)
    of_logit = weights.mul_(of_weight.add_(offset[:, None])).mul_(view.geometry.scale)
    near = None
    if tokens.near_key is not None:
        assert tokens.is_near is not None
        near = torch.bmm(of_logit.masked_fill(~tokens.is_near, 0.0)[:, None], tokens.near_key)[:, 0]
        of_logit = of_logit.masked_fill(tokens.is_near, 0.0)
    far = torch.bmm(of_logit[:, None], tokens.key)[:, 0]
    return view.query_gradient(far, near, queries, winners.members)


def _fetch(view: MemoryView, queries: Queries, winners: Winners) -> _Fetched:
    members, (num_queries, width) = winners.members, winners.slots.shape
    rows = torch.div(members, len(queries.offset), rounding_mode="floor")[:, None]  # head and row of the bank
    slots = (rows * view.num_slots + winners.slots).flatten()
    dim = queries.far.shape[-1]
    key = view.keys.index_select(0, slots).view(num_queries, -1, dim).float()
    value = view.values.index_select(0, slots).view(num_queries, -1, dim).float()
    logits = _dot(key, queries.far.flatten(0, 2)[members])
    near_key = is_near = distance = None
    if queries.near is not None:
        near_key = key
        if view.geometry.encoding.inv_freq is not None:
            near_slots = (rows * len(view.near_slots) + view.near_index[winners.slots]).flatten()
            near_key = view.near_keys.index_select(0, near_slots).view(num_queries, -1, dim)
        distance = token_distance(view, queries, winners).flatten(1)
        is_near = distance <= view.rule.near_limit
        near_logits = _dot(near_key, queries.near.flatten(0, 2)[members])
        logits = torch.where(is_near, near_logits, logits)
    logits = logits.mul_(view.geometry.scale)
    slopes = view.slopes_of(queries, winners.members)
    if slopes is not None:
        far = torch.full((1, 1), float(view.rule.distance), device=view.device)
        effective = far if distance is None or is_near is None else torch.where(is_near, distance.float(), far)
        logits = logits - slopes * effective
    hidden = ~winners.valid[..., None].expand(-1, width, view.chunk_size).reshape(logits.shape)
    return _Fetched(key, value, logits.masked_fill_(hidden, NOTHING), near_key, is_near)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of `rows` `[n, t, D]` with one `vector` `[n, D]` each, `[n, t]`."""
    if rows.device.type == "cpu":  # three times as fast there as a batch of matrix-vector products
        return (rows * vector[:, None]).sum(dim=-1)
    return torch.bmm(rows, vector[..., None])[..., 0]
