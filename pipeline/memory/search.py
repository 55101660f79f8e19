"""Exact search: each query's best chunks by `q . mean(keys of the chunk)`.

Shapes as in `pipeline.memory.view`; `s` slots of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.memory.view import MemoryView, Queries, Run

NOTHING = float("-inf")
_LOW_BITS = 32
_FLIP = 0x7FFFFFFF  # turns the bits of a negative float into an integer that grows with it


@dataclass(frozen=True)
class Retrieved:
    """The chunks that each query reads.

    Attributes:
        keys: What chunks are chosen by, larger is better, int64 `[Hkv, R, N, k']` with `k' <= k`: the float32 score in
            the upper half, the slot's order (`MemoryView.slot_order`) in the lower. No two chunks of a memory layer have
            the same key for a query, so that equal scores are decided alike however the memory is split.
        slots: int64, same shape; meaningless where nothing was found.
    """

    keys: Tensor
    slots: Tensor

    @property
    def scores(self) -> Tensor:
        """Scores, float32 `[Hkv, R, N, k']`; `-inf` where fewer chunks are visible."""
        upper = self.keys >> _LOW_BITS
        return torch.where(upper < 0, upper ^ _FLIP, upper).to(torch.int32).view(torch.float32)

    @property
    def valid(self) -> Tensor:
        """Which entries hold a chunk, bool `[Hkv, R, N, k']`."""
        return self.scores != NOTHING

    def padded(self, k: int) -> Retrieved:
        """The same with exactly `k` entries a query.

        Args:
            k: Not less than `k'`.

        Returns:
            What was found, and nothing in the other entries.
        """
        missing = k - self.keys.shape[-1]
        if missing == 0:
            return self
        return Retrieved(F.pad(self.keys, (0, missing), value=EMPTY_KEY), F.pad(self.slots, (0, missing)))

    def at_least(self, threshold: Tensor) -> Retrieved:
        """Keeps what reaches a threshold.

        Args:
            threshold: Smallest key kept, int64 `[Hkv, R, N]`.

        Returns:
            The same entries, those below the threshold emptied.
        """
        return Retrieved(self.keys.masked_fill(self.keys < threshold[..., None], EMPTY_KEY), self.slots)


def sort_keys(scores: Tensor, order: Tensor) -> Tensor:
    """Packs scores and slot orders into keys.

    Args:
        scores: float32 `[...]`; `-inf`: nothing.
        order: int64, broadcastable to it, from 0 to 2^31 - 1.

    Returns:
        int64 `[...]`; equal scores are ordered by `order`.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: the two zeros are equal scores
    return (torch.where(bits < 0, bits ^ _FLIP, bits) << _LOW_BITS) + order


EMPTY_KEY = int(sort_keys(torch.tensor(NOTHING), torch.tensor(0)))


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
        empty = queries.far[..., :0].long()
        return Retrieved(empty, empty)
    return best


def _best_of(first: Retrieved, second: Retrieved, k: int) -> Retrieved:
    keys = torch.cat([first.keys, second.keys], dim=-1)
    top = keys.topk(min(k, keys.shape[-1]), dim=-1)
    return Retrieved(top.values, torch.cat([first.slots, second.slots], dim=-1).gather(-1, top.indices))


def _with_torch(view: MemoryView, queries: Queries, run: Run) -> Retrieved:
    scores = _near_scores(view, queries, run) if run.near else _far_scores(view, queries, run)
    if view.settings.scope == "document":
        same = queries.documents[:, :, None] == view.slot_documents[:, None, run.start : run.stop]
        scores = scores.masked_fill(~same, NOTHING)
    k, order = min(view.settings.top_k_chunks, scores.shape[-1]), view.slot_order[run.start : run.stop]
    # One more than asked for: where the last two are equal, which of them is in must be decided by order.
    top = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    keys, slots = sort_keys(top.values, order[top.indices])[..., :k], top.indices[..., :k]
    tied = _is_tied(top.values, k)
    if tied is not None:
        exact = sort_keys(scores[tied], order).topk(k, dim=-1)
        keys[tied], slots[tied] = exact.values, exact.indices
    return Retrieved(keys, slots + run.start)


def _is_tied(values: Tensor, k: int) -> Tensor | None:
    """Which queries have the same score at ranks `k` and `k + 1`, bool `[Hkv, R, N]`; None: no query."""
    if values.shape[-1] <= k:
        return None
    tied = (values[..., k - 1] == values[..., k]) & (values[..., k] != NOTHING)
    return tied if bool(tied.any()) else None


def _far_scores(view: MemoryView, queries: Queries, run: Run) -> Tensor:
    """Scores of a run by unrotated keys, `[Hkv, R, N, s]`."""
    chunk_keys = view.chunk_keys[:, :, run.start : run.stop]
    scores = torch.matmul(queries.far, chunk_keys.transpose(-1, -2)).mul_(view.geometry.scale)
    bias = view.distance_bias(_far_distance(view), queries)
    return scores if bias is None else scores.add_(bias)


def _far_distance(view: MemoryView) -> Tensor:
    return torch.full((1, 1, 1, 1), float(view.rule.distance), device=view.device)


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
    k = min(view.settings.top_k_chunks, run.stop - run.start)
    scores = torch.full((*queries.far.shape[:-1], min(k + 1, run.stop - run.start)), NOTHING)
    slots = torch.zeros(scores.shape, dtype=torch.int64)
    chunk_keys, far = view.chunk_keys[:, :, run.start : run.stop].cpu(), queries.far.cpu()
    for row in range(view.num_rows):
        for members, columns in _searched_together(view, queries, run, row):
            for head in range(view.num_kv_heads if len(columns) else 0):
                value, index = _knn(far[head, row, members], chunk_keys[head, row, columns], scores.shape[-1])
                scores[head, row, members, : value.shape[-1]] = value * view.geometry.scale
                slots[head, row, members, : value.shape[-1]] = columns[index]
    if _is_tied(scores, k) is not None:
        return _with_torch(view, queries, run)  # faiss decides between equal scores in its own way
    scores, slots = scores[..., :k].to(view.device), slots[..., :k].to(view.device) + run.start
    bias = view.distance_bias(_far_distance(view), queries)
    return Retrieved(sort_keys(scores if bias is None else scores + bias, view.slot_order[slots]), slots)


def _searched_together(view: MemoryView, queries: Queries, run: Run, row: int) -> list[tuple[Tensor, Tensor]]:
    """Queries of a row and the slots of a run that all of them see: by document under that scope, else all."""
    members, columns = torch.arange(queries.far.shape[2]), torch.arange(run.stop - run.start)
    if view.settings.scope != "document":
        return [(members, columns)]
    wanted, stored = queries.documents[row].cpu(), view.slot_documents[row, run.start : run.stop].cpu()
    return [(members[wanted == document], columns[stored == document]) for document in wanted.unique()]


def _knn(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` keys `[s, D]` with the largest inner product with each query `[n, D]`: scores and indices `[n, k']`."""
    import faiss  # noqa: PLC0415  only those who choose it need it

    value, index = faiss.knn(
        queries.contiguous().numpy(), keys.contiguous().numpy(), min(k, len(keys)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(value), torch.from_numpy(index)
