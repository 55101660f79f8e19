"""What one segment's queries may see of one memory layer, cut into runs of slots.

Shapes: `B` lanes, `H` query heads, `Hkv` key/value heads, `D` head size, `C` chunks of a ring, `c` tokens of a chunk,
`t` query tokens. Rows: under scope `group` all lanes share one row of slots, otherwise each lane has its own, so
`R = 1` and `S = B * C`, or `R = B` and `S = C`. `N` queries of a row and key/value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from pipeline.positions import PositionEncoding, PositionRule

SLOTS_PER_BLOCK = 16_384  # bounds the scores in memory: queries of a block x this
# Numbers of a temporary made at once on a CPU: its caches hold them, and the C library keeps them for the next instead
# of giving them back to the system, which would zero every page anew.
CPU_AT_ONCE = 2**20


def at_once(count: int, each: int, *, device: str) -> int:
    """How many alike things are worked on at once: on a CPU as many as its caches hold, elsewhere all.

    Args:
        count: How many there are.
        each: Numbers in one.
        device: Type of the device.

    Returns:
        At most `count`, at least 1.
    """
    return max(1, min(count, CPU_AT_ONCE // max(1, each))) if device == "cpu" else max(1, count)


@dataclass(frozen=True)
class ReadSettings:
    """How memory is read.

    Attributes:
        num_tokens: `M`, how far back memory reaches, in tokens of a lane.
        top_k_chunks: `k`, chunks that each query reads.
        scope: `document`, `lane` or `group`.
        rule: The distance that memory is read at.
        search: `torch` or `faiss`; both exact.
        query_block_tokens: Query tokens of a lane searched at once.
    """

    num_tokens: int
    top_k_chunks: int
    scope: str = "lane"
    rule: PositionRule = field(default_factory=lambda: PositionRule("none"))
    search: str = "torch"
    query_block_tokens: int = 64


@dataclass(frozen=True)
class Geometry:
    """What a memory layer's attention does besides the dot product.

    Attributes:
        encoding: Its position encoding.
        scale: Its factor on `q k^T`.
    """

    encoding: PositionEncoding
    scale: float


@dataclass(frozen=True)
class Queries:
    """A block of queries, grouped by key/value head and row.

    Attributes:
        far: Queries against unrotated keys, float32 `[Hkv, R, N, D]`.
        near: Queries rotated to their place in the segment, same shape; None where no key is read at its distance.
        offset: Place of each query in its segment, int64 `[N]`.
        documents: Document of each query, int64 `[R, N]`.
        slopes: ALiBi slope of each query's head, float32 `[Hkv, 1, N]`, or None.
    """

    far: Tensor
    near: Tensor | None
    offset: Tensor
    documents: Tensor
    slopes: Tensor | None

    def of_heads(self, heads: slice) -> Queries:
        """Those of some heads.

        Args:
            heads: Which key/value heads.

        Returns:
            The same with fewer heads.
        """
        near, slopes = (None if x is None else x[heads] for x in (self.near, self.slopes))
        return replace(self, far=self.far[heads], near=near, slopes=slopes)


@dataclass(frozen=True)
class Run:
    """Consecutive slots that are visible (documents aside).

    Attributes:
        start: First slot.
        stop: Slot after the last.
        near: Whether some query reads some of its tokens at their real distance.
    """

    start: int
    stop: int
    near: bool


class MemoryView:
    """One memory layer as the queries of one segment see it. Reading a view changes nothing.

    Args:
        bank: The shard.
        index: Index of the memory layer.
        settings: How memory is read.
        geometry: The layer's attention.
        start: Lane position of the segment's first token: what lies at or after it is invisible.
        documents: Document of each token of the segment, int64 `[B, T]`.
    """

    def __init__(
        self,
        bank: MemoryBank,
        index: int,
        settings: ReadSettings,
        geometry: Geometry,
        *,
        start: int,
        documents: Tensor,
    ) -> None:
        self.settings, self.geometry, self.start = settings, geometry, start
        encoding = geometry.encoding
        has_positions = encoding.inv_freq is not None or encoding.slopes is not None
        self.rule = settings.rule if has_positions else PositionRule("none")
        self.device, self.chunk_size = bank.device, bank.shape.chunk_size
        self.query_documents = documents.to(bank.device)
        store, shape = bank.layers[index], bank.shape
        self.num_kv_heads = shape.num_kv_heads
        joined = settings.scope == "group"
        self.num_rows = 1 if joined else shape.num_lanes
        self.num_slots = shape.num_chunks * (shape.num_lanes if joined else 1)
        self.chunk_keys = store.chunk_keys.view(shape.num_kv_heads, self.num_rows, self.num_slots, shape.head_dim)
        self.keys = store.keys.view(-1, shape.chunk_size, shape.head_dim)  # [Hkv * R * S, c, D]
        self.values = store.values.view(-1, shape.chunk_size, shape.head_dim)
        self.slot_documents = bank.documents.view(self.num_rows, self.num_slots)
        slot_positions = np.tile(bank.positions, shape.num_lanes if joined else 1)
        self.runs = list(self._runs(slot_positions))
        # Positions are taken from the segment's start: small numbers keep rotary angles exact in float32.
        self.slot_offset = torch.from_numpy(slot_positions - start).to(bank.device)  # [S]
        self.slot_order = self._slot_order(shape.num_lanes if joined else 1)
        self._rotate_near()

    @cached_property
    def largest_key(self) -> Tensor:
        """Length of the longest chunk key, float32 `[Hkv, R]`."""
        return self.chunk_keys.norm(dim=-1).amax(dim=-1)

    def queries(self, query: Tensor, tokens: slice) -> Queries:
        """Prepares a block of the segment's queries.

        Args:
            query: Unrotated queries of the block, float32 `[B, H, t, D]`.
            tokens: Which tokens of the segment they are.

        Returns:
            The block, grouped, rotated for far and for near keys.
        """
        num_lanes, num_heads = query.shape[:2]
        offset = self._offset(tokens)
        repeats = num_heads // self.num_kv_heads * (num_lanes // self.num_rows)
        encoding = self.geometry.encoding
        slopes = encoding.slopes
        if slopes is not None:
            per_head = slopes.to(self.device).view(self.num_kv_heads, 1, -1, 1)
            per_lane = per_head.expand(-1, num_lanes // self.num_rows, -1, len(offset))
            slopes = per_lane.reshape(self.num_kv_heads, 1, -1)
        documents = self.query_documents[:, None, tokens].expand(-1, num_heads // self.num_kv_heads, -1)
        return Queries(
            far=self.by_kv_head(self.rule.far_query(query, encoding)),
            near=self.by_kv_head(encoding.rotate(query, offset)) if len(self.near_slots) else None,
            offset=offset.repeat(repeats),
            documents=documents.reshape(self.num_rows, -1),
            slopes=slopes,
        )

    def query_gradient(self, grad_far: Tensor, grad_near: Tensor | None, queries: Queries, members: Tensor) -> Tensor:
        """Gradient of some queries before `queries` rotated them.

        Args:
            grad_far: Gradient of their rows of `Queries.far`, float32 `[m, D]`.
            grad_near: Gradient of their rows of `Queries.near`, or None.
            queries: The block.
            members: Which queries, as numbers in the flattened `[Hkv, R, N]`, int64 `[m]`.

        Returns:
            Gradient of the unrotated queries, float32 `[m, D]`.
        """
        encoding = self.geometry.encoding
        # A rotation's transpose is the rotation by the opposite angle.
        grad = self.rule.far_query(grad_far, encoding, backward=True)
        if grad_near is not None:
            grad = grad + encoding.rotate(grad_near, -queries.offset[members % len(queries.offset)])
        return grad

    def _offset(self, tokens: slice) -> Tensor:
        return torch.arange(tokens.start, tokens.stop, device=self.device)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """Groups heads by key/value head and lanes by row.

        Args:
            x: `[B, H, t, ...]`.

        Returns:
            `[Hkv, R, N, ...]`.
        """
        grouped = x.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1)  # [Hkv, B, H / Hkv, t, ...]
        return grouped.reshape(self.num_kv_heads, self.num_rows, -1, *x.shape[3:])

    def by_query_head(self, x: Tensor, *, num_lanes: int, num_tokens: int) -> Tensor:
        """Undoes `by_kv_head`.

        Args:
            x: `[Hkv * R * N, ...]`.
            num_lanes: `B`.
            num_tokens: `t`.

        Returns:
            `[B, H, t, ...]`.
        """
        split = x.reshape(self.num_kv_heads, num_lanes, -1, num_tokens, *x.shape[1:])
        return split.transpose(0, 1).flatten(1, 2)

    def distance_bias(self, distance: Tensor, queries: Queries) -> Tensor | None:
        """ALiBi's bias of a distance, or None for other encodings.

        Args:
            distance: Tokens, broadcastable against `[Hkv, R, N, ...]`.
            queries: The block; its slopes are used.

        Returns:
            `-slope * distance`, float32.
        """
        if queries.slopes is None:
            return None
        return -queries.slopes.view(*queries.slopes.shape, *[1] * (distance.dim() - 3)) * distance

    def slopes_of(self, queries: Queries, members: Tensor) -> Tensor | None:
        """ALiBi's slopes of some queries, or None for other encodings.

        Args:
            queries: The block.
            members: Which queries, as numbers in the flattened `[Hkv, R, N]`, int64 `[m]`.

        Returns:
            float32 `[m, 1]`.
        """
        if queries.slopes is None:
            return None
        return queries.slopes.expand(-1, self.num_rows, -1).flatten()[members, None]

    def _runs(self, positions: np.ndarray) -> Iterator[Run]:
        """Cuts the visible slots into runs of at most SLOTS_PER_BLOCK, far ones first."""
        visible = (positions >= 0) & (positions < self.start) & (positions >= self.start - self.settings.num_tokens)
        near = self.start - (positions + self.chunk_size - 1) <= self.rule.near_limit
        for mask, is_near in ((visible & ~near, False), (visible & near, True)):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            for start, stop in edges.reshape(-1, 2).tolist():
                for first in range(start, stop, SLOTS_PER_BLOCK):
                    yield Run(first, min(first + SLOTS_PER_BLOCK, stop), is_near)

    def _slot_order(self, num_lanes: int) -> Tensor:
        """A different number for each slot that decides between equal scores: the newer chunk, then the lower lane.

        It depends on places in the lanes alone, so that it is the same whichever rank holds a chunk.

        Args:
            num_lanes: Lanes that share a row of slots.

        Returns:
            int64 `[S]`, from 0 up to 2^31 - 1 for visible slots.
        """
        age = torch.div(-self.slot_offset, self.chunk_size, rounding_mode="floor")
        lane = torch.arange(self.num_slots, device=self.device) // (self.num_slots // num_lanes)
        return (2**31 - 1 - (age * num_lanes + lane)).clamp(0, 2**31 - 1)

    def _rotate_near(self) -> None:
        """Rotates the keys that are read at their real distance, once for all queries of the segment."""
        slots = [torch.arange(run.start, run.stop, device=self.device) for run in self.runs if run.near]
        self.near_slots = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64, device=self.device)
        encoding = self.geometry.encoding
        if encoding.inv_freq is None or not slots:
            self.near_keys, self.near_chunk_keys = self.keys, self.chunk_keys
            return
        offset = self.slot_offset[self.near_slots]
        within = torch.arange(self.chunk_size, device=self.device)
        centre = offset + (self.chunk_size - 1) / 2
        self.near_chunk_keys = encoding.rotate(self.chunk_keys[:, :, self.near_slots], centre)
        by_slot = self.keys.view(self.num_kv_heads, self.num_rows, self.num_slots, self.chunk_size, -1)
        tokens = by_slot[:, :, self.near_slots].float()
        self.near_keys = encoding.rotate(tokens, offset[:, None] + within).flatten(0, 2)  # [Hkv * R * near, c, D]
        self.near_index = torch.full((self.num_slots,), 0, dtype=torch.int64, device=self.device)
        self.near_index[self.near_slots] = torch.arange(len(self.near_slots), device=self.device)
