"""What travels while a rank works: a rank of two whose other rank remembers nothing, and the order of what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.memory import read as read_module
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.layer import NOTHING, Geometry
from pipeline.memory.reader import BankReader
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.positions import PositionEncoding

BLOCKS, BLOCK = 3, 4


class Recorded:
    """The first of two ranks; the second asks the same, and has found nothing."""

    size, rank = 2, 0

    def __init__(self, events: list[str]) -> None:
        self.events, self.traffic = events, Counter[str]()

    def _begin(self, purpose: str, result: Any) -> Callable[[], Any]:
        number = sum(event.startswith(f"start {purpose} ") for event in self.events)
        self.events.append(f"start {purpose} {number}")

        def wait() -> Any:
            self.events.append(f"wait {purpose} {number}")
            return result

        return wait

    def all_gather(self, x: Tensor, *, purpose: str) -> Callable[[], Tensor]:
        return self._begin(purpose, torch.stack([x, x]))

    def all_to_all(self, parts: Sequence[Tensor], *, rows: Sequence[int], purpose: str) -> Callable[[], list[Tensor]]:
        return self._begin(purpose, [parts[0], parts[0].new_full((rows[1], *parts[0].shape[1:]), NOTHING)])


def test_a_block_is_searched_while_others_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("search", "attend", "attend_backward"):
        work = getattr(read_module, name)

        def told(*args: Any, name: str = name, work: Callable[..., Any] = work, **kwargs: Any) -> Any:
            number = sum(event.startswith(f"{name} ") for event in events) // 2  # for the queries of two ranks
            events.append(f"{name} {number}")
            return work(*args, **kwargs)

        monkeypatch.setattr(read_module, name, told)
    bank = MemoryBank(BankShape(1, 1, 1, 8, 8, 4), dtype=torch.float32, device=torch.device("cpu"))
    length = BLOCKS * BLOCK
    key, value = torch.randn(2, 1, 1, length, 8)
    documents = torch.zeros(1, length, dtype=torch.int64)
    bank.append([(key, value)], start=0, documents=documents)
    settings = ReadSettings(num_tokens=24, top_k_chunks=2, query_block_tokens=BLOCK)
    geometry = Geometry(PositionEncoding(), 1.0)
    reading = Reading(2 * length, documents)
    reader = BankReader(bank, settings, [geometry], reading, exchange=Recorded(events))
    query = torch.randn(1, 1, length, 8).requires_grad_()
    read = reader.read(0, query)

    def before(first: str, second: str) -> bool:
        return events.index(first) < events.index(second)

    for block in range(BLOCKS - 1):
        following = block + 1
        assert before(f"start queries {following}", f"search {block}"), "the next queries travel during a search"
        assert before(f"search {following}", f"wait scores {block}"), "scores travel during the next search"
        assert before(f"attend {following}", f"wait partials {block}"), "results travel during the next attention"
    del events[:]
    read.values.sum().backward()
    for block in range(BLOCKS - 1):
        following = block + 1
        assert before(f"start gradients {following}", f"attend_backward {block}")
        assert before(f"attend_backward {following}", f"wait query_gradients {block}")
    assert query.grad is not None and torch.isfinite(query.grad).all()
