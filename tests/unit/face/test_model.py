"""Learning and remembering through the face: losses, gradients, memories of each row, saved, joined, stored smaller."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.face import LongMemCache, LongMemForCausalLM, Memory
from tests.tiny_longmem import tiny_tokens
from tests.unit.face.models import (
    DEEP,
    MEMORY,
    PAPER,
    QUIET,
    SEGMENT,
    TOLERANCE,
    are_likeliest,
    expected_logits,
    tiny_face,
)

CLOSE: dict[str, Any] = {"atol": TOLERANCE, "rtol": TOLERANCE}


@pytest.fixture(scope="module")
def model() -> LongMemForCausalLM:
    return tiny_face()


def text_of(length: int, seed: int = 0) -> Tensor:
    return tiny_tokens((1, length), seed=seed)[0]


@torch.no_grad()
def logits(model: LongMemForCausalLM, ids: Tensor, **given: object) -> Tensor:
    return model(ids, **given).logits


def cross_entropy(found: Tensor, labels: Tensor) -> Tensor:
    """Mean over what is predicted, by hand."""
    losses = []
    for row, asked in zip(found, labels, strict=True):
        for place in range(len(asked) - 1):
            if asked[place + 1] != -100:
                losses.append(-row[place].log_softmax(-1)[asked[place + 1]])
    return torch.stack(losses).mean()


def test_a_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    ids = tiny_tokens((2, 40))
    labels = ids.clone()
    labels[0, :17] = labels[1, 30:] = -100
    found = model(ids, labels=labels)
    torch.testing.assert_close(found.loss, cross_entropy(found.logits, labels), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=labels).loss, found.loss.detach(), **CLOSE)
        torch.testing.assert_close(model(ids, labels=labels, use_cache=True).loss, found.loss.detach(), **CLOSE)
    count = int((labels[:, 1:] != -100).sum())
    parts = model(ids, labels=labels, num_items_in_batch=2 * count).loss  # as gradient accumulation asks
    torch.testing.assert_close(2 * parts, found.loss, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_is_learnt(side):
    ids, lengths = tiny_tokens((3, 40)), (40, 23, 9)
    found = []
    for is_padded in (False, True):
        model = tiny_face()
        if is_padded:
            there = torch.stack([torch.arange(40) < length for length in lengths])
            batch = torch.where(there, ids, 5)
            if side == "left":
                there = there.flip(1)
                batch = torch.stack([row.roll(40 - length) for row, length in zip(batch, lengths, strict=True)])
            labels = torch.where(there, batch, -100)
            loss = model(batch, attention_mask=there.long(), labels=labels).loss
        else:
            parts = [
                model(row[None, :length], labels=row[None, :length]).loss
                for row, length in zip(ids, lengths, strict=True)
            ]
            # The padded side: its first token is predicted from padding, whose input of the head is 0.
            loss = sum(part * (length - 1) for part, length in zip(parts, lengths, strict=True)) / (sum(lengths) - 3)
        loss.backward()
        found.append((loss.detach(), {name: each.grad for name, each in model.sidenet.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_a_step_of_training_changes_the_sidenet_alone():
    model, ids = tiny_face().train(), tiny_tokens((2, 40))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    assert {name.split(".")[0] for name in before} == {"backbone", "sidenet"}


def test_memories_go_to_their_rows_and_to_no_other(model):
    ids, texts = tiny_tokens((3, 20)), [text_of(70, seed=8), text_of(45, seed=9)]
    one, two = (model.memorize(text, progress=False) for text in texts)
    alone = [logits(model, ids[:1], memory=one), logits(model, ids[1:2], memory=two), logits(model, ids[2:])]
    together = logits(model, ids, memory=[[one], [two], []])
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
    assert (logits(model, ids) - together)[:2].abs().amax() > 1, "nothing was read"
    shared = logits(model, ids, memory=one)
    torch.testing.assert_close(shared[:1], alone[0], **CLOSE)
    assert torch.equal(shared, logits(model, ids, memory=[one]))
    tokens = model.generate(ids, memory=[[one], [two], []], max_new_tokens=14, **QUIET)[:, 20:]
    for row, text in enumerate((*texts, ids[0, :0])):
        assert are_likeliest(model.longmem, torch.cat([text, ids[row]]), tokens[row])
    beams = model.generate(ids, memory=[[one], [two], []], max_new_tokens=6, num_beams=2, **QUIET)
    for row, memory in enumerate(([one], [two], None)):
        found = model.generate(ids[row : row + 1], memory=memory, max_new_tokens=6, num_beams=2, **QUIET)
        assert torch.equal(beams[row : row + 1], found)


@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 17, 31, 32, 33, 47, 48, 50, 63, 64, 100])
@pytest.mark.parametrize("settings", [DEEP, PAPER], ids=["deep", "paper"])
def test_any_length_is_memorized_as_if_it_had_just_been_read(settings, count):
    model, text = tiny_face(settings=settings), text_of(count + 20, seed=count)
    memory = model.memorize(text[:count], progress=False)
    expected = expected_logits(model.longmem, text[None])[:, count:]
    torch.testing.assert_close(logits(model, text[None, count:], memory=memory), expected, **CLOSE)
    assert len(memory) <= min(count, MEMORY + SEGMENT)
    if count >= MEMORY + SEGMENT:  # what is more is a stream whose cache holds no more
        assert memory.num_bytes <= model.memorize(text_of(MEMORY + 2 * SEGMENT - 1), progress=False).num_bytes


def test_a_saved_memory_reads_the_same(model, tmp_path):
    ids, text = tiny_tokens((1, 20)), text_of(45, seed=3)
    memory = model.memorize(text, progress=False, names="a book")
    expected = logits(model, ids, memory=memory)
    memory.save(tmp_path / "book.safetensors")
    for _ in range(2):
        loaded = Memory.load(tmp_path / "book.safetensors", kind=model.memory_kind)
        assert torch.equal(logits(model, ids, memory=loaded), expected)
        assert [document.name for document in loaded.documents()] == ["a book"]


def test_memories_stored_smaller_read_nearly_the_same(model, tmp_path):
    ids, text = tiny_tokens((1, 20)), text_of(40, seed=3)
    exact = logits(model, ids, memory=model.memorize(text, progress=False))
    spread = (exact - logits(model, ids)).abs().mean()
    for dtype in ("bf16", "fp16", "int8"):
        memory = model.memorize(text, progress=False, dtype=dtype)
        assert memory.dtype == dtype
        found = logits(model, ids, memory=memory)
        assert 0 < (found - exact).abs().mean() < spread / 10, dtype  # of what memory makes of them
        memory.save(tmp_path / dtype)
        assert torch.equal(logits(model, ids, memory=Memory.load(tmp_path / dtype)), found)


def test_several_memories_are_read_together():
    """Two documents in two memories, or in one: the second is gone on from."""
    model = tiny_face(settings={**DEEP, "memory": {**DEEP["memory"], "tokens": 128}})
    first, second, ids = text_of(32, seed=1), text_of(20, seed=2), tiny_tokens((1, 20))
    memories = [model.memorize(text, progress=False, names=name) for text, name in ((first, "a"), (second, "b"))]
    merged = model.memorize([first, second], progress=False, names=["a", "b"])
    found = logits(model, ids, memory=memories)
    assert [document.name for document in merged.documents()] == ["a", "b"]
    torch.testing.assert_close(logits(model, ids, memory=merged), found, **CLOSE)
    for other in (None, memories[0], memories[1], memories[::-1]):
        assert (found - logits(model, ids, memory=other)).abs().max() > 0.1


def test_reading_changes_no_memory(model):
    memory = model.memorize(text_of(45), progress=False)
    before = [tensor.clone() for tensor in (*memory.keys, *memory.values, memory.tokens, memory.positions)]
    model.generate(tiny_tokens((2, 20)), memory=memory, max_new_tokens=30, num_beams=2, **QUIET)
    after = (*memory.keys, *memory.values, memory.tokens, memory.positions)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_transformers_asks_of_a_model(model):
    assert "memory" in inspect.signature(model.forward).parameters, "or generate would refuse it"
    assert model.can_generate() and model.main_input_name == "input_ids"
    memory = model.memorize(text_of(45), progress=False)
    cache = model(tiny_tokens((2, 20)), memory=memory, use_cache=True).past_key_values
    assert isinstance(cache, LongMemCache)
    assert cache.get_seq_length() == 20, "this stream only, never what was remembered before it"
    assert model(tiny_tokens((2, 20)), use_cache=False).past_key_values is None
    ids = tiny_tokens((2, 20))
    whole = logits(model, ids)
    assert torch.equal(logits(model, ids, logits_to_keep=3), whole[:, -3:])
    assert torch.equal(logits(model, ids, logits_to_keep=torch.tensor([0, 7])), whole[:, [0, 7]])
    assert torch.equal(model(ids, return_dict=True)["logits"], whole)
    loss, *others = model(ids, labels=ids, return_dict=False)
    assert loss.shape == () and torch.equal(others[0], whole)
    assert torch.equal(model.get_input_embeddings().weight, model.backbone.get_input_embeddings().weight)
