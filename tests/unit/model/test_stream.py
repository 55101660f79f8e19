"""Rows that read on: feeding remembers and moves on, looking and scoring change nothing, a call chooses the memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from pipeline.model.stream import Memory, Stream
from tests.tiny_longmem import TinyLongMem, bank_bytes, tiny_tokens
from tests.tiny_models import tiny_model

SEGMENT = 16
DEEP = {"layout": "top", "memory_layers": "all", "fusion": "joint"}
ROWS = 3


@dataclass
class Place:
    """A rank of a memory group that exchanges nothing."""

    rank: int
    size: int


@pytest.fixture(scope="module")
def tiny() -> TinyLongMem:
    return TinyLongMem(tiny_model("llama"), lanes=ROWS, sidenet=DEEP)


@pytest.fixture
def stream(tiny: TinyLongMem) -> Stream:
    return Stream(tiny.longmem, tiny.longmem.bank(ROWS))


TOKENS = tiny_tokens((ROWS, 4 * SEGMENT))
DOCUMENTS = torch.zeros(ROWS, SEGMENT, dtype=torch.int64)
TARGETS = tiny_tokens((ROWS, SEGMENT), seed=1)


def segment(number: int) -> torch.Tensor:
    return TOKENS[:, number * SEGMENT : (number + 1) * SEGMENT]


@torch.no_grad()
def test_feeding_is_encoding_and_appending_place_after_place(tiny, stream):
    expected = tiny.longmem.bank(ROWS)
    for number in range(3):
        seen = stream.feed(segment(number), DOCUMENTS)
        assert seen.start == number * SEGMENT and stream.place == (number + 1) * SEGMENT
        encoding = tiny.longmem.encode(segment(number), DOCUMENTS)
        tiny.longmem.append(expected, encoding, start=number * SEGMENT, documents=DOCUMENTS)
    assert bank_bytes(stream.bank) == bank_bytes(expected)


@torch.no_grad()
def test_looking_and_scoring_change_nothing(stream):
    stream.feed(segment(0), DOCUMENTS)
    before = bank_bytes(stream.bank)
    seen = stream.look(segment(1), DOCUMENTS)
    first = stream.losses(seen, TARGETS)
    stream.losses(seen, TARGETS, memory="none")
    stream.backbone_losses(seen, TARGETS)
    assert bank_bytes(stream.bank) == before and stream.place == SEGMENT
    assert torch.equal(stream.losses(stream.look(segment(1), DOCUMENTS), TARGETS), first)


@torch.no_grad()
def test_a_segment_reads_the_same_whether_it_is_remembered_or_not(stream):
    for number in range(3):  # memory of 32 tokens overflows
        looked = stream.losses(stream.look(segment(number), DOCUMENTS), TARGETS)
        assert torch.equal(stream.losses(stream.feed(segment(number), DOCUMENTS), TARGETS), looked)


@torch.no_grad()
def test_memory_is_chosen_by_the_call(tiny, stream):
    stream.feed(segment(0), DOCUMENTS)
    seen = stream.look(segment(1), DOCUMENTS)
    own, none = stream.losses(seen, TARGETS), stream.losses(seen, TARGETS, memory="none")
    assert torch.equal(Stream(tiny.longmem, None).losses(seen, TARGETS), none)
    assert not torch.allclose(own, none, atol=1e-3)
    assert torch.equal(stream.losses(seen, TARGETS, memory=torch.arange(ROWS)), own)


@torch.no_grad()
def test_a_row_reads_the_memory_of_the_row_that_is_named(tiny, stream):
    lane_of_row = torch.tensor([2, 0, 1])
    stream.feed(segment(0), DOCUMENTS)
    borrowed = stream.losses(stream.look(segment(1), DOCUMENTS), TARGETS, memory=lane_of_row)
    other = Stream(tiny.longmem, tiny.longmem.bank(ROWS))  # as if each row had read the other's text before
    other.feed(segment(0)[lane_of_row], DOCUMENTS)
    own = other.losses(other.look(segment(1), DOCUMENTS), TARGETS)
    torch.testing.assert_close(borrowed, own, atol=1e-5, rtol=0)
    assert not torch.allclose(borrowed, stream.losses(stream.look(segment(1), DOCUMENTS), TARGETS), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["lane", "document"])
def test_many_rows_read_one_memory_as_if_each_had_a_copy_of_it(scope):
    tiny = TinyLongMem(tiny_model("llama"), lanes=2, sidenet=DEEP, memory={"scope": scope})
    lane_of_row, tokens, targets = (
        torch.tensor([1, 1, 0, 1, 1]),
        tiny_tokens((5, SEGMENT), seed=2),
        tiny_tokens((5, 16)),
    )
    past = torch.cat([torch.full((2, 9), 4), torch.full((2, 7), 6)], dim=1)  # two documents
    now = torch.full((5, SEGMENT), 6)
    shared = Stream(tiny.longmem, tiny.longmem.bank(2))
    shared.feed(segment(0)[:2], past)
    got = shared.losses(shared.look(tokens, now), targets, memory=lane_of_row)
    copied = Stream(tiny.longmem, tiny.longmem.bank(5))
    copied.feed(segment(0)[lane_of_row], past[lane_of_row])
    expected = copied.losses(copied.look(tokens, now), targets)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(got, copied.losses(copied.look(tokens, now), targets, memory="none"), atol=1e-3)


def test_gradients_through_a_memory_that_is_read_by_many(tiny):
    def gradients(stream: Stream, memory: Memory) -> dict[str, torch.Tensor]:
        tiny.longmem.sidenet.zero_grad()
        stream.losses(stream.look(segment(1), DOCUMENTS), TARGETS, memory=memory).sum().backward()
        named = tiny.longmem.sidenet.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    one, three = (Stream(tiny.longmem, tiny.longmem.bank(count)) for count in (1, ROWS))
    with torch.no_grad():
        one.feed(segment(0)[:1], DOCUMENTS[:1])
        three.feed(segment(0)[:1].expand(ROWS, -1), DOCUMENTS)
    got, expected = gradients(one, torch.zeros(ROWS, dtype=torch.int64)), gradients(three, "own")
    assert got.keys() == expected.keys() and sum(name.endswith("gate") for name in got) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-5, rtol=0)


@pytest.mark.parametrize("lanes", [[0, 1, ROWS], [-1, 0, 1]])
def test_a_lane_that_is_not_there_is_refused(stream, lanes):
    with torch.no_grad():
        seen = stream.feed(segment(0), DOCUMENTS)
    with pytest.raises(AssertionError, match="lanes are 0 to 2"):
        stream.losses(seen, TARGETS, memory=torch.tensor(lanes))


@torch.no_grad()
@pytest.mark.parametrize(("rank", "size"), [(0, 2), (1, 2), (3, 4)])
def test_ranks_of_a_group_take_segments_in_turn(tiny, rank, size):
    stream = Stream(tiny.longmem, None, exchange=Place(rank, size))  # type: ignore[arg-type]
    starts = [stream.feed(segment(0), DOCUMENTS).start for _ in range(3)]
    assert starts == [(step * size + rank) * SEGMENT for step in range(3)]
    assert stream.feed(segment(0), DOCUMENTS, start=(8 * size + rank) * SEGMENT).start == (8 * size + rank) * SEGMENT
    assert stream.place == 9 * size * SEGMENT


@torch.no_grad()
def test_phases_are_told(tiny):
    told: list[str] = []

    class Phase:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            told.append(self.name)

        def __exit__(self, *_: object) -> None:
            told.append(f"/{self.name}")

    stream = Stream(tiny.longmem, tiny.longmem.bank(ROWS), phase=Phase)
    stream.losses(stream.feed(segment(0), DOCUMENTS), TARGETS)
    reads = ["retrieve_and_read", "/retrieve_and_read"] * 4
    assert told == ["backbone", "/backbone", "append", "/append", "sidenet", *reads, "/sidenet", "loss", "/loss"]
