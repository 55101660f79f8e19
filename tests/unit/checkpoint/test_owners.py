"""Owners of state: what is saved comes back, and what does not fit is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.manifest import DamageError
from pipeline.checkpoint.owners import LanesOwner, RandomOwner
from pipeline.checkpoint.rank_files import rank_file
from pipeline.data.lanes import Lanes
from pipeline.errors import DataError

ALONE = SavedWorld(world_size=1, group_size=1)


class Documents:
    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return (100 * document + np.arange(self.lengths[document]))[start:stop]


def lanes(*lengths):
    return Lanes([Documents(*lengths)], num_lanes=2, lanes=(0, 1), segment_tokens=4, seed=0)


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
        return Lanes([Documents(7, 9, 5)], num_lanes=2, lanes=(lane,), segment_tokens=4, seed=0)

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
