"""A bank that cannot be held is refused before it is allocated; one that may fit is not."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.memory import room
from pipeline.memory.room import Room, check_room, room_on

CPU = torch.device("cpu")


@pytest.fixture()
def host(monkeypatch):
    """A host with 1,000 bytes, of which 600 are free."""
    monkeypatch.setattr(room, "room_on", lambda device: Room(free=600, total=1000, words="host"))


@pytest.mark.parametrize(("needed", "num_ranks"), [(600, 1), (500, 2), (250, 4)])
def test_what_may_fit_is_let(host, needed, num_ranks):
    check_room(needed, CPU, num_ranks=num_ranks)


@pytest.mark.parametrize(("needed", "num_ranks"), [(601, 1), (501, 2), (251, 4)])
def test_what_cannot_fit_is_refused_in_bytes(host, needed, num_ranks):
    words = (
        rf"does not fit into host memory; got: {needed} bytes for a rank, {num_ranks} rank\(s\) with 1,000 bytes in "
        "all, 600 of them free; do: a smaller memory.tokens, .*; launch/plan.py says what fits"
    )
    with pytest.raises(ConfigError, match=words):
        check_room(needed, CPU, num_ranks=num_ranks)


def test_an_accelerator_is_not_shared_and_the_host_is_advised(monkeypatch):
    monkeypatch.setattr(room, "room_on", lambda device: Room(free=600, total=1000, words="accelerator"))
    check_room(600, torch.device("meta"), num_ranks=8)
    with pytest.raises(ConfigError, match=r"1 rank\(s\) with .*; do: memory.device host, a smaller"):
        check_room(601, torch.device("meta"), num_ranks=8)


def test_this_host_has_room_and_less_than_a_yottabyte():
    found = room_on(CPU)
    if found is None:
        pytest.skip("this system does not say what memory it has")
    assert 0 < found.free <= found.total
    check_room(1, CPU, num_ranks=1)
    with pytest.raises(ConfigError, match="does not fit into host memory"):
        check_room(10**24, CPU, num_ranks=1)


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, (5120, 10240)),
        ({"job/memory.max": "max", "job/memory.swap.max": "max"}, (5120, 10240)),
        ({"job/memory.max": "3000", "job/memory.swap.max": "0"}, (3000, 3000)),
        ({"job/memory.max": "3000", "job/memory.swap.max": "max"}, (5120, 3000 + 2048)),
        ({"job/memory.max": "3000", "job/memory.swap.max": "0", "job/step/memory.max": "7000",
          "job/step/memory.swap.max": "0"}, (3000, 3000)),
    ],
)  # fmt: skip
def test_a_containers_limit_counts(monkeypatch, tmp_path, limits, expected):
    meminfo = "MemTotal: 8 kB\nMemAvailable: 4 kB\nSwapTotal: 2 kB\nSwapFree: 1 kB\nHugePages_Total: 0\n"
    monkeypatch.setattr(room, "_MEMINFO", write(tmp_path, "meminfo", meminfo))
    monkeypatch.setattr(room, "_OWN_GROUP", write(tmp_path, "own", "0::/job/step\n"))
    monkeypatch.setattr(room, "_GROUPS", tmp_path / "groups")
    for name, text in limits.items():
        write(tmp_path / "groups", name, text)
    found = room_on(CPU)
    assert found is not None
    free, total = expected
    assert (found.free, found.total) == (min(free, total), total)
