"""Scores of chunks, two ways: all of a run at once, fast; or of chosen chunks, always with the same rounding.

A matrix product rounds differently with the place and number of its rows, so that chunks that are alike, and they are
common, get scores that differ in the last bits, differently for every split of the memory. Which chunks are retrieved
is therefore decided by scores that are summed in one fixed order.

Shapes as in `pipeline.memory.view`; `s` slots of a run, `n` chosen queries, `w` chosen slots of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.memory.view import MemoryView, Queries, Run

# Bound on how far the two ways differ, in units of |query| |key|: sums of 64 to 256 products in float32.
ROUNDING = 4e-6


def run_scores(view: MemoryView, queries: Queries, run: Run, heads: slice) -> Tensor:
    """Scores of all slots of a run, by a matrix product.

    Args:
        view: The memory layer.
        queries: A block of queries, of some heads.
        run: The slots.
        heads: Which key/value heads those are.

    Returns:
        float32 `[Hkv, R, N, s]`.
    """
    if not run.near:
        return _far(view, queries, run, heads)
    distance = (queries.offset[:, None] - _centre(view, slice(run.start, run.stop)))[None, None]  # [1, 1, N, s]
    chunk_keys, first = view.chunk_keys, run.start
    if view.geometry.encoding.inv_freq is not None:
        chunk_keys, first = view.near_chunk_keys, int(view.near_index[run.start])
    assert queries.near is not None
    chunk_keys = chunk_keys[heads, :, first : first + run.stop - run.start]
    scores = torch.matmul(queries.near * view.geometry.scale, chunk_keys.transpose(-1, -2))
    bias = view.distance_bias(distance, queries)
    scores = scores if bias is None else scores.add_(bias)
    if view.rule.kind == "true":
        return scores
    return torch.where(distance <= view.rule.near_limit, scores, _far(view, queries, run, heads))


def chosen_scores(view: MemoryView, queries: Queries, slots: Tensor, members: Tensor, *, near: bool) -> Tensor:
    """Scores of some slots for some queries, each summed in the same order wherever it stands.

    Args:
        view: The memory layer.
        queries: A block of queries.
        slots: int64 `[n, w]`.
        members: Which queries, as numbers in the flattened `[Hkv, R, N]`, int64 `[n]`.
        near: Whether the slots belong to a near run.

    Returns:
        float32 `[n, w]`.
    """
    num_queries = queries.far.shape[2]
    rows = torch.div(members, num_queries, rounding_mode="floor")[:, None]  # head and row of the bank
    slopes = view.slopes_of(queries, members)

    def scores(query: Tensor, keys: Tensor, index: Tensor, distance: Tensor) -> Tensor:
        chosen = keys.flatten(0, 2).index_select(0, index.flatten()).view(*slots.shape, -1)
        found = (chosen * query.flatten(0, 2)[members, None]).sum(dim=-1) * view.geometry.scale
        return found if slopes is None else found - slopes * distance

    far_distance = torch.tensor(float(view.rule.distance), device=view.device)
    far = scores(queries.far, view.chunk_keys, rows * view.num_slots + slots, far_distance)
    if not near:
        return far
    distance = queries.offset[members % num_queries, None] - _centre(view, slots)
    assert queries.near is not None
    keys, index = view.chunk_keys, rows * view.num_slots + slots
    if view.geometry.encoding.inv_freq is not None:
        keys, index = view.near_chunk_keys, rows * len(view.near_slots) + view.near_index[slots]
    return torch.where(distance <= view.rule.near_limit, scores(queries.near, keys, index, distance), far)


def rounding_bound(view: MemoryView, queries: Queries) -> Tensor:
    """How far two chunks that score alike one way may be apart the other way: twice what one score may differ.

    Args:
        view: The memory layer.
        queries: A block of queries.

    Returns:
        float32 `[Hkv, R, N]`.
    """
    factor = 2 * ROUNDING * view.geometry.scale * view.geometry.encoding.attention_scaling
    bound = queries.far.norm(dim=-1) * view.largest_key[..., None] * factor
    if queries.slopes is None:
        return bound
    return bound + queries.slopes * (view.settings.num_tokens + view.rule.distance) * 2.0**-21  # adding ALiBi's bias


def far_distance(view: MemoryView) -> Tensor:
    """The distance of far keys, float32 `[1, 1, 1, 1]`.

    Args:
        view: The memory layer.

    Returns:
        Tokens.
    """
    return torch.full((1, 1, 1, 1), float(view.rule.distance), device=view.device)


def _far(view: MemoryView, queries: Queries, run: Run, heads: slice) -> Tensor:
    chunk_keys = view.chunk_keys[heads, :, run.start : run.stop]
    scores = torch.matmul(queries.far * view.geometry.scale, chunk_keys.transpose(-1, -2))
    bias = view.distance_bias(far_distance(view), queries)
    return scores if bias is None else scores.add_(bias)


def _centre(view: MemoryView, slots: Tensor | slice) -> Tensor:
    """Place of a chunk's middle, in tokens from the segment's start."""
    return view.slot_offset[slots] + (view.chunk_size - 1) / 2
