"""Where a chunk is kept, by its place in the lane: what a bank does that is written segment after segment."""

from __future__ import annotations

import pytest
import torch

from pipeline.memory.bank import EMPTY
from pipeline.memory.place import Turn
from tests.shards import CHUNK, SEGMENT, filled_bank, place_of


@pytest.mark.parametrize(("rank", "group_size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("num_segments", [4, 8, 20])  # rings go round
def test_a_rank_writes_its_segments_into_the_slots_that_follow_from_their_places(rank, group_size, num_segments):
    place = place_of(rank, world_size=group_size, group_size=group_size, num_tokens=40)
    bank = filled_bank(place, num_segments=num_segments)
    written = torch.arange(0, num_segments * SEGMENT, CHUNK)
    mine = written[place.turn.holds(written)]
    assert mine.tolist() == [p for p in written.tolist() if p // SEGMENT % group_size == rank]
    slots = place.turn.slots(mine, chunk_size=CHUNK, num_chunks=bank.shape.num_chunks)
    expected = torch.full((bank.shape.num_chunks,), EMPTY)
    for slot, position in zip(slots.tolist(), mine.tolist(), strict=True):
        expected[slot] = position
    assert bank.positions.tolist() == expected.tolist()
    # The place where the group goes on, and the place where this rank does, say the same.
    for following in (num_segments, num_segments + rank):
        slot = place.turn.slots(torch.tensor(following * SEGMENT), chunk_size=CHUNK, num_chunks=bank.shape.num_chunks)
        assert bank.next_slot == slot


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_chunks_before_a_place_are_those_that_one_counts(rank, size):
    turn, places = Turn(rank, size, SEGMENT), torch.arange(7 * SEGMENT)
    kept = turn.holds(places)  # token for token
    counted = [int(kept[:place].sum()) // CHUNK for place in places.tolist()]
    assert turn.num_before(places, chunk_size=CHUNK).tolist() == counted
