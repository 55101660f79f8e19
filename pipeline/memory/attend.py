"""Attention over retrieved chunks, as a partial result that others can be added to, and its backward pass.

Shapes as in `pipeline.memory.layer`; `m` units of a block that have chunks to read, `w` chunks of a unit at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.layer import NOTHING, LayerView, Queries, Tokens, row_products
from pipeline.memory.segment import at_once
from pipeline.memory.winners import Winners

LOWEST = torch.finfo(torch.float32).min  # instead of the largest logit of a query that sees nothing


@dataclass(frozen=True)
class Partial:
    """Softmax attention over some of the keys, not yet divided.

    Attributes:
        maximum: Largest logit, float32 `[m, u]`; `-inf` where nothing was read.
        total: Sum of `exp(logit - maximum)`, float32 `[m, u]`.
        weighted: Sum of `exp(logit - maximum) * value`, float32 `[m, u, D]`.

    Source:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, FlashAttention.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    def packed(self) -> Tensor:
        """All in one tensor, to travel: float32 `[m, u, D + 2]`."""
        return torch.cat([self.maximum[..., None], self.total[..., None], self.weighted], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Partial:
        """Undoes `packed`."""
        return cls(packed[..., 0], packed[..., 1], packed[..., 2:])


def attend(view: LayerView, queries: Queries, winners: Winners) -> Partial:
    """Attends to chunks of a shard.

    Args:
        view: The memory layer.
        queries: A block of queries.
        winners: What some of its units read.

    Returns:
        The partial attention of those units over the tokens of those chunks.
    """
    num_queries, dim = queries.far.shape[3:]
    shape = (len(winners.members), num_queries)
    partial = Partial(*(queries.far.new_empty(*shape, *size) for size in ((), (), (dim,))))
    for rows, piece in _pieces(view, winners):
        partial.maximum[rows], partial.total[rows], partial.weighted[rows] = _attend(view, queries, piece)
    return partial


def chunk_log_sum_exps(view: LayerView, queries: Queries, winners: Winners) -> Tensor:
    """Log-sum-exp of the logits of each chunk's tokens, float32 `[m, u, w]`; `-inf` where there is no chunk."""
    shape = (len(winners.members), queries.far.shape[3], winners.slots.shape[1])
    found = queries.far.new_full(shape, NOTHING)
    for rows, piece in _pieces(view, winners):
        logits = _tokens(view, queries, piece).logits.unflatten(-1, (-1, view.segment.chunk_size))
        found[rows, :, : piece.slots.shape[1]] = logits.logsumexp(dim=-1)
    return found


def combine(partials: list[Partial], members: list[Tensor], num_units: int) -> Partial:
    """Adds partial results over different keys up, in the order given.

    Args:
        partials: Each for some of the units; there is at least one.
        members: Which, int64 `[m]` each, no unit twice.
        num_units: `n`.

    Returns:
        The attention of all units over the keys of all of them, `[n, u]` and `[n, u, D]`.
    """
    total = partials[0].total.new_zeros(num_units, partials[0].total.shape[1])
    weighted = total.new_zeros(*total.shape, partials[0].weighted.shape[-1])
    maximum = torch.full_like(total, NOTHING)
    for partial, member in zip(partials, members, strict=True):
        maximum[member] = torch.maximum(maximum[member], partial.maximum)
    for partial, member in zip(partials, members, strict=True):
        # A query may see nothing of what is read whole: its maximum stays -inf.
        factor = torch.exp(partial.maximum - maximum[member].clamp_min(LOWEST))
        total[member] += partial.total * factor
        weighted[member] += partial.weighted * factor[..., None]
    return Partial(maximum, total, weighted)


def attend_backward(
    view: LayerView, queries: Queries, winners: Winners, *, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of attention with respect to the queries; keys and values are gathered anew, not kept.

    Args:
        view: The memory layer.
        queries: A block of queries.
        winners: What some of its units read.
        log_sum_exp: Of all logits of each of those, float32 `[m, u]`.
        offset: What is added to `grad . value` before the softmax's weight, float32 `[m, u]`: the gradient of the
            log-sum-exp minus `grad . output`.
        grad: Gradient of the divided output, float32 `[m, u, D]`.

    Returns:
        Gradient of those units' queries, before they were rotated, float32 `[m, u, D]`.
    """
    grad_query = torch.empty_like(grad)
    for rows, piece in _pieces(view, winners):
        grad_query[rows] = _attend_backward(view, queries, piece, log_sum_exp[rows], offset[rows], grad[rows])
    return grad_query


def _pieces(view: LayerView, winners: Winners) -> Iterator[tuple[Tensor | slice, Winners]]:
    """What is attended to at once, and which rows it is: all, but on a CPU."""
    num_units, width = winners.slots.shape
    if view.segment.device.type != "cpu":
        return iter([(slice(None), winners)] if num_units else [])
    return winners.pieces(at_once(num_units * width, view.keys.shape[1:].numel(), device="cpu"))


# A function of their own, so that the tokens of one piece are gone when the next one's are fetched.
def _attend(view: LayerView, queries: Queries, winners: Winners) -> tuple[Tensor, Tensor, Tensor]:
    tokens = _tokens(view, queries, winners)
    maximum = tokens.logits.amax(dim=-1)
    weights = torch.exp(tokens.logits - maximum.clamp_min(LOWEST)[..., None])  # [m, u, w * c]
    return maximum, weights.sum(dim=-1), torch.bmm(weights, tokens.value)


def _attend_backward(
    view: LayerView, queries: Queries, winners: Winners, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> Tensor:
    tokens = _tokens(view, queries, winners)
    weights = torch.exp(tokens.logits - log_sum_exp.clamp_min(LOWEST)[..., None])
    of_weight = row_products(grad, tokens.value, 1.0)
    of_logit = weights.mul_(of_weight.add_(offset[..., None])).mul_(view.geometry.scale)
    near = None
    if tokens.near_key is not None:
        assert tokens.is_near is not None
        near = torch.bmm(of_logit.masked_fill(~tokens.is_near, 0.0), tokens.near_key)
        of_logit = of_logit.masked_fill(tokens.is_near, 0.0)
    far = torch.bmm(of_logit, tokens.key)  # [m, u, D]
    return view.query_gradient(far, near, queries, winners.members)


def _tokens(view: LayerView, queries: Queries, winners: Winners) -> Tokens:
    tokens = view.tokens(queries, winners.members, winners.slots)
    hidden = ~winners.valid.repeat_interleave(view.segment.chunk_size, dim=1)
    tokens.logits.masked_fill_(hidden[:, None], NOTHING)
    return tokens
