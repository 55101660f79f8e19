"""Owners of state: what is saved comes back, and what does not fit is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.manifest import DamageError
from pipeline.checkpoint.owners import LanesOwner, MemoryOwner, RandomOwner
from pipeline.checkpoint.reshard import rank_file
from pipeline.data.lanes import Lanes
from pipeline.errors import CheckpointError, DataError
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.place import ShardPlace, Turn
from tests import shards
from tests.shards import place_of
from tests.tiny_longmem import bank_bytes

ALONE = SavedWorld(world_size=1, group_size=1)
SHAPE = BankShape(num_layers=2, num_lanes=2, num_kv_heads=2, head_dim=4, num_chunks=5, chunk_size=2)


def filled_bank(num_segments=4):
    bank, generator = MemoryBank(SHAPE, dtype=torch.bfloat16, device=torch.device("cpu")), torch.Generator()
    for segment in range(num_segments):  # 4 chunks of 5: the ring goes round
        memory = [tuple(torch.randn(2, 2, 4, 4, generator=generator) for _ in range(2)) for _ in range(2)]
        bank.append(memory, start=4 * segment, documents=torch.full((2, 4), segment))  # type: ignore[arg-type]
    return bank


def owner_of(bank, *, store=True, replay=None):
    place = ShardPlace(lanes=(0, 1), num_lanes=2, turn=Turn(0, 1, 4), num_tokens=6)
    return MemoryOwner(bank, place, store=store, replay=replay or pytest.fail)


@pytest.mark.parametrize("num_segments", [0, 1, 4])
def test_memory_comes_back_bit_for_bit(tmp_path, num_segments):
    bank, other = filled_bank(num_segments), filled_bank(2)
    owner_of(bank).save(tmp_path)()
    owner_of(other).load(tmp_path, ALONE)
    left, right = bank.state_dict(), other.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    more = [(torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4))] * 2
    for each in (bank, other):
        each.append(more, start=16, documents=torch.full((2, 4), 9))
    if num_segments == 4:  # nothing that is empty in one bank holds old numbers in the other
        assert bank_bytes(in_float32(bank)) == bank_bytes(in_float32(other))


def in_float32(bank):
    copy = MemoryBank(SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    copy.load_state_dict(
        {name: tensor.float() if "." in name else tensor for name, tensor in bank.state_dict().items()}
    )
    return copy


def test_memory_of_another_shape_is_refused(tmp_path):
    owner_of(filled_bank()).save(tmp_path)()
    other = MemoryBank(SHAPE, dtype=torch.float32, device=torch.device("cpu"))
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
        save_file(shards.filled_bank(place, num_segments=8).state_dict(), rank_file(tmp_path, rank))
    wide = replace(place_of(0, world_size=2, group_size=1, num_tokens=30), num_lanes=2)
    bank, own = shards.empty_bank(wide), shards.filled_bank(wide, num_segments=8)
    MemoryOwner(bank, wide, store=True, replay=pytest.fail).load(tmp_path, SavedWorld(2, 1))
    sight = {"end": 64, "num_tokens": 30}
    shards.assert_same(shards.visible(bank, **sight), shards.visible(own, **sight))


class Documents:
    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return (100 * document + np.arange(self.lengths[document]))[start:stop]


def lanes(*lengths):
    return Lanes(Documents(*lengths), num_lanes=2, lanes=(0, 1), segment_tokens=4, seed=0)


def test_lanes_go_on_where_they_stood(tmp_path):
    one, two = lanes(7, 9, 5), lanes(7, 9, 5)
    for _ in range(5):
        one.next_segment()
    LanesOwner(one).save(tmp_path)()
    LanesOwner(two).load(tmp_path, ALONE)
    for _ in range(5):
        left, right = one.next_segment(), two.next_segment()
        assert left.start == right.start and (left.tokens == right.tokens).all()
    with pytest.raises(DataError, match="comes from other data or settings"):
        LanesOwner(lanes(7, 9, 6)).load(tmp_path, ALONE)


def test_lanes_of_other_groups_are_dealt_anew(tmp_path):
    def one_of(lane):
        return Lanes(Documents(7, 9, 5), num_lanes=2, lanes=(lane,), segment_tokens=4, seed=0)

    for rank in range(4):  # two groups of two ranks
        own = one_of(rank // 2)
        own.skip(5)
        rank_file(tmp_path, rank, "json").write_text(json.dumps(own.state_dict()))
    whole, moved = lanes(7, 9, 5), lanes(7, 9, 5)
    whole.skip(5)
    LanesOwner(moved).load(tmp_path, SavedWorld(4, 2))
    assert moved.state_dict() == whole.state_dict()


def test_random_numbers_go_on(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draw()
    write = RandomOwner().save(tmp_path)
    expected = draw()
    assert draw() != expected
    write()  # what the generators were then, however far they are now
    RandomOwner().load(tmp_path, ALONE)
    assert draw() == expected


def put(path, change):
    """Rewrites a stored JSON."""
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


JUNK = ["", "[]", "[" * 100_000, "\x00", '{"index": 1}', "1" * 5000]
LANES = [
    lambda state: state.update(index="1"),
    lambda state: state.update(index=-1),
    lambda state: state.update(index=10**30),
    lambda state: state.update(lanes=[1]),
    lambda state: state["lanes"].update({"0": 7}),
    lambda state: state["lanes"].update({"0": {"ordinal": 1.5, "offset": 0}}),
    lambda state: state["lanes"].update({"0": {"ordinal": 0, "offset": -1}}),
    lambda state: state.pop("fingerprint"),
]


@pytest.mark.parametrize("change", LANES)
def test_lanes_of_another_type_are_damage(tmp_path, change):
    owner = LanesOwner(lanes(7, 9, 5))
    owner.save(tmp_path)()
    owner.check(tmp_path, ALONE)
    put(tmp_path / "rank_00000.json", change)
    with pytest.raises(DamageError, match="rank_00000.json holds something else; got: "):
        owner.check(tmp_path, ALONE)


@pytest.mark.parametrize("text", JUNK)
@pytest.mark.parametrize("owner", [LanesOwner(lanes(7, 9, 5)), RandomOwner()], ids=lambda owner: owner.name)
def test_junk_is_damage(tmp_path, owner, text):
    owner.save(tmp_path)()
    (tmp_path / "rank_00000.json").write_text(text)
    with pytest.raises(DamageError, match="rank_00000.json holds something else; got: "):
        owner.check(tmp_path, ALONE)


def test_a_lane_that_no_file_has_is_damage_unless_the_run_is_another(tmp_path):
    owner = LanesOwner(lanes(7, 9, 5))
    owner.save(tmp_path)()
    put(tmp_path / "rank_00000.json", lambda state: state["lanes"].pop("1"))
    with pytest.raises(DamageError, match="lane 1 is missing; got: 1 lanes"):
        owner.check(tmp_path, ALONE)
    LanesOwner(lanes(7, 9, 6)).check(tmp_path, ALONE)  # whose load says which data it wants


def test_a_place_outside_the_documents_is_said(tmp_path):
    owner = LanesOwner(lanes(7, 9, 5))
    owner.save(tmp_path)()
    put(tmp_path / "rank_00000.json", lambda state: state["lanes"]["1"].update(offset=5000))
    owner.check(tmp_path, ALONE)
    with pytest.raises(DataError, match="points outside a document; got: lane 1, document 0, token 5000"):
        owner.load(tmp_path, ALONE)


GENERATORS = [
    lambda state: state["python"].pop(),
    lambda state: state.update(python=[3, [1, 2], None]),
    lambda state: state["python"][1].__setitem__(0, "x"),
    lambda state: state["python"][1].__setitem__(0, -1),
    lambda state: state.update(numpy=["MT19937", [1], 0, 0, 0.0]),
    lambda state: state["numpy"].__setitem__(0, "other"),
    lambda state: state["numpy"][1].__setitem__(0, 2**40),
    lambda state: state.pop("numpy"),
]


@pytest.mark.parametrize("change", GENERATORS)
def test_generators_of_another_type_are_damage_and_nobody_loses_his(tmp_path, change):
    RandomOwner().save(tmp_path)()
    RandomOwner().check(tmp_path, ALONE)
    put(tmp_path / "rank_00000.json", change)
    before = random.getstate()
    with pytest.raises(DamageError, match="rank_00000.json holds something else; got: "):
        RandomOwner().check(tmp_path, ALONE)
    assert random.getstate() == before


@pytest.mark.parametrize("tensors", [{}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}])
def test_torch_generators_of_another_shape_are_damage(tmp_path, tensors):
    RandomOwner().save(tmp_path)()
    save_file(tensors, tmp_path / "rank_00000.safetensors")
    with pytest.raises(DamageError, match="rank_00000.safetensors holds something else; got: "):
        RandomOwner().check(tmp_path, ALONE)


SHARD = [
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


@pytest.mark.parametrize("change", SHARD)
def test_a_shard_whose_places_contradict_each_other_is_damage(tmp_path, change):
    owner, state = owner_of(filled_bank()), filled_bank().state_dict()
    save_file(state, rank_file(tmp_path, 0))
    owner.check(tmp_path, ALONE)
    change(state)
    save_file(state, rank_file(tmp_path, 0))
    with pytest.raises(DamageError, match="rank_00000.safetensors holds something else; got: "):
        owner.check(tmp_path, ALONE)


def test_a_shard_of_a_rank_that_is_missing_is_damage(tmp_path):
    save_file(filled_bank().state_dict(), rank_file(tmp_path, 0))
    with pytest.raises(DamageError, match=r"rank_00001.safetensors holds something else; got: FileNotFoundError"):
        owner_of(filled_bank()).check(tmp_path, SavedWorld(2, 1))
    (tmp_path / "rank_00000.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DamageError, match=r"rank_00000.safetensors holds something else; got: SafetensorError"):
        owner_of(filled_bank()).check(tmp_path, ALONE)
