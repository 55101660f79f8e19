"""The ring under random histories: what is visible is exactly what the rules say, whatever happened before."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from tests.reference import Past, Rules
from tests.tiny_longmem import bank_bytes
from tests.unit.memory.worlds import DIM, HEADS, World

FP32_TOLERANCE = 1e-5  # sums of a few dozen products of size 1


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happens to a bank: a segment of so many chunks after a gap of tokens, or a rarer thing."""

    chunks: int
    gap: int
    action: str  # append | reset | reload


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, list[Event]]:
    """Chunk size, remembered chunks, spare chunks of the ring, events."""
    longest = draw(st.integers(1, 6))
    event = st.builds(
        Event,
        chunks=st.integers(1, longest),
        gap=st.sampled_from([0, 0, 0, 1, 3]),
        action=st.sampled_from(["append"] * 6 + ["reset", "reload"]),
    )
    return (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 7)),  # often fewer than a segment's: it is then longer than half the ring
        longest + draw(st.integers(0, 2)),
        draw(st.lists(event, min_size=1, max_size=8)),
    )


def reloaded(bank: MemoryBank) -> MemoryBank:
    """A new bank that holds the chunks of this one, from its first slot on."""
    fresh = MemoryBank(bank.shape, dtype=bank.dtype, device=bank.device)
    fresh.layers[0].keys.fill_(7.0)  # what lies in empty slots must not matter
    filled, store = bank.filled(), bank.layers[0]
    slots, positions = torch.arange(len(filled)), torch.from_numpy(bank.positions)[filled]
    fresh.label(positions, bank.documents[:, filled], slots=slots, next_slot=len(filled) % bank.shape.num_chunks)
    for lane in torch.arange(bank.shape.num_lanes).split(1):
        for some in slots.split(2):
            keys, values = (tensor[:, lane][:, :, filled[some]] for tensor in (store.keys, store.values))
            fresh.put(0, keys, values, lanes=lane, slots=some)
    return fresh


def contents(bank: MemoryBank) -> list[Tensor]:
    """What a bank holds, the oldest chunk first, wherever it holds it."""
    filled, store = bank.filled(), bank.layers[0]
    chunks = [tensor[:, :, filled] for tensor in (store.keys, store.values, store.chunk_keys)]
    return [torch.from_numpy(bank.positions)[filled], bank.documents[:, filled], *chunks]


def check(world: World, documents: Tensor, start: int) -> None:
    """The segment at `start` sees what it should, and reads it right."""
    query = world.randn(world.lanes, HEADS, 2, DIM)
    documents = documents[:, :2].expand(-1, 2)
    expected = world.expected(query.double(), documents, start=start)
    found = world.retrieved(query, documents, start=start)
    for at, chunks in found.items():
        assert sorted(chunks) == sorted(expected.chunks.get(at, []))
    read = world.reader(documents, start=start).read(0, query)
    torch.testing.assert_close(read.values.double(), expected.values, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


@given(history=histories(), scope=st.sampled_from(["document", "lane", "group"]), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_exactly_the_last_tokens_before_the_segment_are_visible(
    history: tuple[int, int, int, list[Event]], scope: str, data: st.DataObject
) -> None:
    chunk_size, remembered, spare, events = history
    everything = 1000 * chunk_size
    rules = Rules(
        remembered * chunk_size, chunk_size, everything, scope, data.draw(st.sampled_from(["none", "clamp:6"]))
    )
    world = World(rules, num_chunks=remembered + spare)
    start, document = 0, torch.zeros(2, dtype=torch.int64)
    for event in events:
        if event.action == "reset":
            world.bank.reset()
            world.past = Past()
        if event.action == "reload":
            world.bank = reloaded(world.bank)
        start += event.gap
        length = event.chunks * chunk_size
        # A document may end anywhere, inside a chunk too; the two lanes do not agree.
        ends = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
        documents = document[:, None] + (torch.arange(length) >= ends[:, None]).long()
        document = documents[:, -1] + torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)))
        world.append(documents, start=start)
        check(world, documents, start)
        start += length
        assert world.bank.end == start
        held = len(world.past.positions) // chunk_size
        assert world.bank.num_filled == min(held, remembered + spare)


@given(history=histories())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_reloaded_bank_goes_on_as_the_old_one(history: tuple[int, int, int, list[Event]]) -> None:
    chunk_size, remembered, spare, events = history
    world = World(Rules(8 * chunk_size, chunk_size, chunk_size), num_chunks=remembered + spare)
    start = 0
    for number, event in enumerate(events):
        documents = torch.full((2, event.chunks * chunk_size), number)
        before = reloaded(world.bank)
        key, value = (world.randn(2, 2, documents.shape[1], DIM) for _ in range(2))
        for bank in (world.bank, before):
            bank.append([(key, value)], start=start, documents=documents)
        start += documents.shape[1]
        assert all(map(torch.equal, contents(world.bank), contents(before)))


def test_nothing_moves_when_something_is_written() -> None:
    """Ring of six chunks of two tokens: the third segment overwrites the oldest chunks in place, no others."""
    world = World(Rules(8, 2, 4), num_chunks=6)
    documents = torch.zeros((2, 4), dtype=torch.int64)
    for start in (0, 4, 8):
        world.append(documents, start=start)
    assert world.bank.positions.tolist() == [0, 2, 4, 6, 8, 10]
    storage, keys = world.bank.layers[0].keys.data_ptr(), world.bank.layers[0].keys.clone()
    world.append(documents[:, :2], start=12)
    assert world.bank.positions.tolist() == [12, 2, 4, 6, 8, 10]
    assert world.bank.layers[0].keys.data_ptr() == storage
    assert torch.equal(world.bank.layers[0].keys[:, :, 1:], keys[:, :, 1:])
    assert not torch.equal(world.bank.layers[0].keys[:, :, 0], keys[:, :, 0])


def test_a_segment_that_wraps_around_the_ring() -> None:
    world = World(Rules(8, 2, 4), num_chunks=5)
    world.append(torch.zeros((2, 8), dtype=torch.int64), start=0)
    world.append(torch.ones((2, 6), dtype=torch.int64), start=8)
    assert world.bank.positions.tolist() == [10, 12, 4, 6, 8]
    assert world.bank.documents.tolist() == [[1, 1, 0, 0, 1]] * 2
    assert world.bank.next_slot == 2
    assert torch.equal(world.bank.layers[0].keys[:, :, 4], world.past.keys[1][:, :, :2].transpose(0, 1).float())
    assert torch.equal(world.bank.layers[0].keys[:, :, 0], world.past.keys[1][:, :, 2:4].transpose(0, 1).float())


def test_reset_forgets_what_cannot_be_seen_again() -> None:
    world = World(Rules(8, 2, 4), num_chunks=6)
    world.append(torch.zeros((2, 4), dtype=torch.int64), start=0)
    world.bank.reset()
    assert (world.bank.num_filled, world.bank.end, world.bank.next_slot) == (0, 0, 0)
    world.append(torch.zeros((2, 4), dtype=torch.int64), start=0)  # a lane may begin anew
    assert world.bank.num_filled == 2


def test_bank_bytes_notices_a_change() -> None:
    """The helper that the tests of invariant 3 lean on."""
    world = World(Rules(8, 2, 4), num_chunks=6)
    world.append(torch.zeros((2, 4), dtype=torch.int64), start=0)
    before = bank_bytes(world.bank)
    world.bank.layers[0].values[0, 0, 0, 0, 0] += 1e-6
    assert bank_bytes(world.bank) != before
