"""Memory read again is the memory that was not stored: bit for bit what can be seen, in the same slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.data.lanes import Lanes
from pipeline.model.stream import Stream
from pipeline.training.replay import replay
from pipeline.training.step import feed_segment
from tests.shards import assert_same, visible
from tests.tiny_longmem import TinyLongMem
from tests.tiny_models import tiny_model

SEGMENT = 8


@dataclass(frozen=True)
class Place:
    """A rank of a memory group; replaying exchanges nothing."""

    rank: int
    size: int


class Text:
    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.lengths = generator.integers(9, 40, size=8).astype(np.int64)
        self._documents = [generator.integers(90, size=length) for length in self.lengths]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._documents[document][start:stop]


def read(tiny: TinyLongMem, lanes: Lanes, place: Place, *, num_segments: int):
    """A bank filled step after step, as training does."""
    bank = tiny.longmem.bank(2, group_size=place.size)
    stream = Stream(tiny.longmem, bank, exchange=place)  # type: ignore[arg-type]
    for _ in range(num_segments // place.size):
        feed_segment(stream, lanes.next_of_group(place.rank, place.size))
    return bank


@pytest.mark.parametrize("num_segments", [4, 12, 20])  # two epochs
@pytest.mark.parametrize("place", [Place(0, 1), Place(0, 2), Place(1, 2), Place(3, 4)])
@pytest.mark.parametrize("scope", ["lane", "document"])
@pytest.mark.parametrize("context_tokens", [0, 5, 21])
def test_what_can_be_seen_is_the_same(num_segments, place, scope, context_tokens):
    num_tokens = 44  # no whole number of segments
    memory = {"tokens": num_tokens, "chunk_size": 4, "top_k_tokens": 8, "scope": scope}
    sidenet = {"layout": "top", "memory_layers": "all"}
    train = {"segment_tokens": SEGMENT}
    backbone = {"context_tokens": context_tokens}
    tiny = TinyLongMem(tiny_model("llama"), memory=memory, train=train, sidenet=sidenet, backbone=backbone)
    lanes = Lanes([Text()], num_lanes=4, lanes=(1, 3), segment_tokens=SEGMENT, seed=0, context_tokens=context_tokens)
    bank = read(tiny, lanes, place, num_segments=num_segments)
    state, again = lanes.state_dict(), tiny.longmem.bank(2, group_size=place.size)
    again.next_slot = 3
    replay(Stream(tiny.longmem, again, exchange=place), lanes)
    assert lanes.state_dict() == state
    sight = {"end": num_segments * SEGMENT, "num_tokens": num_tokens}
    assert len(visible(bank, **sight)["slots"]) > 0
    assert_same(visible(again, **sight), visible(bank, **sight))
