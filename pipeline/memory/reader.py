"""The reader of a bank: what the memory layers of a model are given for one segment.

Shapes: `B` rows, `H` query heads, `T` segment tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Alone, Exchange
from pipeline.memory.layer import Geometry, LayerView
from pipeline.memory.read import GroupRead, Window, read
from pipeline.memory.segment import Reading, ReadSettings, SegmentView
from pipeline.memory.winners import Shared

AgeObserver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class MemoryRead:
    """What a memory layer reads of one kind.

    Attributes:
        values: Attention over the retrieved tokens, float32 `[B, H, T, D]`; 0 where nothing is visible.
        log_sum_exp: Of the retrieved tokens' logits, float32 `[B, H, T]`; `-inf` where nothing is visible.
        window: The same for the tokens of the window, which are read whole; None: there is none.
    """

    values: Tensor
    log_sum_exp: Tensor
    window: MemoryRead | None = None

    def to(self, device: torch.device) -> MemoryRead:
        """The same there, without the window."""
        return MemoryRead(self.values.to(device), self.log_sum_exp.to(device))


class BankReader:
    """Reads the bank of a memory group for the queries of one segment of each rank. Never writes.

    Collective: every rank of the group must make one together.

    Args:
        bank: This rank's shard; must not change between a read and its backward pass.
        settings: How memory is read.
        geometries: The attention of each memory layer.
        reading: The rows that read. The other ranks' segments lie next to this one's, in rank order, or at the same
            place if it says so.
        exchange: The group.
        observe_ages: Called with the memory layer and the distance, in tokens, to the first token of every chunk
            retrieved from this shard (int64, flat); for statistics. None: not called.
        timed: Context manager that each read runs in (a timer).
        is_repeated: Whether each memory layer reads once more with the same queries, as activation checkpointing does:
            which chunks the first read chose is kept until then, a few numbers a query, and not searched again.
    """

    def __init__(
        self,
        bank: MemoryBank,
        settings: ReadSettings,
        geometries: Sequence[Geometry],
        reading: Reading,
        *,
        exchange: Exchange | None = None,
        observe_ages: AgeObserver | None = None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
        is_repeated: bool = False,
    ) -> None:
        self.bank, self.geometries, self.exchange = bank, geometries, exchange or Alone()
        self.observe_ages, self.timed = observe_ages, timed
        self._kept: list[list[Shared]] | None = [[] for _ in geometries] if is_repeated else None
        readings = _of_all_ranks(reading, self.exchange, bank.device, with_documents=settings.scope == "document")
        self._segments = {
            rule: [SegmentView(bank, settings, each, rule) for each in readings]
            for rule in {geometry.rule(settings.rule) for geometry in geometries}
        }
        self._rules = [geometry.rule(settings.rule) for geometry in geometries]
        self._window = Window.of(bank, settings, readings, self.exchange) if settings.window_tokens else None

    def read(self, index: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer; gradients flow into the query.

        Collective: every rank of the group must call it together, and its backward pass too.

        Args:
            index: Index of the memory layer.
            query: Unrotated queries `[B, H, T, D]`, any floating dtype.

        Returns:
            Values and log-sum-exp, on the query's device.
        """
        with self.timed():
            store, geometry = self.bank.layers[index], self.geometries[index]
            views = [LayerView(segment, store, geometry) for segment in self._segments[self._rules[index]]]
            window = None if self._window is None else self._window.of_layer(store, geometry)
            observe = self.observe_ages
            told = None if observe is None else lambda ages: observe(index, ages)
            group = GroupRead(views, window, self.exchange, told, None if self._kept is None else self._kept[index])
            found = read(query.to(self.bank.device, torch.float32), group)
            back = [x.to(query.device) for x in found]
            return MemoryRead(back[0], back[1], None if window is None else MemoryRead(back[2], back[3]))


def _of_all_ranks(reading: Reading, exchange: Exchange, device: torch.device, *, with_documents: bool) -> list[Reading]:
    """The rows of every rank of the group: each rank's segment follows that of the rank before it."""
    length = reading.documents.shape[1] if reading.segment_tokens is None else reading.segment_tokens
    starts = [reading.start + (rank - exchange.rank) * length for rank in range(exchange.size)]
    documents = reading.documents.to(device)[None].expand(exchange.size, -1, -1)
    if with_documents:
        documents = exchange.all_gather(documents[0], purpose="documents")()
    visible: Any = [None] * exchange.size
    if reading.visible is not None:
        visible = exchange.all_gather(reading.visible.to(device, torch.uint8), purpose="visible")().bool()
    places = zip(starts, documents, visible, strict=True)
    return [replace(reading, start=start, documents=own, visible=seen) for start, own, seen in places]
