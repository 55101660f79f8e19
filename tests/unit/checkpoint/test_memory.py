"""A rank's shard comes back from what any ranks stored, in either form: as it would have written it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.manifest import DamageError
from pipeline.checkpoint.memory import MemoryOwner
from pipeline.checkpoint.rank_files import rank_file
from pipeline.errors import CheckpointError
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.file import open_memory, snapshot
from pipeline.memory.place import ShardPlace, Turn
from tests import shards
from tests.shards import SEGMENT, assert_same, in_slot_order, place_of, visible
from tests.tiny_longmem import bank_bytes

ALONE = SavedWorld(world_size=1, group_size=1)
SHAPE = BankShape(num_layers=2, num_lanes=2, num_kv_heads=2, head_dim=4, num_chunks=5, chunk_size=2)
WORLDS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # ranks, ranks of a memory group
# 30 tokens: no whole number of segments; 64: of one step of all groups.
SIZES = [(30, 4), (30, 8), (64, 4), (64, 12), (64, 28), (30, 0)]  # remembered tokens, segments read


def write_new(bank: MemoryBank, path: Path) -> None:
    snapshot(bank).write(path)


def write_old(bank: MemoryBank, path: Path) -> None:
    save_file(in_slot_order(bank), path)


FORMS = pytest.mark.parametrize("write", [write_old, write_new])
Write = Callable[[MemoryBank, Path], None]


def filled_bank(num_segments=4):
    bank, generator = MemoryBank(SHAPE, dtype=torch.bfloat16, device=torch.device("cpu")), torch.Generator()
    for segment in range(num_segments):  # 4 chunks of 5: the ring goes round
        memory = [tuple(torch.randn(2, 2, 4, 4, generator=generator) for _ in range(2)) for _ in range(2)]
        bank.append(memory, start=4 * segment, documents=torch.full((2, 4), segment))  # type: ignore[arg-type]
    return bank


def owner_of(bank, *, store=True, replay=None, num_tokens=6):
    place = ShardPlace(lanes=(0, 1), num_lanes=2, turn=Turn(0, 1, 4), num_tokens=num_tokens)
    return MemoryOwner(bank, place, store=store, replay=replay or pytest.fail)


@pytest.mark.parametrize("num_segments", [0, 1, 4])
@FORMS
def test_memory_comes_back_bit_for_bit_in_the_same_slots(tmp_path, num_segments, write):
    bank, other = filled_bank(num_segments), filled_bank(2)
    write(bank, rank_file(tmp_path, 0))
    owner_of(other).check(tmp_path, ALONE)
    owner_of(other).load(tmp_path, ALONE)
    assert_same(in_slot_order(other), in_slot_order(bank))
    more = [(torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4))] * 2
    for each in (bank, other):
        each.append(more, start=16, documents=torch.full((2, 4), 9))
    assert_same(in_slot_order(other), in_slot_order(bank))
    if num_segments == 4:  # nothing that is empty in one bank holds old numbers in the other
        assert bank_bytes(other) == bank_bytes(bank)


def test_a_snapshot_is_what_was_remembered_when_it_was_taken(tmp_path):
    bank, other = filled_bank(), filled_bank(0)
    write = owner_of(bank).save(tmp_path)
    expected = bank_bytes(bank)
    bank.append([(torch.ones(2, 2, 4, 4),) * 2] * 2, start=16, documents=torch.full((2, 4), 9))
    write()
    owner_of(other).load(tmp_path, ALONE)
    assert bank_bytes(other) == expected


@FORMS
def test_memory_of_another_shape_or_dtype_is_refused(tmp_path, write):
    write(filled_bank(), rank_file(tmp_path, 0))
    for change, dtype in (({}, torch.float32), ({"head_dim": 8}, torch.bfloat16), ({"num_layers": 1}, torch.bfloat16)):
        other = MemoryBank(replace(SHAPE, **change), dtype=dtype, device=torch.device("cpu"))
        with pytest.raises(CheckpointError, match="stored memory does not fit a bank .*do: resume with the memory"):
            owner_of(other).load(tmp_path, ALONE)


def test_memory_that_is_not_stored_is_read_again_whatever_the_setting(tmp_path):
    replayed = []
    assert owner_of(filled_bank(), store=False).save(tmp_path) is None
    assert not list(tmp_path.iterdir())
    for store in (True, False):
        owner_of(filled_bank(), store=store, replay=lambda: replayed.append(1)).load(tmp_path, ALONE)
    assert len(replayed) == 2


def test_memory_that_is_stored_is_loaded_whatever_the_setting(tmp_path):
    bank, other = filled_bank(), filled_bank(1)
    owner_of(bank).save(tmp_path)()
    owner_of(other, store=False).load(tmp_path, ALONE)
    assert other.end == bank.end


def test_memory_of_other_ranks_is_split_anew(tmp_path):
    for rank in range(2):  # two groups of one rank and one lane each
        place = place_of(rank, world_size=4, group_size=1, num_tokens=30)
        write_new(shards.filled_bank(place, num_segments=8), rank_file(tmp_path, rank))
    wide = replace(place_of(0, world_size=2, group_size=1, num_tokens=30), num_lanes=2)
    bank, own = shards.empty_bank(wide), shards.filled_bank(wide, num_segments=8)
    MemoryOwner(bank, wide, store=True, replay=pytest.fail).load(tmp_path, SavedWorld(2, 1))
    assert_same(in_slot_order(bank), in_slot_order(own))


def save(folder: Path, world: tuple[int, int], write: Write, *, num_tokens: int, num_segments: int) -> SavedWorld:
    world_size, group_size = world
    for rank in range(world_size):
        place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=num_tokens)
        write(shards.filled_bank(place, num_segments=num_segments), rank_file(folder, rank))
    return SavedWorld(world_size, group_size)


def loaded(folder: Path, saved: SavedWorld, place: ShardPlace) -> MemoryBank:
    bank = shards.empty_bank(place)
    MemoryOwner(bank, place, store=True, replay=pytest.fail).load(folder, saved)
    return bank


@pytest.mark.parametrize("before", WORLDS)
@pytest.mark.parametrize(("num_tokens", "num_segments"), SIZES)
@FORMS
def test_every_world_from_every_world(tmp_path, before, num_tokens, num_segments, write):
    saved = save(tmp_path, before, write, num_tokens=num_tokens, num_segments=num_segments)
    sight = {"end": num_segments * SEGMENT, "num_tokens": num_tokens}
    for world_size, group_size in WORLDS:
        for rank in range(world_size):
            place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=num_tokens)
            own, bank = shards.filled_bank(place, num_segments=num_segments), loaded(tmp_path, saved, place)
            assert_same(visible(bank, **sight), visible(own, **sight))
            if (world_size, group_size) == before:
                assert_same(in_slot_order(bank), in_slot_order(own))


def test_a_memory_that_does_not_go_back_far_enough_is_refused(tmp_path):
    saved = save(tmp_path, (2, 2), write_new, num_tokens=16, num_segments=12)
    place = place_of(0, world_size=1, group_size=1, num_tokens=64)
    with pytest.raises(CheckpointError, match="stored memory goes back to token 64 of 96, not to 32; do: resume with"):
        loaded(tmp_path, saved, place)


def test_lanes_that_do_not_stand_at_one_place_are_refused_and_the_bank_is_as_it_was(tmp_path):
    for rank, num_segments in enumerate((8, 6)):
        place = place_of(rank, world_size=2, group_size=1, num_tokens=30)
        write_new(shards.filled_bank(place, num_segments=num_segments), rank_file(tmp_path, rank))
    place = place_of(0, world_size=1, group_size=1, num_tokens=30)
    bank = shards.filled_bank(place, num_segments=3)
    before = bank_bytes(bank)
    with pytest.raises(CheckpointError, match="stored memory lacks 16 chunks that other lanes have"):
        MemoryOwner(bank, place, store=True, replay=pytest.fail).load(tmp_path, SavedWorld(2, 1))
    assert bank_bytes(bank) == before


def test_no_chunk_is_in_two_shards_or_in_none(tmp_path):
    saved = save(tmp_path, (4, 2), write_new, num_tokens=64, num_segments=12)
    for world_size, group_size in WORLDS:
        seen: list[tuple[int, int]] = []
        for rank in range(world_size):
            place = place_of(rank, world_size=world_size, group_size=group_size, num_tokens=64)
            bank = loaded(tmp_path, saved, place)
            seen += product(place.lanes, bank.positions[bank.filled()].tolist())
        assert len(set(seen)) == len(seen)
        older = {chunk for chunk in seen if chunk[1] < 32}  # a ring holds a segment more than can be seen
        assert sorted(set(seen) - older) == sorted(product(range(4), range(32, 96, 2)))


OLD_SHARD = [
    lambda state: state.pop("positions"),
    lambda state: state.update(slots=state["slots"] + 3),
    lambda state: state.update(slots=state["slots"] * 0),
    lambda state: state.update(slots=state["slots"].float()),
    lambda state: state.update(positions=state["positions"] - 100),
    lambda state: state.update(positions=state["positions"][:-1]),
    lambda state: state.update(documents=state["documents"][0]),
    lambda state: state.update(next_slot=torch.tensor(99)),
    lambda state: state.update(num_chunks=torch.tensor([1, 2])),
]
SHARD = [
    lambda state: state.pop("positions"),
    lambda state: state.update(positions=state["positions"] - 100),
    lambda state: state.update(positions=state["positions"] + 2**53),
    lambda state: state.update(positions=state["positions"] // 2),
    lambda state: state.update(positions=state["positions"].float()),
    lambda state: state.update(positions=state["positions"][:-1]),
    lambda state: state.update(positions=state["positions"][0].clone()),
    lambda state: state.update(documents=state["documents"][0].clone()),
    lambda state: state.update(documents=state["documents"].int()),
    lambda state: state.pop("keys.1"),
    lambda state: state.update({"keys.1": state["keys.1"][:1].clone()}),
    lambda state: state.update({"values.0": state["values.0"].half()}),
    lambda state: state.update({"keys.2": state["keys.1"].clone()}),
]


@pytest.mark.parametrize("change", SHARD)
@FORMS
def test_a_shard_that_contradicts_itself_is_damage(tmp_path, change, write):
    owner, path = owner_of(filled_bank()), rank_file(tmp_path, 0)
    write(filled_bank(), path)
    owner.check(tmp_path, ALONE)
    state = in_slot_order(filled_bank()) if write is write_old else snapshot(filled_bank()).tensors
    change(state)
    save_file(state, path)
    with pytest.raises(DamageError, match=r"rank_00000.safetensors holds something else; got: "):
        owner.check(tmp_path, ALONE)


@pytest.mark.parametrize("change", OLD_SHARD)
def test_a_shard_in_slot_order_whose_places_contradict_each_other_is_damage(tmp_path, change):
    owner, state = owner_of(filled_bank()), in_slot_order(filled_bank())
    save_file(state, rank_file(tmp_path, 0))
    owner.check(tmp_path, ALONE)
    change(state)
    save_file(state, rank_file(tmp_path, 0))
    with pytest.raises(DamageError, match="rank_00000.safetensors holds something else; got: "):
        owner.check(tmp_path, ALONE)


SAID = {
    "version 0": (lambda said: said.update(version=0), "version is 0"),
    "version in words": (lambda said: said.update(version="2"), "version is '2'"),
    "version true": (lambda said: said.update(version=True), "version is True"),
    "not a memory": (lambda said: said.update(format="a cake"), "format is 'a cake'"),
    "no chunk size": (lambda said: said.pop("chunk_size"), "chunk_size is missing"),
    "chunks of nothing": (lambda said: said.update(chunk_size=0), "chunk_size is 0"),
    "other chunks": (lambda said: said.update(chunk_size=1), "keys.0 is "),
    "half a layer": (lambda said: said.update(num_layers=1.5), "num_layers is 1.5"),
    "many layers": (lambda said: said.update(num_layers=2**60), "num_layers is "),
    "another layer": (lambda said: said.update(num_layers=3), "4 tensors of keys and values for 3 layers"),
    "another dtype": (lambda said: said.update(dtype="float32"), r"keys.0 is .*BF16, not .*float32"),
    "no dtype": (lambda said: said.update(dtype="object"), "dtype is 'object'"),
    "newer": (
        lambda said: said.update(version=3, chunk_size="four"),
        "the memory of rank_00000.json is stored in a newer form; got: version 3; expected: version 2 or an older one; "
        "do: read it with the version of LongMem that wrote it",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_shard_that_is_not_what_it_says_is_damage(tmp_path, name):
    owner, path = owner_of(filled_bank()), tmp_path / "rank_00000.json"
    owner.save(tmp_path)()
    owner.check(tmp_path, ALONE)
    said, (change, words) = json.loads(path.read_text()), SAID[name]
    change(said)
    path.write_text(json.dumps(said))
    with pytest.raises(DamageError, match=rf"rank_00000.safetensors holds something else; got: .*{words}"):
        owner.check(tmp_path, ALONE)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\x00", "1" * 5000, " " * 100_000, "null"])
def test_junk_beside_a_shard_is_damage(tmp_path, text):
    owner = owner_of(filled_bank())
    owner.save(tmp_path)()
    (tmp_path / "rank_00000.json").write_text(text)
    with pytest.raises(DamageError, match=r"rank_00000.safetensors holds something else; got: .*rank_00000.json: "):
        owner.check(tmp_path, ALONE)


def test_a_shard_that_lost_what_it_says_is_damage(tmp_path):
    owner = owner_of(filled_bank())
    owner.save(tmp_path)()
    (tmp_path / "rank_00000.json").unlink()
    with pytest.raises(DamageError, match=r"rank_00000.safetensors holds something else; got: .*slots"):
        owner.check(tmp_path, ALONE)


def test_fields_of_a_later_writer_are_passed_over(tmp_path):
    owner = owner_of(filled_bank())
    owner.save(tmp_path)()
    path = tmp_path / "rank_00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weather": "fine"}))
    owner.check(tmp_path, ALONE)
    with open_memory(rank_file(tmp_path, 0)) as memory:
        assert memory.about.version == 2


def test_a_shard_of_a_rank_that_is_missing_is_damage(tmp_path):
    write_new(filled_bank(), rank_file(tmp_path, 0))
    with pytest.raises(DamageError, match=r"rank_00001.safetensors holds something else; got: FileNotFoundError"):
        owner_of(filled_bank()).check(tmp_path, SavedWorld(2, 1))
    (tmp_path / "rank_00000.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DamageError, match=r"rank_00000.safetensors holds something else; got: SafetensorError"):
        owner_of(filled_bank()).check(tmp_path, ALONE)
