"""One memory layer as the queries of one segment see it: their logits against its chunks and tokens.

Chunks are scored two ways: all of a run at once, fast; or chosen ones, always with the same rounding. A matrix product
rounds differently with the place and number of its rows, so that chunks that are alike, and they are common, get scores
that differ in the last bits, differently for every split of the memory. Which chunks are retrieved is therefore decided
by scores that are summed in one fixed order.

Shapes as in `pipeline.memory.segment` and `pipeline.memory.pools`; `D` head size, `s` slots of a run, `m` chosen units,
`w` chosen slots of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.memory.alike import Kinds, kinds_of
from pipeline.memory.bank import LayerStore
from pipeline.memory.segment import Run, SegmentView
from pipeline.positions import PositionEncoding, PositionRule

NOTHING = float("-inf")  # logit of what is not there, or must not be seen
# A float32 sum of D products is off by at most D of these, in units of |query| |key|, in whatever order it is taken.
ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Geometry:
    """What a memory layer's attention does besides the dot product.

    Attributes:
        encoding: Its position encoding.
        scale: Its factor on `q k^T`.
    """

    encoding: PositionEncoding
    scale: float

    def rule(self, wanted: PositionRule) -> PositionRule:
        """The rule that memory is read by: `none` in a layer that knows no distances."""
        has_positions = self.encoding.inv_freq is not None or self.encoding.slopes is not None
        return wanted if has_positions else PositionRule("none")


@dataclass(frozen=True)
class Queries:
    """A block of queries, sorted by key/value head, pool and unit.

    Attributes:
        far: Queries against unrotated keys, float32 `[Hkv, P, U, u, D]`.
        near: Queries rotated to their place in the segment, same shape; None where no key is read at its distance.
        offset: Place of each unit in its segment, int64 `[U]`.
        documents: Document of each unit, int64 `[P, U]`.
        slopes: ALiBi slope of each query's head, float32 `[Hkv, P, U, u]`, or None.
    """

    far: Tensor
    near: Tensor | None
    offset: Tensor
    documents: Tensor
    slopes: Tensor | None

    @property
    def members(self) -> Tensor:
        """The number of each unit, as units are named everywhere, int64 `[Hkv, P, U]`."""
        shape = self.far.shape[:3]
        return torch.arange(shape.numel(), device=self.far.device).view(shape)

    def part(self, heads: slice, pools: slice, units: slice) -> Queries:
        """Those of some key/value heads, pools and units."""
        near, slopes = (None if x is None else x[heads, pools, units] for x in (self.near, self.slopes))
        far, documents = self.far[heads, pools, units], self.documents[pools, units]
        return Queries(far, near, self.offset[units], documents, slopes)


@dataclass(frozen=True)
class Tokens:
    """Retrieved tokens: keys, values `[m, w * c, D]`, logits `[m, u, w * c]`; near keys, and which tokens are near.

    `is_near` is bool `[m, 1, w * c]`.
    """

    key: Tensor
    value: Tensor
    logits: Tensor
    near_key: Tensor | None
    is_near: Tensor | None


class _Asked(NamedTuple):
    """Queries, far and near `[..., D]`, and ALiBi's slopes `[..., 1]` or None."""

    far: Tensor
    near: Tensor | None
    slopes: Tensor | None


Product = Callable[[Tensor, Tensor, float], Tensor]
"""Scaled inner products of queries and keys."""


class LayerView:
    """Keys and values of one memory layer. Reading a view changes nothing.

    Args:
        segment: What holds for all layers.
        store: The layer's rings.
        geometry: The layer's attention.
    """

    def __init__(self, segment: SegmentView, store: LayerStore, geometry: Geometry) -> None:
        self.segment, self.geometry = segment, geometry
        num_kv_heads, _, _, chunk_size, dim = store.keys.shape
        self.chunk_keys = store.chunk_keys.view(num_kv_heads, segment.pools.num_pools, segment.num_slots, dim)
        self.keys = store.keys.view(-1, chunk_size, dim)  # [Hkv * P * S, c, D]
        self.values = store.values.view(-1, chunk_size, dim)
        self._kinds: dict[tuple[Run, int, int], Kinds] = {}
        # Keys that are read at their real distance, rotated once for all queries of the segment, and before a read
        # holds anything: float32 [Hkv * P * n, c, D].
        self.near_keys = self.keys[:0]
        if self.is_rotary and len(segment.near_slots):
            keys, places = self._of_near(self.keys).float(), self._places(segment.near_slots)
            self.near_keys = geometry.encoding.rotate(keys, places).flatten(0, 2)

    @cached_property
    def near_chunk_keys(self) -> Tensor:
        """Chunk keys of near slots at their places, float32 `[Hkv, P, n, D]`; a window's chunks are never scored."""
        slots = self.segment.near_slots
        return self.geometry.encoding.rotate(self.chunk_keys[:, :, slots], self._centre(slots))

    @property
    def is_rotary(self) -> bool:
        """Whether a key at its real distance is another one than far away."""
        return self.geometry.encoding.inv_freq is not None

    @cached_property
    def largest_key(self) -> Tensor:
        """Length of the longest chunk key that is searched, float32 `[Hkv, P]`; there is one."""
        longest = [self.chunk_keys[:, :, run.start : run.stop].norm(dim=-1).amax(dim=-1) for run in self.segment.runs]
        return torch.stack(longest).amax(dim=0)

    def kinds(self, run: Run, head: int, pool: int) -> Kinds:
        """The slots of a run, of a key/value head and pool, by what every query scores the same; numbered from 0."""
        which = run, head, pool
        if which not in self._kinds:
            keys = self.chunk_keys[head, pool, run.start : run.stop]
            each = torch.arange(len(keys), device=keys.device)
            # What is near is scored by its own distance to a query.
            self._kinds[which] = Kinds(each, each) if run.near else kinds_of(keys)
        return self._kinds[which]

    def queries(self, query: Tensor, tokens: slice) -> Queries:
        """Prepares a block of the segment's queries.

        Args:
            query: Unrotated queries of the block, float32 `[B, H, t, D]`.
            tokens: Which of the segment's queries they are.

        Returns:
            The block, sorted, rotated for far and for near keys.
        """
        segment, encoding, num_heads = self.segment, self.geometry.encoding, query.shape[1]
        offset = segment.offsets(tokens)
        far = segment.pools.by_pool(segment.rule.far_query(query, encoding))
        slopes = encoding.slopes
        if slopes is not None:
            of_queries = slopes.to(query.device)[:, None].expand(len(query), -1, len(offset))  # [B, H, t]
            slopes = segment.pools.by_pool(of_queries)
        return Queries(
            far=far,
            near=segment.pools.by_pool(encoding.rotate(query, offset)) if len(segment.near_slots) else None,
            offset=offset.repeat(far.shape[2] // len(offset)),
            documents=segment.documents(tokens, num_heads=num_heads),
            slopes=slopes,
        )

    def query_gradient(self, grad_far: Tensor, grad_near: Tensor | None, queries: Queries, members: Tensor) -> Tensor:
        """Gradient of some queries before `queries` rotated them.

        Args:
            grad_far: Gradient of their rows of `Queries.far`, float32 `[m, u, D]`.
            grad_near: Gradient of their rows of `Queries.near`, or None.
            queries: The block.
            members: Which units, as numbers in the flattened `[Hkv, P, U]`, int64 `[m]`.

        Returns:
            Gradient of the unrotated queries, float32 `[m, u, D]`.
        """
        encoding = self.geometry.encoding
        # A rotation's transpose is the rotation by the opposite angle.
        grad = self.segment.rule.far_query(grad_far, encoding, backward=True)
        if grad_near is not None:
            grad = grad + encoding.rotate(grad_near, -queries.offset[members % len(queries.offset), None])
        return grad

    def run_scores(self, queries: Queries, run: Run, heads: slice) -> Tensor:
        """Scores of all slots of a run, by a matrix product: of a unit the best of its queries'.

        Args:
            queries: A block of queries, of some heads.
            run: The slots.
            heads: Which key/value heads those are.

        Returns:
            float32 `[Hkv, P, U, s]`.
        """
        asked = _Asked(queries.far, queries.near, None if queries.slopes is None else queries.slopes[..., None])
        slots = slice(run.start, run.stop)
        keys = near_keys = self.chunk_keys[heads, :, slots]
        if not run.near:
            return _best_of_unit(self._logits(asked, keys, None, None, _all_products), dim=3)
        if self.is_rotary:
            among_near = slice(run.near_start, run.near_start + run.stop - run.start)
            near_keys = self.near_chunk_keys[heads, :, among_near]
        distance = (queries.offset[:, None] - self._centre(slots))[:, None]  # [U, 1, s]
        return _best_of_unit(self._logits(asked, keys, near_keys, distance, _all_products), dim=3)

    def chunk_scores(self, queries: Queries, members: Tensor, slots: Tensor, *, near: bool) -> Tensor:
        """Scores of some chunks for some units, each summed in the same order wherever it stands.

        Args:
            queries: A block of queries.
            members: Which units, as numbers in the flattened `[Hkv, P, U]`, int64 `[m]`.
            slots: int64 `[m, w]`.
            near: Whether the slots belong to a near run.

        Returns:
            float32 `[m, w]`.
        """
        keys = self._rows(self.chunk_keys.flatten(0, 2), self._in_layer(queries, members, slots))
        distance = near_keys = None
        if near:
            distance = (queries.offset[members % len(queries.offset), None] - self._centre(slots))[:, None]
            near_keys = keys
            if self.is_rotary:
                near_keys = self._rows(self.near_chunk_keys.flatten(0, 2), self._in_near(queries, members, slots))
        return _best_of_unit(
            self._logits(_chosen(queries, members), keys, near_keys, distance, _ordered_products), dim=1
        )

    def tokens(self, queries: Queries, members: Tensor, slots: Tensor) -> Tokens:
        """What some units attend to in some chunks.

        Args:
            queries: A block of queries.
            members: As in `chunk_scores`.
            slots: int `[m, w]`.

        Returns:
            Keys, values and logits.
        """
        index = self._in_layer(queries, members, slots)
        key = self._rows(self.keys, index).flatten(1, 2).float()  # [m, w * c, D]
        value = self._rows(self.values, index).flatten(1, 2).float()
        near_key = is_near = distance = None
        if queries.near is not None:
            near_key = key
            if self.is_rotary:
                near_key = self._rows(self.near_keys, self._in_near(queries, members, slots)).flatten(1, 2)
            distance = self.token_distance(queries, members, slots).flatten(1)[:, None]  # [m, 1, w * c]
            is_near = distance <= self.segment.rule.near_limit
        logits = self._logits(_chosen(queries, members), key, near_key, distance, row_products)
        return Tokens(key, value, logits, near_key, is_near)

    @cached_property
    def window_keys(self) -> Tensor:
        """Keys of all near slots at their real distance, float32 `[Hkv, P, n * c, D]`."""
        keys = self.near_keys if self.is_rotary else self._of_near(self.keys).float()
        return keys.view(*self.chunk_keys.shape[:2], -1, keys.shape[-1])

    @cached_property
    def window_values(self) -> Tensor:
        """Values of all near slots, float32 `[Hkv, P, n * c, D]`."""
        values = self._of_near(self.values)
        return values.float().view(*self.chunk_keys.shape[:2], -1, values.shape[-1])

    def window_logits(self, queries: Queries) -> Tensor:
        """Logits of a block against all tokens of near slots, each at its real distance.

        Args:
            queries: A block of queries.

        Returns:
            float32 `[Hkv, P, U * u, n * c]`; NOTHING where a query must not see a token.
        """
        segment = self.segment
        assert queries.near is not None
        logits = _all_products(queries.near, self.window_keys, self.geometry.scale)  # [Hkv, P, U, u, n * c]
        if queries.slopes is not None:
            places = self._places(segment.near_slots).flatten()
            logits = _biased(logits, queries.slopes[..., None], (queries.offset[:, None] - places)[:, None])
        masks = [segment.hidden(queries.documents, run) for run in segment.runs]
        if any(mask is not None for mask in masks):
            unseen = torch.cat([mask for mask in masks if mask is not None], dim=-1)  # [P, U, n]
            logits = logits.masked_fill(unseen.repeat_interleave(segment.chunk_size, dim=-1)[:, :, None], NOTHING)
        return logits.flatten(2, 3)

    def token_distance(self, queries: Queries, members: Tensor, slots: Tensor) -> Tensor:
        """Real distance from some units to the tokens of some chunks, int64 `[m, w, c]`; arguments as `tokens`."""
        return queries.offset[members % len(queries.offset)][:, None, None] - self._places(slots)

    def rounding_bound(self, queries: Queries) -> Tensor:
        """How far two chunks that score alike one way may be apart the other way: twice what one score may differ.

        Args:
            queries: A block of queries.

        Returns:
            float32 `[Hkv, P, U]`.
        """
        bound = self.rounding_of(queries.far)  # [Hkv, P, U, u]
        if queries.slopes is not None:
            farthest = self.segment.settings.num_tokens + self.segment.rule.distance
            bound = bound + queries.slopes * farthest * 2.0**-21  # adding ALiBi's bias
        return _best_of_unit(bound, dim=3)  # the best of some is off by no more than the one that is off most

    def rounding_of(self, far: Tensor) -> Tensor:
        """The same for queries `[Hkv, P, U, u, D]` themselves, without ALiBi, float32 `[Hkv, P, U, u]`."""
        # Two scores, each worked out in two ways, and scaled.
        rounding = 4 * (far.shape[-1] + 4) * ROUNDING
        factor = rounding * self.geometry.scale * self.geometry.encoding.attention_scaling
        return far.norm(dim=-1) * self.largest_key[..., None, None] * factor

    def _logits(
        self, asked: _Asked, keys: Tensor, near_keys: Tensor | None, distance: Tensor | None, product: Product
    ) -> Tensor:
        """Logits of queries against keys: near ones at their real distance, the others at the rule's.

        Args:
            asked: The queries.
            keys: Unrotated keys.
            near_keys: The same keys, rotated; None: all are far.
            distance: Tokens between query and key; None: all are far.
            product: How queries and keys are multiplied.

        Returns:
            What `product` returns, with ALiBi's bias where there is one.
        """
        rule, scale = self.segment.rule, self.geometry.scale
        near = None
        if near_keys is not None and distance is not None:
            assert asked.near is not None
            near = _biased(product(asked.near, near_keys, scale), asked.slopes, distance)
            if rule.kind == "true":
                return near
        far = _biased(product(asked.far, keys, scale), asked.slopes, float(rule.distance))
        return far if near is None or distance is None else torch.where(distance <= rule.near_limit, near, far)

    def _of_near(self, tokens: Tensor) -> Tensor:
        """Near slots of `keys` or `values`, `[Hkv, P, n, c, D]`."""
        return tokens.view(*self.chunk_keys.shape[:3], *tokens.shape[1:])[:, :, self.segment.near_slots]

    def _in_layer(self, queries: Queries, members: Tensor, slots: Tensor) -> Tensor:
        """Slots as rows of `keys`, `[m, w]`."""
        pools = torch.div(members, len(queries.offset), rounding_mode="floor")[:, None]  # key/value head and pool
        return pools * self.segment.num_slots + slots

    def _in_near(self, queries: Queries, members: Tensor, slots: Tensor) -> Tensor:
        """Slots as rows of `near_keys`, `[m, w]`; any row for slots that are not near."""
        pools = torch.div(members, len(queries.offset), rounding_mode="floor")[:, None]
        return pools * len(self.segment.near_slots) + self.segment.near_index[slots]

    def _rows(self, of: Tensor, index: Tensor) -> Tensor:
        """Rows of a tensor `[rows, ...]`, `[m, w, ...]`."""
        return of.index_select(0, index.flatten()).view(*index.shape, *of.shape[1:])

    def _places(self, slots: Tensor) -> Tensor:
        """Places of the tokens of chunks, `[..., c]`, in tokens from the segment's start."""
        within = torch.arange(self.segment.chunk_size, device=slots.device)
        return self.segment.slot_offset[slots][..., None] + within

    def _centre(self, slots: Tensor | slice) -> Tensor:
        """Place of a chunk's middle, in tokens from the segment's start."""
        return self.segment.slot_offset[slots] + (self.segment.chunk_size - 1) / 2


def row_products(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled inner products of the queries of each unit `[m, u, D]` with keys of its own `[m, w, D]`, `[m, u, w]`."""
    if keys.device.type == "cpu" and query.shape[1] == 1:  # three times as fast there as matrix-vector products
        return _ordered_products(query, keys, scale)
    return torch.bmm(query, keys.transpose(1, 2)).mul_(scale)


def _ordered_products(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """As `row_products`, each summed in one order, wherever it stands."""
    of_each = [(keys * one[:, None]).sum(dim=-1) for one in query.unbind(1)]
    return (of_each[0][:, None] if len(of_each) == 1 else torch.stack(of_each, dim=1)).mul_(scale)


def _all_products(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled inner products of all queries `[..., U, u, D]` with all keys `[..., s, D]`, `[..., U, u, s]`."""
    products = torch.matmul(query.flatten(-3, -2) * scale, keys.transpose(-1, -2))
    return products.unflatten(-2, query.shape[-3:-1])


def _best_of_unit(scores: Tensor, *, dim: int) -> Tensor:
    """The largest number of each unit; `dim` is that of its queries."""
    return scores.squeeze(dim) if scores.shape[dim] == 1 else scores.amax(dim)


def _biased(logits: Tensor, slopes: Tensor | None, distance: Tensor | float) -> Tensor:
    """Adds ALiBi's bias."""
    return logits if slopes is None else logits.sub_(slopes * distance)


def _chosen(queries: Queries, members: Tensor) -> _Asked:
    far = queries.far.flatten(0, 2)[members]  # [m, u, D]
    near = None if queries.near is None else queries.near.flatten(0, 2)[members]
    return _Asked(far, near, None if queries.slopes is None else queries.slopes.flatten(0, 2)[members][..., None])
