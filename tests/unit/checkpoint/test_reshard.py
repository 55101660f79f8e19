"""Shards that are split anew are those that today's ranks would have written themselves, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.reshard import rank_file, reshard
from tests.shards import SEGMENT, assert_same, empty_bank, filled_bank, place_of, visible

WORLDS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, ranks of a memory group
# 30 tokens: no whole number of segments; 64: of one step of all groups.
SIZES = [(30, 4), (30, 8), (64, 4), (64, 12), (64, 28), (30, 0)]  # remembered tokens, segments read


def save(folder: Path, world: tuple[int, int], *, num_tokens: int, num_segments: int) -> SavedWorld:
    world_size, group_size = world
    for rank in range(world_size):
        place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=num_tokens)
        save_file(filled_bank(place, num_segments=num_segments).state_dict(), rank_file(folder, rank))
    return SavedWorld(world_size, group_size)


@pytest.mark.parametrize("before", WORLDS)
@pytest.mark.parametrize(("num_tokens", "num_segments"), SIZES)
def test_every_world_from_every_world(tmp_path, before, num_tokens, num_segments):
    saved = save(tmp_path, before, num_tokens=num_tokens, num_segments=num_segments)
    sight = {"end": num_segments * SEGMENT, "num_tokens": num_tokens}
    for world_size, group_size in WORLDS:
        for rank in range(world_size):
            place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=num_tokens)
            own, bank = filled_bank(place, num_segments=num_segments), empty_bank(place)
            bank.load_state_dict(reshard(tmp_path, saved, place, num_chunks=bank.shape.num_chunks))
            assert_same(visible(bank, **sight), visible(own, **sight))


def test_a_memory_that_does_not_go_back_far_enough_is_refused(tmp_path):
    saved = save(tmp_path, (2, 2), num_tokens=16, num_segments=12)
    place = place_of(0, world_size=1, group_size=1, num_tokens=64)
    with pytest.raises(ValueError, match="stored memory goes back to token 64 of 96, not to 32"):
        reshard(tmp_path, saved, place, num_chunks=empty_bank(place).shape.num_chunks)


def test_no_chunk_is_in_two_shards_or_in_none(tmp_path):
    saved = save(tmp_path, (4, 2), num_tokens=64, num_segments=12)
    for world_size, group_size in WORLDS:
        seen: list[tuple[int, int]] = []
        for rank in range(world_size):
            place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=64)
            state = reshard(tmp_path, saved, place, num_chunks=empty_bank(place).shape.num_chunks)
            seen += product(place.lanes, state["positions"].tolist())
        assert sorted(seen) == sorted(product(range(4), range(32, 96, 2)))
