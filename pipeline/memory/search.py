"""Exact search: each unit's best chunks by `q . mean(keys of the chunk)`, the best of its queries' scores.

Shapes as in `pipeline.memory.layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.memory.alike import Kinds
from pipeline.memory.layer import NOTHING, LayerView, Queries
from pipeline.memory.segment import Run, at_once

# Numbers of float32's size for each slot that what scores alike is chosen with: its score, twice, and its key.
_NUMBERS_OF_ALIKE = 4
MARGIN = 8  # candidates beyond the k-th whose scores are worked out again
_LOW_BITS = 32
_FLIP = 0x7FFFFFFF  # turns the bits of a negative float into an integer that grows with it


@dataclass(frozen=True)
class Retrieved:
    """The chunks that each query reads.

    Attributes:
        keys: What chunks are chosen by, larger is better, int64 `[Hkv, P, U, k']` with `k' <= k`: the float32 score in
            the upper half, the slot's order (`SegmentView.slot_order`) in the lower. No two chunks of a memory layer
            have the same key for a query, so that equal scores are decided alike however the memory is split.
        slots: int64, same shape; meaningless where nothing was found.
    """

    keys: Tensor
    slots: Tensor

    @property
    def scores(self) -> Tensor:
        """Scores, float32 `[Hkv, P, U, k']`; `-inf` where fewer chunks are visible."""
        upper = self.keys >> _LOW_BITS
        return torch.where(upper < 0, upper ^ _FLIP, upper).to(torch.int32).view(torch.float32)

    @property
    def valid(self) -> Tensor:
        """Which entries hold a chunk, bool `[Hkv, P, U, k']`."""
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


def search(view: LayerView, queries: Queries, *, unsure: list[Tensor] | None = None) -> Retrieved:
    """Finds the best visible chunks of every query.

    Args:
        view: The memory layer.
        queries: A block of queries.
        unsure: A place for flags, bool `[]`, that say whether more chunks scored alike than were looked at: then what
            was found may be wrong, and is to be searched for again without this. None: that is seen to here, for which
            the host waits for an accelerator.

    Returns:
        The `k` best (all, if fewer are visible).

    Source:
        Wang et al. 2023, section 2.3 (token-to-chunk retrieval).
    """
    with_torch = partial(_with_torch, unsure=unsure)
    backend: Callable[[LayerView, Queries, Run], Retrieved] = with_torch
    if view.segment.settings.search == "faiss":
        backend = _with_faiss
    best: Retrieved | None = None
    for run in view.segment.runs:
        # Near runs hold few slots, each with its own distance to each query: no index helps there.
        found = with_torch(view, queries, run) if run.near else backend(view, queries, run)
        best = found if best is None else _best_of(best, found, view.segment.settings.top_k_chunks)
    if best is None:
        empty = queries.far[..., 0, :0].long()
        return Retrieved(empty, empty)
    return best


def _best_of(first: Retrieved, second: Retrieved, k: int) -> Retrieved:
    keys = torch.cat([first.keys, second.keys], dim=-1)
    top = keys.topk(min(k, keys.shape[-1]), dim=-1)
    return Retrieved(top.values, torch.cat([first.slots, second.slots], dim=-1).gather(-1, top.indices))


def numbers_of_search(num_slots: int, *, k: int, unit: Sequence[int]) -> int:
    """Temporary numbers of one unit's search: scores, and candidates whose scores are worked out again.

    Args:
        num_slots: Slots of a run.
        k: Chunks wanted.
        unit: `u` and `D`.

    Returns:
        How many.
    """
    num_queries, dim = unit
    return num_queries * num_slots + min(k + MARGIN, num_slots) * 2 * dim


def search_at_once(shape: Sequence[int], of_a_unit: int, *, device: str) -> tuple[int, int]:
    """What is searched at once.

    Args:
        shape: `Hkv`, `P` and `U` of a block.
        of_a_unit: As `numbers_of_search` gives it.
        device: Type of the device.

    Returns:
        How many key/value heads, and how many units of each of their pools.
    """
    num_kv_heads, num_pools, num_units = shape
    units = at_once(num_units, num_pools * of_a_unit, device=device)
    if units < num_units:
        return 1, units
    return at_once(num_kv_heads, num_pools * num_units * of_a_unit, device=device), units


def _with_torch(view: LayerView, queries: Queries, run: Run, *, unsure: list[Tensor] | None = None) -> Retrieved:
    bound, k = view.rounding_bound(queries), view.segment.settings.top_k_chunks
    num_kv_heads, _, num_units = bound.shape
    hidden = view.segment.hidden(queries.documents, run)
    of_a_unit = numbers_of_search(run.stop - run.start, k=k, unit=queries.far.shape[3:])
    heads, units = search_at_once(bound.shape, of_a_unit, device=view.segment.device.type)
    found = Retrieved(
        *(bound.new_empty(*bound.shape, min(k, run.stop - run.start), dtype=torch.int64) for _ in range(2))
    )
    for head in range(0, num_kv_heads, heads):
        for unit in range(0, num_units, units):
            piece = slice(head, head + heads), slice(None), slice(unit, unit + units)
            unseen = None if hidden is None else hidden[piece[1:]]
            part = _of_piece(view, queries, run, piece, bound[piece], unseen, unsure)
            found.keys[piece], found.slots[piece] = part.keys, part.slots
    return found


def _of_piece(
    view: LayerView,
    queries: Queries,
    run: Run,
    piece: tuple[slice, ...],
    bound: Tensor,
    hidden: Tensor | None,
    unsure: list[Tensor] | None,
) -> Retrieved:
    """The best of a run for a piece `[heads, P, units]` of a block; `bound` and `hidden` are of that piece."""
    scores = view.run_scores(queries.part(*piece), run, piece[0])
    if hidden is not None:
        scores = scores.masked_fill(hidden, NOTHING)
    k = min(view.segment.settings.top_k_chunks, scores.shape[-1])
    top = scores.topk(min(k + MARGIN, scores.shape[-1]), dim=-1)
    members = queries.members[piece]
    best = _choose(view, queries, run, top.values.flatten(0, 2), top.indices.flatten(0, 2), members.flatten(), k)
    chosen = Retrieved(*(part.view(*bound.shape, k) for part in (best.keys, best.slots)))
    if top.values.shape[-1] == scores.shape[-1]:
        return chosen  # there are no others
    open_ended = _is_open(top.values, bound, k)
    if unsure is not None:
        unsure.append(open_ended.any())
    elif bool(open_ended.any()):
        # More chunks than the margin score alike: look at all of them, in no more space than the scores take.
        for head, pool in open_ended.any(dim=-1).nonzero().tolist():
            kinds = view.kinds(run, piece[0].start + head, pool)
            for units in open_ended[head, pool].nonzero()[:, 0].split(max(1, bound.numel() // _NUMBERS_OF_ALIKE)):
                asked = head, pool, units
                lowest = top.values[asked][:, k - 1] - bound[asked]
                again = _choose_of_alike(view, queries, run, kinds, scores[asked], lowest, members[asked], k)
                chosen.keys[asked], chosen.slots[asked] = again.keys, again.slots
    return chosen


def _choose(
    view: LayerView, queries: Queries, run: Run, scores: Tensor, indices: Tensor, members: Tensor, k: int
) -> Retrieved:
    """Decides between candidates `[n, w]` of a run by scores that round alike wherever a chunk lies; `[n, k]`."""
    slots = indices + run.start
    exact = view.chunk_scores(queries, members, slots, near=run.near)
    exact = exact.masked_fill(scores == NOTHING, NOTHING)
    best = sort_keys(exact, view.segment.slot_order[slots]).topk(k, dim=-1)
    return Retrieved(best.values, slots.gather(-1, best.indices))


def _choose_of_alike(
    view: LayerView,
    queries: Queries,
    run: Run,
    kinds: Kinds,
    scores: Tensor,
    lowest: Tensor,
    members: Tensor,
    k: int,
) -> Retrieved:
    """As `_choose`, between all slots whose scores `[n, s]` reach a lowest one `[n]`; one of a kind is scored again."""
    best = scores.new_full((len(scores), len(kinds.firsts)), NOTHING)
    best.scatter_reduce_(-1, kinds.of_row.expand_as(scores), scores, "amax")
    most = int((best >= lowest[:, None]).sum(dim=-1).max())
    reached = best.topk(most, dim=-1, sorted=False).indices  # [n, most]
    slots, count = kinds.firsts[reached] + run.start, max(1, scores.numel() // (most * queries.far.shape[-1]))
    parts = zip(members.split(count), slots.split(count), strict=True)
    exact = torch.cat([view.chunk_scores(queries, *part, near=run.near) for part in parts])
    keys = sort_keys(exact, torch.zeros_like(reached))
    of_kinds = keys.new_full(best.shape, EMPTY_KEY).scatter_(-1, reached, keys)
    of_slots = of_kinds.index_select(-1, kinds.of_row).masked_fill_(scores == NOTHING, EMPTY_KEY)
    found = of_slots.add_(view.segment.slot_order[run.start : run.stop]).topk(k, dim=-1)
    return Retrieved(found.values, found.indices + run.start)


def _is_open(scores: Tensor, bound: Tensor, k: int) -> Tensor:
    """Queries whose last candidate may be as good as their `k`-th, bool `[Hkv, P, U]`.

    Args:
        scores: Candidates' scores, best first, `[Hkv, P, U, w]`.
        bound: As `rounding_bound` gives it, `[Hkv, P, U]`.
        k: Chunks wanted.

    Returns:
        The queries.
    """
    is_open = scores[..., -1] >= scores[..., k - 1] - bound
    return is_open & (scores[..., -1] != NOTHING)


def _with_faiss(view: LayerView, queries: Queries, run: Run) -> Retrieved:
    """The far part of the search by faiss's exact inner-product search, on the host; units of one query."""
    num_slots, (num_kv_heads, num_pools, num_queries, *_) = run.stop - run.start, queries.far.shape
    k = min(view.segment.settings.top_k_chunks, num_slots)
    scores = torch.full((num_kv_heads, num_pools, num_queries, min(k + MARGIN, num_slots)), NOTHING)
    indices = torch.zeros(scores.shape, dtype=torch.int64)
    chunk_keys, far = view.chunk_keys[:, :, run.start : run.stop].cpu(), queries.far[..., 0, :].cpu()
    hidden = view.segment.hidden(queries.documents, run)
    for pool in range(num_pools):
        for members, columns in _searched_together(
            None if hidden is None else hidden[pool].cpu(), num_queries, num_slots
        ):
            for head in range(num_kv_heads if len(columns) else 0):
                value, index = _knn(far[head, pool, members], chunk_keys[head, pool, columns], scores.shape[-1])
                scores[head, pool, members, : value.shape[-1]] = value * view.geometry.scale
                indices[head, pool, members, : value.shape[-1]] = columns[index]
    scores, indices = scores.to(view.segment.device), indices.to(view.segment.device)
    if scores.shape[-1] < num_slots and bool(_is_open(scores, view.rounding_bound(queries), k).any()):
        return _with_torch(view, queries, run)  # faiss decides between equal scores in its own way
    everyone = queries.members.flatten()
    chosen = _choose(view, queries, run, scores.flatten(0, 2), indices.flatten(0, 2), everyone, k)
    return Retrieved(*(part.view(*queries.far.shape[:3], k) for part in (chosen.keys, chosen.slots)))


def _searched_together(hidden: Tensor | None, num_queries: int, num_slots: int) -> list[tuple[Tensor, Tensor]]:
    """Queries of a pool that see the same slots of a run, and those slots; `hidden` bool `[U, s]`."""
    if hidden is None:
        return [(torch.arange(num_queries), torch.arange(num_slots))]
    kinds, kind_of_query = hidden.unique(dim=0, return_inverse=True)
    return [((kind_of_query == kind).nonzero()[:, 0], (~unseen).nonzero()[:, 0]) for kind, unseen in enumerate(kinds)]


def _knn(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` keys `[s, D]` with the largest inner product with each query `[n, D]`: scores and indices `[n, k']`."""
    import faiss

    value, index = faiss.knn(
        queries.contiguous().numpy(), keys.contiguous().numpy(), min(k, len(keys)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(value), torch.from_numpy(index)
