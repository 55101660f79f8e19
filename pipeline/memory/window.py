"""Attention over the recent window: the last tokens before a segment, read whole, at their real distance.

Shapes as in `pipeline.memory.layer`; `n` units of a block, `w` tokens of the window that this shard holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.memory.attend import LOWEST, Partial
from pipeline.memory.layer import LayerView, Queries


def attend_window(view: LayerView, queries: Queries) -> Partial:
    """Attends to all of a window that a shard holds.

    Args:
        view: The window's view of the memory layer.
        queries: A block of queries.

    Returns:
        The partial attention of all units, `[n, u]` and `[n, u, D]`; `n = Hkv * P * U`.
    """
    logits = view.window_logits(queries)  # [Hkv, P, U * u, w]
    maximum = logits.amax(dim=-1)
    weights = torch.exp(logits - maximum.clamp_min(LOWEST)[..., None])
    weighted = torch.matmul(weights, view.window_values)
    units = queries.far.shape[:4]
    found = (x.view(*units, *x.shape[3:]).flatten(0, 2) for x in (maximum, weights.sum(dim=-1), weighted))
    return Partial(*found)


def attend_window_backward(
    view: LayerView, queries: Queries, *, log_sum_exp: Tensor, offset: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of `attend_window`'s attention with respect to the queries.

    Args:
        view: As above.
        queries: As above.
        log_sum_exp: Of all logits of each query, of the whole group's window, float32 `[n, u]`.
        offset: As in `attend_backward`, float32 `[n, u]`.
        grad: Gradient of the divided output, float32 `[n, u, D]`.

    Returns:
        Gradient of the unrotated queries, float32 `[n, u, D]`.
    """
    num_kv_heads, num_pools, num_units, num_queries, dim = queries.far.shape
    by_pool = (num_kv_heads, num_pools, num_units * num_queries)
    weights = view.window_logits(queries)
    weights = weights.sub_(log_sum_exp.view(*by_pool, 1).clamp_min(LOWEST)).exp_()
    of_weight = torch.matmul(grad.view(*by_pool, dim), view.window_values.transpose(-1, -2))
    of_logit = weights.mul_(of_weight.add_(offset.view(*by_pool, 1))).mul_(view.geometry.scale)
    near = torch.matmul(of_logit, view.window_keys).view(-1, num_queries, dim)
    places = queries.offset.repeat(num_kv_heads * num_pools)[:, None]
    return view.geometry.encoding.rotate(near, -places)
