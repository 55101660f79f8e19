"""Invariant 4 and the arithmetic of reading: search, values, log-sum-exp and gradients against float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.memory import segment as segment_module
from pipeline.memory.layer import LayerView
from pipeline.memory.segment import Reading, SegmentView
from pipeline.positions import PositionRule
from tests.accelerator import read_as_on_an_accelerator
from tests.reference import Rules
from tests.tiny_longmem import bank_bytes
from tests.unit.memory.worlds import ATTENTIONS, DIM, HEADS, World, geometry_of

# float32 against float64: sums of a few dozen products of size 1.
FP32_TOLERANCE = 1e-5

TOKENS = 7
SCOPES = ["document", "lane", "group"]
POSITIONS = ["none", "true", "fixed:9", "clamp:14"]


@pytest.fixture(params=[1, 300, segment_module.CPU_AT_ONCE, "accelerator"], autouse=True)
def numbers_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head or query at a time, a few, all; or all, padded to the most chunks, as an accelerator does it."""
    if request.param == "accelerator":
        read_as_on_an_accelerator(monkeypatch)
    else:
        monkeypatch.setattr(segment_module, "CPU_AT_ONCE", request.param)


def make(scope: str, position: str, *, attention: str = "rotary", **kwargs: object) -> tuple[World, Tensor, int]:
    """A ring that has overflown: 48 tokens told, room for 32, 20 of them remembered; documents change in chunks."""
    rules = Rules(tokens=20, chunk_size=4, top_k_tokens=8, scope=scope, position=position)
    world = World(rules, num_chunks=8, attention=attention, **kwargs)  # type: ignore[arg-type]
    edges = {0: [0, 9, 17, 30, 41, 48], 1: [0, 22, 26, 33, 48]}
    document = torch.zeros(2, 48, dtype=torch.int64)
    for lane, ends in edges.items():
        for number, (first, last) in enumerate(pairwise(ends)):
            document[lane, first:last] = 10 * lane + number
    start = 0
    for length in (12, 4, 20, 12):
        world.append(document[:, start : start + length], start=start)
        start += length
    return world, document[:, 36 : 36 + TOKENS], 36


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_search_and_attention(attention: str, scope: str, position: str, backend: str) -> None:
    world, documents, start = make(scope, position, attention=attention)
    query = world.randn(2, HEADS, TOKENS, DIM)
    expected = world.expected(query.double(), documents, start=start)
    retrieved = world.retrieved(query, documents, start=start, search_by=backend)
    assert retrieved == expected.chunks
    assert any(retrieved.values())
    read = world.reader(documents, start=start, search=backend).read(0, query)
    torch.testing.assert_close(read.values.double(), expected.values, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    torch.testing.assert_close(
        read.log_sum_exp.double(), expected.log_sum_exp, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_into_the_query_only(attention: str, scope: str, position: str) -> None:
    world, documents, start = make(scope, position, attention=attention)
    query = world.randn(2, HEADS, TOKENS, DIM).requires_grad_(True)
    exact = query.detach().double().requires_grad_(True)
    weights, of_lse = world.randn(2, HEADS, TOKENS, DIM), world.randn(2, HEADS, TOKENS)
    before = bank_bytes(world.bank)
    read = world.reader(documents, start=start).read(0, query)
    expected = world.expected(exact, documents, start=start)
    for values, log_sum_exp in ((read.values, read.log_sum_exp), (expected.values, expected.log_sum_exp)):
        seen = torch.isfinite(log_sum_exp.detach())
        ((values * weights).sum() + (log_sum_exp * of_lse)[seen].sum()).backward()
    assert query.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(query.grad.double(), exact.grad, atol=FP32_TOLERANCE, rtol=10 * FP32_TOLERANCE)
    store = world.bank.layers[0]
    assert not any(tensor.requires_grad for tensor in (store.keys, store.values, store.chunk_keys))
    assert bank_bytes(world.bank) == before  # reading and its backward pass wrote nothing


def test_keys_that_require_a_gradient_lose_it_in_the_bank() -> None:
    world, documents, _ = make("lane", "none")
    key = world.randn(2, 2, 4, DIM).requires_grad_(True)
    world.bank.append([(key, key * 2)], start=48, documents=documents[:, :4])
    query = world.randn(2, HEADS, TOKENS, DIM).requires_grad_(True)
    world.reader(documents, start=52).read(0, query).values.sum().backward()
    assert key.grad is None
    assert query.grad is not None


@pytest.mark.parametrize("slots_per_block", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("position", ["none", "clamp:14"])
def test_search_in_pieces_is_the_same_search(
    slots_per_block: int, backend: str, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_module, "SLOTS_PER_BLOCK", slots_per_block)
    world, documents, start = make("group", position)
    query = world.randn(2, HEADS, TOKENS, DIM)
    expected = world.expected(query.double(), documents, start=start)
    assert world.retrieved(query, documents, start=start, search_by=backend) == expected.chunks


@pytest.mark.parametrize("block", [1, 2, TOKENS, 50])
def test_blocks_of_queries_change_nothing(block: int) -> None:
    world, documents, start = make("document", "clamp:14")
    query = world.randn(2, HEADS, TOKENS, DIM)
    once = world.reader(documents, start=start, block=3).read(0, query)
    again = world.reader(documents, start=start, block=block).read(0, query)
    torch.testing.assert_close(again.values, once.values, atol=FP32_TOLERANCE, rtol=0)
    torch.testing.assert_close(again.log_sum_exp, once.log_sum_exp, atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_bank_of_16_bits_is_read_in_fp32(dtype: torch.dtype, position: str) -> None:
    """The reference is told the rounded keys and values: what is left is fp32 rounding."""
    world, documents, start = make("lane", position, dtype=dtype)
    query = world.randn(2, HEADS, TOKENS, DIM)
    expected = world.expected(query.double(), documents, start=start)
    read = world.reader(documents, start=start).read(0, query)
    torch.testing.assert_close(read.values.double(), expected.values, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_an_empty_bank_gives_nothing_and_no_gradient() -> None:
    world = World(Rules(8, 2, 4, position="clamp:5"), num_chunks=6)
    query = world.randn(2, HEADS, 5, DIM).requires_grad_(True)
    read = world.reader(torch.zeros(2, 5, dtype=torch.int64), start=0).read(0, query)
    assert torch.equal(read.values, torch.zeros_like(read.values))
    assert bool((read.log_sum_exp == float("-inf")).all())
    (read.values.sum() + torch.sigmoid(read.log_sum_exp).sum()).backward()
    assert query.grad is not None
    assert torch.equal(query.grad, torch.zeros_like(query))


def test_what_is_read_for_a_query_of_16_bits_is_float32() -> None:
    """Whoever mixes it rounds once."""
    world, documents, start = make("lane", "true")
    read = world.reader(documents, start=start).read(0, world.randn(2, HEADS, TOKENS, DIM).bfloat16())
    assert read.values.dtype == torch.float32
    assert read.log_sum_exp.dtype == torch.float32


def test_ages_are_the_distances_to_the_chunks_read() -> None:
    world, documents, start = make("lane", "none")
    query = world.randn(2, HEADS, TOKENS, DIM)
    reader = world.reader(documents, start=start)
    seen: list[tuple[int, Tensor]] = []
    reader.observe_ages = lambda layer, ages: seen.append((layer, ages))
    reader.read(0, query)
    chunks = world.expected(query.double(), documents, start=start).chunks
    wanted = sorted(start + token - at for (_, _, token), found in chunks.items() for _, at in found)
    assert {layer for layer, _ in seen} == {0}
    assert sorted(torch.cat([ages for _, ages in seen]).tolist()) == wanted


def test_only_the_last_tokens_are_visible_by_hand() -> None:
    """Start 36, 20 tokens remembered, chunks of 4: first positions 16 to 32, whatever the ring holds."""
    world, documents, start = make("lane", "none")
    world.rules = Rules(tokens=20, chunk_size=4, top_k_tokens=80)
    found = world.retrieved(world.randn(2, HEADS, TOKENS, DIM), documents, start=start)
    assert {tuple(sorted(chunks)) for chunks in found.values()} == {
        tuple((lane, at) for at in (16, 20, 24, 28, 32)) for lane in (0, 1)
    }


LANE_OF_ROW = [1, 1, 0, 1, 1]  # more rows than lanes, one of which few read; rows change lanes in no order
ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lane_of_row": {"lane_of_row": torch.tensor(LANE_OF_ROW)},
    "first": {"first": 5},
    "visible": {"visible": torch.tensor([[True, False, True, False, True], [False] * 5])},
    "all": {
        "lane_of_row": torch.tensor(LANE_OF_ROW),
        "first": 3,
        "visible": torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.6,
    },
}


def check_read(world: World, documents: Tensor, start: int, reading: dict[str, Any]) -> None:
    """Chunks, values, log-sum-exps and gradients, of what is retrieved and of the window, against float64."""
    rules = world.rules
    query = world.randn(len(documents), HEADS, TOKENS, DIM)
    exact = query.double().requires_grad_(True)
    expected = world.expected(exact, documents, start=start, **reading)
    for backend in ("torch", "faiss") if rules.retrieve_for == "head" else ("torch",):
        found = world.retrieved(query, documents, start=start, search_by=backend, **reading)
        assert found == expected.chunks
    query.requires_grad_(True)
    read = world.reader(documents, start=start, **reading).read(0, query)
    pairs = [(read, expected)]
    if rules.window_tokens:
        assert read.window is not None and expected.window is not None
        pairs.append((read.window, expected.window))
    for got, wanted in pairs:
        for name in ("values", "log_sum_exp"):
            number, right = getattr(got, name).double(), getattr(wanted, name)
            torch.testing.assert_close(number, right, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
        weights, of_lse = world.randn(*query.shape), world.randn(*query.shape[:3])
        for each in (got, wanted):
            seen = torch.isfinite(each.log_sum_exp.detach())
            if bool(seen.any()):
                sums = (each.values * weights).sum() + (each.log_sum_exp * of_lse)[seen].sum()
                sums.backward(retain_graph=True)
    assert query.grad is not None and exact.grad is not None
    torch.testing.assert_close(query.grad.double(), exact.grad, atol=2 * FP32_TOLERANCE, rtol=10 * FP32_TOLERANCE)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("retrieve_for", ["head", "kv_head"])
def test_rows_that_choose_what_they_read(attention: str, scope: str, arguments: str, retrieve_for: str) -> None:
    """Whose memory, from where in a segment, and what of it."""
    world, documents, start = make(scope, "clamp:14", attention=attention)
    world.rules = replace(world.rules, retrieve_for=retrieve_for)
    reading = ARGUMENTS[arguments]
    check_read(world, documents[LANE_OF_ROW] if "lane_of_row" in reading else documents, start, reading)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("position", "window", "retrieve_for"),
    [("clamp:14", 8, "head"), ("clamp:14", 8, "kv_head"), ("none", 20, "kv_head")],  # older chunks are left, or none
)
@pytest.mark.parametrize("arguments", ["none", "all", "borrowed"])
def test_a_window_is_read_whole_and_what_is_retrieved_is_older(
    attention: str, scope: str, position: str, window: int, arguments: str, retrieve_for: str
) -> None:
    world, documents, start = make(scope, position, attention=attention)
    world.rules = replace(world.rules, retrieve_for=retrieve_for, window_tokens=window)
    reading = ARGUMENTS.get(arguments, {"retrieve_from": torch.tensor([1, 0])})
    check_read(world, documents[LANE_OF_ROW] if "lane_of_row" in reading else documents, start, reading)


def test_rows_that_fill_pools_up_are_not_read_for() -> None:
    """Four rows read lane 1 and one lane 0: what fills lane 0 up has no ages, and so read nothing."""
    world, documents, start = make("lane", "none")
    query, ages = world.randn(5, HEADS, TOKENS, DIM), []
    reader = world.reader(documents[LANE_OF_ROW], start=start, lane_of_row=torch.tensor(LANE_OF_ROW))
    reader.observe_ages = lambda _, found: ages.append(found)
    reader.read(0, query)
    assert sum(map(len, ages)) == 5 * HEADS * TOKENS * 2  # two chunks for every query of the five rows


def test_a_lane_that_is_not_there_is_an_error_at_once() -> None:
    world, documents, start = make("lane", "none")
    with pytest.raises(AssertionError, match="lanes are 0 to 1"):
        world.reader(documents, start=start, lane_of_row=torch.tensor([0, 2]))


def test_keys_that_nobody_can_see_widen_no_bound() -> None:
    """The bound decides how many chunks are looked at twice: one old, long key would make it all of them."""
    world, documents, start = make("lane", "none")
    world.rules = replace(world.rules, tokens=12)
    query, old = world.randn(2, HEADS, TOKENS, DIM), world.bank.positions < start - 12
    assert old.any()
    geometry, bounds = geometry_of(world.attention), []
    for factor in (1.0, 1e6):
        world.bank.layers[0].chunk_keys[:, :, torch.from_numpy(old)] *= factor
        segment = SegmentView(
            world.bank, world.settings(), Reading(start, documents), geometry.rule(PositionRule("none"))
        )
        view = LayerView(segment, world.bank.layers[0], geometry)
        bounds.append(view.rounding_bound(view.queries(query, slice(0, TOKENS))))
    assert torch.equal(*bounds)
