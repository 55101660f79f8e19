"""Reading for a few queries of one bank, as a step of generation asks: the same chunks, in a tenth of the calls.

What `search` and `attend` do for blocks of queries is worked out here in one go. Which chunks are read is decided by a
matrix product alone; where its rounding could matter, `search` decides.

Shapes: `B` rows, `H` query heads, `Hkv` key/value heads, `q` tokens, `D` head size, `U` units of `u` queries of a
key/value head, `S` visible chunks of `c` tokens, `k` chunks that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.memory.layer import LayerView
from pipeline.memory.reader import MemoryRead
from pipeline.memory.search import search

MOST_QUERIES = 16  # tokens of all rows


def can_read(view: LayerView, recent: Sequence[LayerView], *, num_tokens: int) -> bool:
    """Whether a bank can be read so: for few queries, without ALiBi, hidden chunks, or any at their real distance."""
    views = [view, *recent]
    few = num_tokens * len(view.segment.reading.documents) <= MOST_QUERIES
    plain = view.geometry.encoding.slopes is None and all(each.segment.hides_nothing for each in views)
    return few and plain and bool(view.segment.runs) and not any(run.near for run in view.segment.runs)


def read_few(view: LayerView, recent: Sequence[LayerView], query: Tensor) -> MemoryRead:
    """Reads a bank.

    Args:
        view: The memory layer as it is searched.
        recent: The same as it is read whole; none: there is no window.
        query: Unrotated queries, float32 `[B, H, q, D]`, on the bank's device.

    Returns:
        What `SourcesReader.read` returns.
    """
    segment, scale = view.segment, view.geometry.scale
    sizes = {"num_heads": query.shape[1], "num_tokens": query.shape[2]}
    tokens = slice(0, query.shape[2])
    by_pool = segment.pools.by_pool(segment.rule.far_query(query, view.geometry.encoding))  # [Hkv, 1, U, u, D]
    num_kv_heads, _, num_units, num_queries, dim = by_pool.shape
    far = by_pool[:, 0]
    asked = far.flatten(1, 2) * scale  # [Hkv, U * u, D]
    keys = [view.chunk_keys[:, 0, run.start : run.stop] for run in segment.runs]
    scores = torch.cat([torch.matmul(asked, of_run.transpose(1, 2)) for of_run in keys], dim=-1)
    scores = scores.unflatten(1, (num_units, num_queries))  # [Hkv, U, u, S]
    scores = scores[:, :, 0] if num_queries == 1 else scores.amax(dim=2)
    k = min(segment.settings.top_k_chunks, scores.shape[-1])
    best = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    is_sure = best.values.shape[-1] == k  # all are read
    if not is_sure:
        # A gap that is wider than what two scores may be off together says which chunks are the best.
        off = view.rounding_of(by_pool)[:, 0].amax(dim=-1)  # [Hkv, U]
        is_sure = bool((best.values[..., k - 1] - best.values[..., k] > off).all())
    if is_sure:
        slots = segment.visible_slots[best.indices[..., :k]]  # [Hkv, U, k]
    else:
        slots = search(view, view.queries(query, tokens)).slots[:, 0]
    heads = torch.arange(num_kv_heads, device=slots.device)[:, None, None] * segment.num_slots
    index = (slots + heads).flatten()
    units = num_kv_heads * num_units
    key, value = (x.index_select(0, index).view(units, -1, dim).float() for x in (view.keys, view.values))
    logits = torch.bmm(far.reshape(units, num_queries, dim) * scale, key.transpose(1, 2))
    found = _attended(view, logits, value, sizes)
    if not recent:
        return found
    window = recent[0]
    places = segment.reading.first if query.shape[2] == 1 else segment.offsets(tokens)
    near = window.segment.pools.by_pool(view.geometry.encoding.rotate(query, places))[:, 0].flatten(1, 2)
    of_window = torch.bmm(near * scale, window.window_keys[:, 0].transpose(1, 2))  # [Hkv, U * u, w]
    return replace(found, window=_attended(window, of_window, window.window_values[:, 0], sizes))


def _attended(view: LayerView, logits: Tensor, values: Tensor, sizes: dict[str, int]) -> MemoryRead:
    """Softmax over logits `[m, n, w]` and what it weighs `[m, w, D]`, row by row."""
    log_sum_exp, pools = logits.logsumexp(dim=-1), view.segment.pools
    read = torch.bmm(torch.exp(logits - log_sum_exp[..., None]), values)
    return MemoryRead(pools.by_row(read, **sizes), pools.by_row(log_sum_exp, **sizes))
