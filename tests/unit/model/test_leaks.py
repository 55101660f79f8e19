"""Invariants 2 and 3: nothing leaks, reading writes nothing. Each absence has its positive control.

The cases run through every family that differs in masks or positions; the memory itself does not know families.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_longmem import TinyLongMem, bank_bytes, tiny_tokens
from tests.tiny_models import VARIANTS, VOCABULARY, tiny_model

SEGMENT, SCOPES = 12, ["document", "lane", "group"]
# A product of matrices may round otherwise when other rows change. A leak is larger than 1e-3.
SAME_TOLERANCE = 1e-5
CHANGED = 1e-3


def make(family: str = "llama", *, scope: str = "lane", position: str = "clamp:14", **sidenet: object) -> TinyLongMem:
    """Two side layers, both read; 16 tokens remembered, all of them read."""
    return TinyLongMem(
        tiny_model(family),
        memory={"tokens": 16, "top_k_tokens": 16, "scope": scope, "position": position},
        sidenet={"num_layers": 2, "memory_layers": "all", "fusion": "joint", **sidenet},
        train={"segment_tokens": SEGMENT},
    )


def run(fast: TinyLongMem, tokens: Tensor, documents: Tensor | None = None, *, memory: bool = True) -> Tensor:
    """Logits of the last of several segments, the others being remembered."""
    documents = torch.zeros_like(tokens) if documents is None else documents
    fast.bank.reset()
    last = tokens.shape[1] - SEGMENT
    for start in range(0, tokens.shape[1], SEGMENT):
        part = slice(start, start + SEGMENT)
        fast.remember(tokens[:, part], start=start, documents=documents[:, part])
    return fast.logits(tokens[:, last:], start=last, documents=documents[:, last:], memory=memory)


def changed(tokens: Tensor, lane: int, first: int, last: int) -> Tensor:
    """The same tokens but for a stretch of one lane."""
    other = tokens.clone()
    other[lane, first:last] = (other[lane, first:last] + 1) % VOCABULARY
    return other


def same(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= SAME_TOLERANCE)


def differs(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() >= CHANGED)


@pytest.mark.parametrize("family", VARIANTS)
def test_later_tokens_change_nothing(family: str) -> None:
    fast, tokens = make(family), tiny_tokens((2, 3 * SEGMENT))
    other = changed(tokens, 0, 2 * SEGMENT + 7, 3 * SEGMENT)  # in the segment itself, which is in the bank by then
    one, two = run(fast, tokens), run(fast, other)
    assert same(one[:, :7], two[:, :7])
    assert differs(one[0, 7:], two[0, 7:])


@pytest.mark.parametrize("scope", SCOPES)
def test_segments_appended_later_change_nothing(scope: str) -> None:
    """What lies at or after the segment is invisible even if the bank holds it (segments of one optimizer step)."""
    fast, tokens = make(scope=scope), tiny_tokens((2, 3 * SEGMENT))
    documents, middle = torch.zeros_like(tokens), slice(SEGMENT, 2 * SEGMENT)
    found = []
    for stored in (2, 3):
        fast.bank = fast.longmem.bank(2, num_tokens=4 * SEGMENT)
        for start in range(0, stored * SEGMENT, SEGMENT):
            fast.remember(tokens[:, start : start + SEGMENT], start=start)
        found.append(fast.logits(tokens[:, middle], start=SEGMENT, documents=documents[:, middle]))
    assert torch.equal(*found)


@pytest.mark.parametrize("scope", SCOPES)
def test_other_lanes_speak_under_scope_group_only(scope: str) -> None:
    fast, tokens = make(scope=scope), tiny_tokens((2, 3 * SEGMENT))
    one, two = run(fast, tokens), run(fast, changed(tokens, 1, SEGMENT, 2 * SEGMENT))
    assert differs(one[1], two[1])  # its own past
    assert differs(one[0], two[0]) if scope == "group" else same(one[0], two[0])


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_earlier_documents_are_forgotten_under_scope_document_only(family: str, scope: str) -> None:
    """A document begins at token 5 of the middle segment, in the middle of a chunk, and goes on in the last."""
    fast, tokens = make(family, scope=scope), tiny_tokens((2, 3 * SEGMENT))
    documents = (torch.arange(3 * SEGMENT) >= SEGMENT + 5).long().expand(2, -1)
    one, two = (run(fast, t, documents) for t in (tokens, changed(tokens, 0, 0, SEGMENT + 5)))
    assert same(one[0], two[0]) if scope == "document" else differs(one[0], two[0])
    own = run(fast, changed(tokens, 0, SEGMENT + 8, 2 * SEGMENT), documents)  # a whole chunk of its own past
    assert differs(one[0], own[0])


def test_a_document_within_a_segment_does_not_see_the_one_before_it() -> None:
    fast, tokens = make(scope="document"), tiny_tokens((2, 2 * SEGMENT))
    documents = (torch.arange(2 * SEGMENT) >= SEGMENT + 6).long().expand(2, -1)
    one, two = run(fast, tokens, documents), run(fast, changed(tokens, 0, 0, SEGMENT + 6), documents)
    assert same(one[0, 6:], two[0, 6:])
    assert differs(one[0, :6], two[0, :6])


@pytest.mark.parametrize("position", ["none", "true", "clamp:14"])
def test_evicted_tokens_are_gone(position: str) -> None:
    """The segment begins at 36 and 16 tokens are remembered: 20 is the first that counts."""
    fast, tokens = make(position=position), tiny_tokens((2, 4 * SEGMENT))
    one = run(fast, tokens)
    # The first memory layer reads keys of backbone layer 2: within the segment that holds tokens 12 to 23, what is
    # remembered of the later ones depends on the earlier ones. So only whole earlier segments are changed.
    assert same(one, run(fast, changed(tokens, 0, 0, SEGMENT)))
    assert differs(one[0], run(fast, changed(tokens, 0, 20, 24))[0])


@pytest.mark.parametrize("family", VARIANTS)
def test_without_memory_the_past_is_not_there(family: str) -> None:
    fast, tokens = make(family), tiny_tokens((2, 2 * SEGMENT))
    other = changed(tokens, 0, 0, SEGMENT)
    assert torch.equal(run(fast, tokens, memory=False), run(fast, other, memory=False))
    assert differs(run(fast, tokens)[0], run(fast, other)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fusion", ["gate", "joint"])
def test_reading_writes_nothing(checkpointing: bool, fusion: str) -> None:
    fast = make(activation_checkpointing=checkpointing, fusion=fusion)
    tokens = tiny_tokens((2, 2 * SEGMENT))
    run(fast, tokens)
    before = bank_bytes(fast.bank)
    segment, gradients = tokens[:, SEGMENT:], []
    for _ in range(2):
        fast.longmem.sidenet.zero_grad()
        fast.loss(segment, segment.roll(-1, 1), start=SEGMENT).backward()
        gradients.append([p.grad.clone() for p in fast.longmem.sidenet.parameters() if p.grad is not None])
        fast.logits(tiny_tokens((2, SEGMENT), seed=9), start=SEGMENT)  # another suffix on the same context
        assert bank_bytes(fast.bank) == before
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_the_backbone_never_changes_so_memory_never_goes_stale() -> None:
    """Invariant 3: what is written before training equals what is written after it; the SideNet did move."""
    fast = make()
    tokens = tiny_tokens((2, 2 * SEGMENT))
    first = run(fast, tokens)
    before = bank_bytes(fast.bank)
    optimizer = torch.optim.SGD([p for p in fast.longmem.sidenet.parameters() if p.requires_grad], lr=0.01)
    segment = tokens[:, SEGMENT:]
    fast.loss(segment, segment.roll(-1, 1), start=SEGMENT).backward()
    optimizer.step()
    assert differs(first, run(fast, tokens))
    assert bank_bytes(fast.bank) == before
