"""Rows that read in pieces find what a stream finds that reads whole segments, wherever they stand."""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.memory import room
from pipeline.memory.room import Room
from pipeline.memory.sources import Source
from pipeline.model.longmem import LongMem
from pipeline.model.owned import Row
from pipeline.model.rows import Rows
from pipeline.model.stream import Context, Stream
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import VARIANTS, tiny_model

SEGMENT, LENGTH = 16, 75  # four segments and more; memory holds two
TOLERANCE = 2e-4  # of inputs of the LM head, of size 1 to 10: float32 in products of other shapes
DEEP: Mapping[str, Any] = {
    "sidenet": {"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 1.0},
    "backbone": {"context_tokens": 6},
    "memory": {"position": "clamp:12", "sink": True, "window_tokens": 8, "retrieve_for": "kv_head"},
}
PAPER: Mapping[str, Any] = {"sidenet": {"layout": "uniform"}, "memory": {"position": "none"}}


def longmem(family: str = "llama", settings: Mapping[str, Any] = DEEP) -> LongMem:
    return TinyLongMem(tiny_model(family), lanes=1, **settings).longmem


def begin(model: LongMem, count: int) -> Rows:
    return Rows(model, [Row((), 0, model.settings.memory.tokens) for _ in range(count)])


@torch.no_grad()
def whole(model: LongMem, text: Tensor) -> Tensor:
    """Input of the LM head of a text `[n]` that a stream reads segment by segment, `[n, E]`."""
    stream, found, left = Stream(model, model.bank(1)), [], model.settings.context_tokens
    for start in range(0, len(text), SEGMENT):
        tokens, before = text[None, start : start + SEGMENT], text[None, max(0, start - left) : start]
        context = Context(before, torch.zeros_like(before))
        seen = stream.look(tokens, torch.zeros_like(tokens), context, start=start)
        found.append(stream.hidden(seen)[0])
        if tokens.shape[1] == SEGMENT:
            stream.remember(seen)
    return torch.cat(found)


def in_pieces(rows: Rows, texts: Tensor, lengths: Sequence[int]) -> Tensor:
    found, at = [], 0
    for length in lengths:
        found.append(rows.read(texts[:, at : at + length]))
        at += length
    return torch.cat(found, dim=1)


def pieces(total: int, seed: int) -> list[int]:
    """Random lengths, many of them 1, some longer than a segment."""
    chosen: list[int] = []
    draw = random.Random(seed)
    while sum(chosen) < total:
        chosen.append(min(draw.choice([1, 1, 1, 2, 5, 16, 21, 40]), total - sum(chosen)))
    return chosen


@pytest.mark.parametrize("settings", [DEEP, PAPER], ids=["deep", "paper"])
@pytest.mark.parametrize("family", VARIANTS)
def test_pieces_are_the_whole(family, settings):
    model, texts = longmem(family, settings), tiny_tokens((2, LENGTH))
    expected = torch.stack([whole(model, text) for text in texts])
    for seed in range(3):
        found = in_pieces(begin(model, 2), texts, pieces(LENGTH, seed))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    ones = in_pieces(begin(model, 2), texts, [1] * LENGTH)
    torch.testing.assert_close(ones, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("scope", ["document", "group"])
def test_a_row_is_one_document_and_sees_no_other_row(scope):
    settings = {**DEEP, "memory": {**DEEP["memory"], "scope": scope}}
    texts, model = tiny_tokens((2, LENGTH)), longmem()
    expected = torch.stack([whole(model, text) for text in texts])  # under scope `lane`
    found = in_pieces(begin(longmem(settings=settings), 2), texts, pieces(LENGTH, 0))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("wanted", [0, 1, 7, 30])
def test_what_is_not_asked_is_remembered_all_the_same(wanted):
    model, texts = longmem(), tiny_tokens((2, LENGTH))
    expected = torch.stack([whole(model, text) for text in texts])
    for first in (3, SEGMENT, 40):
        rows = begin(model, 2)
        head = rows.read(texts[:, :first], wanted=min(wanted, first))
        assert head.shape == (2, min(wanted, first), model.backbone.hidden_size)
        torch.testing.assert_close(head, expected[:, first - head.shape[1] : first], atol=TOLERANCE, rtol=TOLERANCE)
        tail = rows.read(texts[:, first:], wanted=wanted)
        torch.testing.assert_close(tail, expected[:, LENGTH - wanted :], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("settings", [DEEP, PAPER], ids=["deep", "paper"])
@pytest.mark.parametrize("family", VARIANTS)
def test_rows_at_different_places_go_on_together_as_if_each_were_alone(family, settings):
    model, texts = longmem(family, settings), tiny_tokens((4, LENGTH + 40))
    starts, more = (1, 14, 33, 48), 40
    parts = []
    for text, start in zip(texts, starts, strict=True):
        part = begin(model, 1)
        part.read(text[None, :start], wanted=1)
        parts.append(part)
    together = Rows.joined(parts)
    tokens = torch.stack([text[start : start + more] for text, start in zip(texts, starts, strict=True)])
    found = in_pieces(together, tokens, [1] * 20 + [3, 1, 16])
    for text, start, row in zip(texts, starts, found, strict=True):
        expected = whole(model, text[: start + more])[start:]
        torch.testing.assert_close(row, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_rows_that_are_put_in_another_order_remember_what_each_has_read():
    """As beams do: at every step each row goes on from a random row."""
    model, draw = longmem(), torch.Generator().manual_seed(1)
    texts = tiny_tokens((1, 20))
    rows = begin(model, 1)
    rows.read(texts, wanted=1)
    rows, texts = rows.chosen(torch.zeros(3, dtype=torch.int64)), texts.expand(3, -1)
    for step in range(60):
        order = torch.arange(3) if step % 4 else torch.randint(3, (3,), generator=draw)
        rows, texts = rows.chosen(order), torch.cat([texts[order], tiny_tokens((3, 1), seed=step)], dim=1)
        found = rows.read(texts[:, -1:])
    assert texts.unique(dim=0).shape[0] == 3
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(row, whole(model, text)[-1:], atol=TOLERANCE, rtol=TOLERANCE)
    assert all(len(row.sources) <= 3 for row in rows.rows), "what is held in common was not put together"


def test_without_memory_nothing_of_earlier_segments_is_seen():
    model, texts = longmem(settings={**DEEP, "backbone": {"context_tokens": 0}}), tiny_tokens((1, LENGTH))
    rows = Rows(model, [Row((), 0, model.settings.memory.tokens)], reads_memory=False)
    found = in_pieces(rows, texts, pieces(LENGTH, 1))
    assert rows.rows[0].sources == ()
    for start in range(0, LENGTH, SEGMENT):
        tokens = texts[:, start : start + SEGMENT]
        with torch.no_grad():
            expected = model.hidden(model.encode(tokens, None), None)
        torch.testing.assert_close(found[:, start : start + SEGMENT], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_banks_of_which_nothing_is_remembered_are_let_go():
    """Rows that part again and again leave a bank behind each time, and a memory that was given ends some day."""
    model, text = longmem(), tiny_tokens((1, 13 * SEGMENT + 5))
    given = model.bank(1, num_tokens=SEGMENT)
    key = torch.randn(1, model.backbone.num_kv_heads, SEGMENT, model.backbone.head_dim)
    documents = torch.zeros(1, SEGMENT, dtype=torch.int64)
    given.append([(key, key)] * len(model.geometries), start=0, documents=documents)
    known = weakref.ref(given)
    rows = Rows(model, [Row((Source(given),), SEGMENT, model.settings.memory.tokens)])
    del given
    for start in range(0, 12 * SEGMENT, SEGMENT):
        rows = rows.chosen(torch.zeros(2, dtype=torch.int64)).apart()[1]  # the other one is gone
        assert (known() is not None) == (start <= 2 * SEGMENT)
        rows.read(text[:, start : start + SEGMENT])
        assert len(rows.rows[0].sources) <= 3  # memory holds two segments; a third is appended before it is read
    found = rows.read(text[:, 12 * SEGMENT :])[0]
    torch.testing.assert_close(found, whole(model, text[0])[12 * SEGMENT :], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_larger_bank_that_cannot_be_held_is_refused(monkeypatch):
    rows = begin(longmem(), 1)
    rows.read(tiny_tokens((1, SEGMENT + 1)))
    held = rows.rows[0].sources[-1].bank
    monkeypatch.setattr(room, "room_on", lambda device: Room(free=held.num_bytes, total=10**9, words="host"))
    with pytest.raises(ConfigError, match="the memory bank does not fit into host memory"):
        rows.read(tiny_tokens((1, 2 * SEGMENT)))


def test_rows_apart_add_to_nothing_that_they_share():
    model, texts = longmem(), tiny_tokens((2, LENGTH + 40))
    texts[1, :40] = texts[0, :40]
    rows = begin(model, 1)
    rows.read(texts[:1, :40], wanted=0)
    alone = rows.chosen(torch.zeros(2, dtype=torch.int64)).apart()
    for part, text in reversed(list(zip(alone, texts, strict=True))):  # the last row writes first
        found = part.read(text[None, 40:])[0]
        torch.testing.assert_close(found, whole(model, text)[40:], atol=TOLERANCE, rtol=TOLERANCE)
