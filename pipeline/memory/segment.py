"""What the queries of one segment may see, whichever memory layer they read: slots, cut into runs.

Shapes: `B` rows that read, `C` chunks of a ring, `c` tokens of a chunk, `M` tokens of a lane that are remembered, `t`
query tokens. `P` pools of `S` slots: under scope `group` all lanes are one pool, otherwise each lane is its own. `U`
units of a pool and key/value head (`pipeline.memory.pools`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from pipeline.memory.pools import Pools
from pipeline.positions import PositionRule

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
        top_k_chunks: `k`, chunks that each query reads; 0: none.
        scope: `document`, `lane` or `group`.
        rule: The distance that memory is read at.
        search: `torch` or `faiss`; both exact.
        query_block_tokens: Query tokens of a row searched at once.
        retrieve_for: `head`: each query head reads chunks of its own; `kv_head`: the query heads of a key/value head
            read the same ones, whose scores are best for some of them.
        window_tokens: `W`, tokens right before the segment that are read whole, at their real distance; what is
            retrieved is older.
    """

    num_tokens: int
    top_k_chunks: int
    scope: str = "lane"
    rule: PositionRule = field(default_factory=lambda: PositionRule("none"))
    search: str = "torch"
    query_block_tokens: int = 128
    retrieve_for: str = "head"
    window_tokens: int = 0


@dataclass(frozen=True)
class Reading:
    """Rows that read a bank, and where they stand. In a memory group all ranks' are alike but for place and documents.

    Attributes:
        start: Lane position of the first token of this rank's segment: what lies at or after it is invisible.
        documents: Document of each query, int64 `[B, T]`.
        first: Place in the segment of the first query: what comes before it there was read for earlier.
        segment_tokens: Tokens from one rank's segment to the next rank's; None: as many as there are queries; 0: all
            ranks read at the same place.
        lane_of_row: Whose memory each row reads, int64 `[B]`; None: row `b` that of lane `b`. Means nothing under scope
            `group`, where every row reads all lanes.
        retrieve_from: The lane of which each row reads what is retrieved, int64 `[B]`; None: as `lane_of_row`. The
            window is always that of `lane_of_row`.
        visible: Which of the remembered chunks a row may see, bool `[B, M / c]`, the one right before the segment last;
            None: all. Under scope `group` it holds for every lane that the row reads.
    """

    start: int
    documents: Tensor
    first: int = 0
    segment_tokens: int | None = None
    lane_of_row: Tensor | None = None
    retrieve_from: Tensor | None = None
    visible: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """Consecutive slots that are visible, documents and `Reading.visible` aside.

    Attributes:
        start: First slot.
        stop: Slot after the last.
        near: Whether some query reads some of its tokens at their real distance.
        near_start: Its first slot's number among the slots of near runs.
    """

    start: int
    stop: int
    near: bool
    near_start: int = 0


class SegmentView:
    """A bank's slots as the queries of one segment see them. Made once a segment, read by every memory layer.

    Args:
        bank: The shard.
        settings: How memory is read.
        reading: The rows that read.
        rule: The distance that memory is read at.
        is_window: Whether these are the slots that are read whole, not those that are searched.

    Attributes:
        pools: Which rows read which pool.
        lanes_per_pool: Lanes that are one pool.
        num_slots: `S`.
        runs: The visible slots, far ones first.
        slot_offset: Place of each slot's first token, counted from the segment's start, int64 `[S]`: small numbers keep
            rotary angles exact in float32.
        near_slots: Slots of near runs, in their order, int64 `[n]`.
        near_index: Where each slot is among them, int64 `[S]`; 0 for others.
    """

    def __init__(
        self,
        bank: MemoryBank,
        settings: ReadSettings,
        reading: Reading,
        rule: PositionRule,
        *,
        is_window: bool = False,
    ) -> None:
        shape, self.device, self.is_window = bank.shape, bank.device, is_window
        self.settings, self.reading, self.rule, self.chunk_size = settings, reading, rule, shape.chunk_size
        self.pools = self._pools(shape.num_lanes, shape.num_kv_heads)
        self.lanes_per_pool = shape.num_lanes // self.pools.num_pools
        self.num_slots = shape.num_chunks * self.lanes_per_pool
        self.slot_documents = bank.documents.view(self.pools.num_pools, self.num_slots)
        positions = np.tile(bank.positions, self.lanes_per_pool)
        self.runs = list(self._runs(positions))
        self.slot_offset = torch.from_numpy(positions - reading.start).to(self.device)
        near = [torch.arange(run.start, run.stop, device=self.device) for run in self.runs if run.near]
        self.near_slots = torch.cat(near) if near else torch.zeros(0, dtype=torch.int64, device=self.device)
        self.near_index = torch.zeros(self.num_slots, dtype=torch.int64, device=self.device)
        self.near_index[self.near_slots] = torch.arange(len(self.near_slots), device=self.device)
        self._visible = self._visible_slots()

    def offsets(self, tokens: slice) -> Tensor:
        """Places in the segment of some of its queries, int64 `[t]`."""
        return torch.arange(tokens.start, tokens.stop, device=self.device) + self.reading.first

    def documents(self, tokens: slice, *, num_heads: int) -> Tensor:
        """Document of each unit, int64 `[P, U]`."""
        of_unit = self.reading.documents[:, None, tokens].to(self.device)
        if not self.pools.is_shared:
            of_unit = of_unit.expand(-1, num_heads // self.pools.num_kv_heads, -1)  # [B, H / Hkv, t]
        return self.pools.rows_by_pool(of_unit).flatten(1)

    def hidden(self, documents: Tensor, run: Run) -> Tensor | None:
        """Which slots of a run each unit must not see: bool `[P, U, s]`; None: it sees them all.

        Args:
            documents: Document of each unit, int64 `[P, U]`.
            run: The slots.

        Returns:
            The mask.
        """
        slots, hidden = slice(run.start, run.stop), None
        if self.settings.scope == "document":
            hidden = documents[:, :, None] != self.slot_documents[:, None, slots]
        if self._visible is not None:
            num_rows = self._visible.shape[1]
            unseen = ~self._visible[..., slots]  # [P, r, s]
            unseen = unseen.repeat_interleave(documents.shape[1] // num_rows, dim=1)
            hidden = unseen if hidden is None else hidden | unseen
        return hidden

    def _pools(self, num_lanes: int, num_kv_heads: int) -> Pools:
        reading, is_shared = self.reading, self.settings.retrieve_for == "kv_head"
        if self.settings.scope == "group" and not self.is_window:  # a window is of one lane, whatever else is seen
            return Pools(1, num_kv_heads, is_shared)
        lanes = reading.lane_of_row if self.is_window or reading.retrieve_from is None else reading.retrieve_from
        if lanes is None:
            return Pools(num_lanes, num_kv_heads, is_shared)
        return Pools.of(lanes.to(self.device), num_pools=num_lanes, num_kv_heads=num_kv_heads, is_shared=is_shared)

    def _runs(self, positions: np.ndarray) -> Iterator[Run]:
        """Cuts the visible slots into runs of at most SLOTS_PER_BLOCK, far ones first."""
        start, window = self.reading.start, self.settings.window_tokens
        oldest, end = (window, 0) if self.is_window else (self.settings.num_tokens, window)
        visible = (positions >= 0) & (positions < start - end) & (positions >= start - oldest)
        if not self.is_window and self.settings.top_k_chunks == 0:
            visible[:] = False
        nearest = start + self.reading.first - (positions + self.chunk_size - 1)
        near, num_near = nearest <= self.rule.near_limit, 0
        for mask, is_near in ((visible & ~near, False), (visible & near, True)):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            for begin, stop in edges.reshape(-1, 2).tolist():
                for first in range(begin, stop, SLOTS_PER_BLOCK):
                    last = min(first + SLOTS_PER_BLOCK, stop)
                    yield Run(first, last, is_near, num_near)
                    num_near += (last - first) * is_near

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every visible slot."""
        return self._visible is None and self.settings.scope != "document"

    @cached_property
    def visible_slots(self) -> Tensor:
        """The slots of all runs, in their order, int64."""
        return torch.cat([torch.arange(run.start, run.stop, device=self.device) for run in self.runs])

    @cached_property
    def slot_order(self) -> Tensor:
        """Decides between equal scores: the newer chunk, then the lower of the lanes of a pool.

        A different number for each visible slot, int64 `[S]`, from 0 up to 2^31 - 1. It depends on places in the lanes
        alone, so that it is the same whichever rank holds a chunk.
        """
        age = torch.div(-self.slot_offset, self.chunk_size, rounding_mode="floor")
        lane = torch.arange(self.num_slots, device=self.device) // (self.num_slots // self.lanes_per_pool)
        return (2**31 - 1 - (age * self.lanes_per_pool + lane)).clamp(0, 2**31 - 1)

    def _visible_slots(self) -> Tensor | None:
        """Which slots each row of a pool may see, bool `[P, r, S]`; None: all."""
        reading, count = self.reading, self.settings.num_tokens // self.chunk_size
        visible, num_rows = reading.visible, len(reading.documents)
        if visible is None:
            if self.pools.rows is None or self.pools.num_pools == 1:  # of one pool every row reads
                return None
            visible = torch.ones((num_rows, count), dtype=torch.bool)
        assert visible.shape == (num_rows, count), f"visible is {tuple(visible.shape)}, not {(num_rows, count)}"
        by_pool = (
            self.pools.rows_by_pool(visible.to(self.device)) & self.pools.is_read(num_rows, self.device)[..., None]
        )
        number = torch.div(self.slot_offset, self.chunk_size, rounding_mode="floor") + count  # 0: the oldest one
        return by_pool[..., number.clamp(0, count - 1)]
