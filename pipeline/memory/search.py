"""Exact search: each query's best chunks by `q . mean(keys of the chunk)`.

Shapes as in `pipeline.memory.view`; `s` slots of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.memory.scores import chosen_scores, rounding_bound, run_scores
from pipeline.memory.view import MemoryView, Queries, Run, at_once

NOTHING = float("-inf")
MARGIN = 8  # candidates beyond the k-th whose scores are worked out again
_LOW_BITS = 32
_FLIP = 0x7FFFFFFF  # turns the bits of a negative float into an integer that grows with it


@dataclass(frozen=True)
class Retrieved:
    """The chunks that each query reads.

    Attributes:
        keys: What chunks are chosen by, larger is better, int64 `[Hkv, R, N, k']` with `k' <= k`: the float32 score in
            the upper half, the slot's order (`MemoryView.slot_order`) in the lower. No two chunks of a memory layer
            have the same key for a query, so that equal scores are decided alike however the memory is split.
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


def sort_keys(scores: Tensor, order: Tensor) -> Tensor:
    """Packs scores and slot orders into keys.

    Args:
        scores: float32 `[...]`; `-inf`: nothing, and so is what is not a number: all ranks must count it alike.
        order: int64, broadcastable to it, from 0 to 2^31 - 1.

    Returns:
        int64 `[...]`; equal scores are ordered by `order`.
    """
    scores = scores.nan_to_num(nan=NOTHING, posinf=float("inf"), neginf=NOTHING)
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


def numbers_of_search(num_slots: int, *, k: int, dim: int) -> int:
    """Temporary numbers of one query's search: scores, and candidates whose scores are worked out again.

    Args:
        num_slots: Slots of a run.
        k: Chunks wanted.
        dim: `D`.

    Returns:
        How many.
    """
    return num_slots + min(k + MARGIN, num_slots) * 2 * dim


def _with_torch(view: MemoryView, queries: Queries, run: Run) -> Retrieved:
    bound = rounding_bound(view, queries)
    num_kv_heads, num_slots = len(bound), run.stop - run.start
    of_a_query = numbers_of_search(num_slots, k=view.settings.top_k_chunks, dim=queries.far.shape[-1])
    step = at_once(num_kv_heads, bound[0].numel() * of_a_query, device=view.device.type)
    found = [
        _of_heads(view, queries, run, slice(first, first + step), bound[first : first + step])
        for first in range(0, num_kv_heads, step)
    ]
    return Retrieved(torch.cat([part.keys for part in found]), torch.cat([part.slots for part in found]))


def _of_heads(view: MemoryView, queries: Queries, run: Run, heads: slice, bound: Tensor) -> Retrieved:
    """The best of a run for some key/value heads; `bound` `[heads, R, N]` as `rounding_bound` gives it."""
    scores = run_scores(view, queries.of_heads(heads), run, heads)
    if view.settings.scope == "document":
        same = queries.documents[:, :, None] == view.slot_documents[:, None, run.start : run.stop]
        scores = scores.masked_fill(~same, NOTHING)
    k = min(view.settings.top_k_chunks, scores.shape[-1])
    top = scores.topk(min(k + MARGIN, scores.shape[-1]), dim=-1)
    members = torch.arange(bound.numel(), device=view.device) + heads.start * bound[0].numel()
    chosen = _choose(view, queries, run, top.values.flatten(0, 2), top.indices.flatten(0, 2), members, k)
    open_ended = _is_open(top.values, bound, k)
    if open_ended is not None and top.values.shape[-1] < scores.shape[-1]:
        # More chunks than the margin score alike: look at all of them, in no more space than the scores take.
        lowest = (top.values[..., k - 1] - bound).flatten()[:, None]
        rows, asked = scores.flatten(0, 2), open_ended.flatten().nonzero()[:, 0]
        most = int((rows >= lowest).sum(dim=-1)[asked].max())
        for part in asked.split(max(1, scores.numel() // (most * 2 * queries.far.shape[-1]))):
            alike = rows[part].topk(most, dim=-1)
            again = _choose(view, queries, run, alike.values, alike.indices, members[part], k)
            chosen.keys[part], chosen.slots[part] = again.keys, again.slots
    return Retrieved(*(part.view(*bound.shape, k) for part in (chosen.keys, chosen.slots)))


def _choose(
    view: MemoryView, queries: Queries, run: Run, scores: Tensor, indices: Tensor, members: Tensor, k: int
) -> Retrieved:
    """Decides between candidates `[n, w]` of a run by scores that round alike wherever a chunk lies; `[n, k]`."""
    slots = indices + run.start
    exact = chosen_scores(view, queries, slots, members, near=run.near)
    exact = exact.masked_fill(scores == NOTHING, NOTHING)
    best = sort_keys(exact, view.slot_order[slots]).topk(k, dim=-1)
    return Retrieved(best.values, slots.gather(-1, best.indices))


def _is_open(scores: Tensor, bound: Tensor, k: int) -> Tensor | None:
    """Queries whose last candidate may be as good as their `k`-th, bool `[Hkv, R, N]`; None: no query.

    Args:
        scores: Candidates' scores, best first, `[Hkv, R, N, w]`.
        bound: As `rounding_bound` gives it, `[Hkv, R, N]`.
        k: Chunks wanted.

    Returns:
        The queries.
    """
    is_open = scores[..., -1] >= scores[..., k - 1] - bound
    is_open &= scores[..., -1] != NOTHING
    return is_open if bool(is_open.any()) else None


def _with_faiss(view: MemoryView, queries: Queries, run: Run) -> Retrieved:
    """The far part of the search by faiss's exact inner-product search, on the host."""
    num_slots = run.stop - run.start
    k = min(view.settings.top_k_chunks, num_slots)
    scores = torch.full((*queries.far.shape[:-1], min(k + MARGIN, num_slots)), NOTHING)
    indices = torch.zeros(scores.shape, dtype=torch.int64)
    chunk_keys, far = view.chunk_keys[:, :, run.start : run.stop].cpu(), queries.far.cpu()
    for row in range(view.num_rows):
        for members, columns in _searched_together(view, queries, run, row):
            for head in range(view.num_kv_heads if len(columns) else 0):
                value, index = _knn(far[head, row, members], chunk_keys[head, row, columns], scores.shape[-1])
                scores[head, row, members, : value.shape[-1]] = value * view.geometry.scale
                indices[head, row, members, : value.shape[-1]] = columns[index]
    scores, indices = scores.to(view.device), indices.to(view.device)
    if scores.shape[-1] < num_slots and _is_open(scores, rounding_bound(view, queries), k) is not None:
        return _with_torch(view, queries, run)  # faiss decides between equal scores in its own way
    everyone = torch.arange(queries.far.shape[:-1].numel(), device=view.device)
    chosen = _choose(view, queries, run, scores.flatten(0, 2), indices.flatten(0, 2), everyone, k)
    return Retrieved(*(part.view(*queries.far.shape[:-1], k) for part in (chosen.keys, chosen.slots)))


def _searched_together(view: MemoryView, queries: Queries, run: Run, row: int) -> list[tuple[Tensor, Tensor]]:
    """Queries of a row and the slots of a run that all of them see: by document under that scope, else all."""
    members, columns = torch.arange(queries.far.shape[2]), torch.arange(run.stop - run.start)
    if view.settings.scope != "document":
        return [(members, columns)]
    wanted, stored = queries.documents[row].cpu(), view.slot_documents[row, run.start : run.stop].cpu()
    return [(members[wanted == document], columns[stored == document]) for document in wanted.unique()]


def _knn(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` keys `[s, D]` with the largest inner product with each query `[n, D]`: scores and indices `[n, k']`."""
    import faiss

    value, index = faiss.knn(
        queries.contiguous().numpy(), keys.contiguous().numpy(), min(k, len(keys)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(value), torch.from_numpy(index)
