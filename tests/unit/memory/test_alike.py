"""Chunks that are the same score the same: which of them are read is decided by place, however many there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.memory import alike
from pipeline.memory.alike import kinds_of
from pipeline.memory.layer import LayerView
from pipeline.memory.search import MARGIN, search
from pipeline.memory.segment import Reading, SegmentView
from tests.reference import Rules
from tests.unit.memory.worlds import DIM, HEADS, KV_HEADS, World, geometry_of

NUM_CHUNKS, SIZE, TOKENS = 120, 4, 5


def view_of(world: World, documents: Tensor) -> LayerView:
    settings, geometry = world.settings(), geometry_of(world.attention)
    segment = SegmentView(world.bank, settings, Reading(world.bank.end, documents), geometry.rule(settings.rule))
    return LayerView(segment, world.bank.layers[0], geometry)


def world_of(num_kinds: int, *, position: str, scope: str, retrieve_for: str, noise: float) -> World:
    """A ring that has overflown, of chunks of a few kinds in no order, which differ by a noise; two documents."""
    rules = Rules(
        tokens=(NUM_CHUNKS - 2) * SIZE,
        chunk_size=SIZE,
        top_k_tokens=6 * SIZE,
        scope=scope,
        position=position,
        retrieve_for=retrieve_for,
    )
    world = World(rules, num_chunks=NUM_CHUNKS)
    kinds = world.randn(2, KV_HEADS, num_kinds, SIZE, DIM)
    for start in range(0, 2 * NUM_CHUNKS * SIZE, NUM_CHUNKS * SIZE // 3):
        chosen = torch.randint(num_kinds, (NUM_CHUNKS // 3,), generator=world.generator)
        keys = kinds[:, :, chosen].flatten(2, 3)
        keys = keys * (1 + noise * world.randn(*keys.shape[:3], 1))
        documents = torch.full((2, keys.shape[2]), start // 320 % 2)
        world.bank.append([(keys, world.randn(*keys.shape))], start=start, documents=documents)
    return world


@pytest.mark.parametrize("retrieve_for", ["head", "kv_head"])
@pytest.mark.parametrize("scope", ["document", "lane", "group"])
@pytest.mark.parametrize("position", ["none", "fixed:9", "clamp:60", "true"])
@pytest.mark.parametrize(("num_kinds", "noise"), [(1, 0.0), (3, 0.0), (20, 0.0), (3, 1e-7)])
def test_equal_scores_are_decided_by_place(num_kinds, noise, position, scope, retrieve_for):
    """Every visible chunk scored by itself, sorted by score and then by order."""
    world = world_of(num_kinds, position=position, scope=scope, retrieve_for=retrieve_for, noise=noise)
    documents = torch.tensor([[0] * TOKENS, [0, 0, 1, 1, 1]])
    view = view_of(world, documents)
    queries = view.queries(world.randn(2, HEADS, TOKENS, DIM), slice(0, TOKENS))
    found, order = search(view, queries), view.segment.slot_order
    members, slots = queries.members.flatten(), found.slots.flatten(0, 2)
    scores, places = [], []
    for run in view.segment.runs:
        own = torch.arange(run.start, run.stop)
        exact = view.chunk_scores(queries, members, own.expand(len(members), -1), near=run.near)
        hidden = view.segment.hidden(queries.documents, run)
        if hidden is not None:
            exact = exact.masked_fill(hidden.expand(*queries.far.shape[:3], -1).flatten(0, 2), float("-inf"))
        scores.append(exact)
        places.append(own)
    for got, row in zip(slots.tolist(), torch.cat(scores, dim=-1).tolist(), strict=True):
        ranked = sorted(zip(row, torch.cat(places).tolist(), strict=True), key=lambda pair: (-pair[0], -order[pair[1]]))
        assert got == [slot for _, slot in ranked[: len(got)]]


@pytest.mark.parametrize("num_kinds", [1, 3])
def test_what_is_the_same_is_scored_once(num_kinds, monkeypatch):
    """A table, a row of dashes: without this each of its chunks is fetched and scored again for every query."""
    world = world_of(num_kinds, position="none", scope="lane", retrieve_for="head", noise=0.0)
    view = view_of(world, torch.zeros(2, TOKENS, dtype=torch.int64))
    queries = view.queries(world.randn(2, HEADS, TOKENS, DIM), slice(0, TOKENS))
    scored: list[int] = []
    chunk_scores = LayerView.chunk_scores

    def counted(*given: Tensor, near: bool) -> Tensor:
        scored.append(given[-1].numel())
        return chunk_scores(*given, near=near)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerView, "chunk_scores", counted)
    search(view, queries)
    candidates = view.segment.settings.top_k_chunks + MARGIN
    of_each_run = len(queries.members.flatten()) * (candidates + num_kinds)
    assert 0 < sum(scored) <= len(view.segment.runs) * of_each_run


def test_rows_that_are_the_same_are_of_one_kind():
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [0.0, 5.0], [-0.0, 5.0], [3.0, 2.0], [1.0, 2.0]])
    kinds = kinds_of(rows)
    members = sorted((kinds.of_row == kind).nonzero()[:, 0].tolist() for kind in range(len(kinds.firsts)))
    assert members == [[0, 2, 6], [1, 5], [3], [4]]  # the two zeros are different bits
    assert kinds.of_row[kinds.firsts].tolist() == [0, 1, 2, 3]


def test_different_rows_of_one_code_are_of_different_kinds(monkeypatch):
    monkeypatch.setattr(alike, "_FACTOR", 0)  # the code is the last column
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 5.0]])
    kinds = kinds_of(rows)
    assert torch.equal(rows[kinds.firsts][kinds.of_row], rows)
    assert len(kinds.firsts) == 4  # the first row and the third are parted by the second
