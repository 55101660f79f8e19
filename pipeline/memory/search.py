"""Exact search: each query's best chunks by `q . mean(keys of the chunk)`.

Shapes as in `pipeline.memory.view`; `s` slots of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.view import MemoryView, Queries, Run

NOTHING = float("-inf")


@dataclass(frozen=True)
class Retrieved:
    """The chunks that each query reads, best first.

    Attributes:
        scores: float32 `[Hkv, R, N, k']`, with `k' <= k`; `-inf` where fewer chunks are visible.
        slots: int64, same shape; meaningless where the score is `-inf`.
    """

    scores: Tensor
    slots: Tensor

    @property
    def valid(self) -> Tensor:
        """Which entries hold a chunk, bool `[Hkv, R, N, k']`."""
        return self.scores != NOTHING


def search(view: MemoryView, queries: Queries) -> Retrieved:
    """Finds the best visible chunks of every query.

    Args:
        view: The memory layer.
        queries: A block of queries.

    Returns:
        The `k` best (all, if fewer are visible).

    Source:
        Wang et al. 2023, section 2.3 (token-to-chunk retrieval).
    """
    backend: Callable[[MemoryView, Queries, Run], Retrieved] = _with_torch
    if view.settings.search == "faiss":
        backend = _with_faiss
    best: Retrieved | None = None
    for run in view.runs:
        # Near runs hold few slots, each with its own distance to each query: no index helps there.
        found = _with_torch(view, queries, run) if run.near else backend(view, queries, run)
        best = found if best is None else _best_of(best, found, view.settings.top_k_chunks)
    if best is None:
        empty = queries.far[..., :0]
        return Retrieved(empty, empty.long())
    return best


def _best_of(first: Retrieved, second: Retrieved, k: int) -> Retrieved:
    scores = torch.cat([first.scores, second.scores], dim=-1)
    top = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return Retrieved(top.values, torch.cat([first.slots, second.slots], dim=-1).gather(-1, top.indices))


def _with_torch(view: MemoryView, queries: Queries, run: Run) -> Retrieved:
    scores = _near_scores(view, queries, run) if run.near else _far_scores(view, queries, run)
    if view.settings.scope == "document":
        same = queries.documents[:, :, None] == view.slot_documents[:, None, run.start : run.stop]
        scores = scores.masked_fill(~same, NOTHING)
    top = scores.topk(min(view.settings.top_k_chunks, scores.shape[-1]), dim=-1)
    return Retrieved(top.values, top.indices + run.start)


def _far_scores(view: MemoryView, queries: Queries, run: Run) -> Tensor:
    """Scores of a run by unrotated keys, `[Hkv, R, N, s]`."""
    chunk_keys = view.chunk_keys[:, :, run.start : run.stop]
    scores = torch.matmul(queries.far, chunk_keys.transpose(-1, -2)).mul_(view.geometry.scale)
    far = torch.full((1, 1, 1, 1), float(view.rule.distance), device=scores.device)
    bias = view.distance_bias(far, queries)
    return scores if bias is None else scores.add_(bias)


def _near_scores(view: MemoryView, queries: Queries, run: Run) -> Tensor:
    """Scores of a run with each chunk's real distance (up to the rule's limit), `[Hkv, R, N, s]`."""
    centre = view.slot_offset[run.start : run.stop] + (view.chunk_size - 1) / 2
    distance = (queries.offset[:, None] - centre)[None, None]  # [1, 1, N, s]
    chunk_keys, first = view.chunk_keys, run.start
    if view.geometry.encoding.inv_freq is not None:
        chunk_keys, first = view.near_chunk_keys, int(view.near_index[run.start])
    assert queries.near is not None
    chunk_keys = chunk_keys[:, :, first : first + run.stop - run.start]
    scores = torch.matmul(queries.near, chunk_keys.transpose(-1, -2)).mul_(view.geometry.scale)
    bias = view.distance_bias(distance, queries)
    scores = scores if bias is None else scores.add_(bias)
    if view.rule.kind == "true":
        return scores
    return torch.where(distance <= view.rule.near_limit, scores, _far_scores(view, queries, run))


def _with_faiss(view: MemoryView, queries: Queries, run: Run) -> Retrieved:
    """The far part of the search by faiss's exact inner-product search, on the host."""
    by_document = view.settings.scope == "document"
    num_found = min(view.settings.top_k_chunks, run.stop - run.start)
    scores = torch.full((*queries.far.shape[:-1], num_found), NOTHING)
    slots = torch.zeros(scores.shape, dtype=torch.int64)
    chunk_keys, far = view.chunk_keys[:, :, run.start : run.stop].cpu(), queries.far.cpu()
    for row in range(view.num_rows):
        every = torch.arange(run.stop - run.start)
        groups = [(torch.arange(far.shape[2]), every)]
        if by_document:
            wanted, stored = queries.documents[row].cpu(), view.slot_documents[row, run.start : run.stop].cpu()
            groups = [((wanted == d).nonzero()[:, 0], every[stored == d]) for d in wanted.unique()]
        for members, columns in groups:
            for head in range(view.num_kv_heads if len(columns) else 0):
                keys = chunk_keys[head, row] if not by_document else chunk_keys[head, row, columns]
                value, index = _knn(far[head, row, members], keys, num_found)
                scores[head, row, members, : value.shape[-1]] = value * view.geometry.scale
                slots[head, row, members, : value.shape[-1]] = columns[index] + run.start
    found = Retrieved(scores.to(view.device), slots.to(view.device))
    far_distance = torch.full((1, 1, 1, 1), float(view.rule.distance), device=view.device)
    bias = view.distance_bias(far_distance, queries)
    return found if bias is None else Retrieved(found.scores + bias, found.slots)


def _knn(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` keys `[s, D]` with the largest inner product with each query `[n, D]`: scores and indices `[n, k']`."""
    import faiss  # noqa: PLC0415  only those who choose it need it

    value, index = faiss.knn(
        queries.contiguous().numpy(), keys.contiguous().numpy(), min(k, len(keys)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(value), torch.from_numpy(index)
