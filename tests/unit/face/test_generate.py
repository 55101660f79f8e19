"""Ways of generating: beams, sampling, pieces of a prompt, streams; none changes what is read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pipeline.face import LongMemCache, LongMemForCausalLM
from pipeline.model.longmem import LongMem
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import GATED, drawn
from tests.unit.face.models import (
    DEEP,
    MEMORY,
    QUIET,
    SEGMENT,
    TOLERANCE,
    expected_logits,
    expected_tokens,
    padded,
    tiny_face,
)


@pytest.fixture(scope="module")
def model() -> LongMemForCausalLM:
    return tiny_face()


def texts_of(*lengths: int) -> list[Tensor]:
    return [tiny_tokens((1, length), seed=length)[0] for length in lengths]


def best(model: LongMem, text: Tensor, *, count: int, words: int) -> tuple[Tensor, Tensor]:
    """All continuations of a text `[n]` by so many tokens, the likeliest first, and their log probabilities."""
    every = torch.tensor(list(itertools.product(range(words), repeat=count)))
    whole = torch.cat([text.expand(len(every), -1), every], dim=1)
    logs = expected_logits(model, whole)[:, -count - 1 : -1].log_softmax(-1)
    scores = logs.gather(-1, every[..., None])[..., 0].sum(1)
    order = scores.argsort(descending=True)
    return every[order], scores[order]


@pytest.mark.parametrize("memorized", [0, 41])
def test_as_many_beams_as_there_are_ways_find_the_best_of_all(memorized):
    words, count = 5, 3
    backbone = drawn(LlamaConfig(**{**GATED, "vocab_size": words}, num_hidden_layers=3))
    model = tiny_face(backbone=backbone)
    text = torch.randint(words, (memorized + SEGMENT - 2,), generator=torch.Generator().manual_seed(3))
    memory = model.memorize(text[:memorized], progress=False) if memorized else None
    found = model.generate(
        text[None, memorized:],
        memory=memory,
        num_beams=words ** (count - 1),
        num_return_sequences=8,
        max_new_tokens=count,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **QUIET,
    )
    tokens, scores = best(model.longmem, text, count=count, words=words)
    assert found.sequences[:, -count:].tolist() == tokens[:8].tolist()
    torch.testing.assert_close(found.sequences_scores, scores[:8], atol=TOLERANCE, rtol=TOLERANCE)


def test_beams_that_go_on_from_others_remember_what_those_read(model):
    """transformers' own search, that reads every text again from its begin, against the same with a cache."""
    ids, mask = padded(texts_of(12, 27))
    given = {"inputs": ids, "attention_mask": mask, "num_beams": 3, "max_new_tokens": 24, **QUIET}
    found = model.generate(**given, num_return_sequences=2)
    assert torch.equal(found, model.generate(**given, num_return_sequences=2, use_cache=False))
    assert len(found.unique(dim=0)) == 4


def test_padding_and_other_rows_change_nothing(model):
    """Neither how far a row is padded, nor what padding says, nor who stands beside it."""
    texts, count = texts_of(3, 20, 38), 14
    expected = [expected_tokens(model.longmem, text, count) for text in texts]
    for order in ((0, 1, 2), (2, 0), (1,)):
        ids, mask = padded([texts[number] for number in order])
        ids = torch.where(mask.bool(), ids, 17)
        further = torch.cat([torch.full((len(order), 5), 3), ids], dim=1)
        for tokens, there in ((ids, mask), (further, torch.cat([torch.zeros_like(mask[:, :5]), mask], dim=1))):
            found = model.generate(tokens, attention_mask=there, max_new_tokens=count, **QUIET)
            assert found[:, -count:].tolist() == [expected[number] for number in order]


@pytest.mark.parametrize("size", [1, 5, SEGMENT, 21, 100])
def test_prompts_may_be_read_in_pieces(model, size):
    ids, mask = padded(texts_of(9, 40))
    for given in ({"inputs": ids[1:]}, {"inputs": ids, "attention_mask": mask}):
        expected = model.generate(**given, max_new_tokens=4, **QUIET)
        assert torch.equal(model.generate(**given, max_new_tokens=4, prefill_chunk_size=size, **QUIET), expected), (
            given.keys()
        )


def test_what_is_generated_goes_on_from_the_cache_that_was_returned(model):
    text = texts_of(30)[0]
    expected = model.generate(text[None], max_new_tokens=20, **QUIET)
    first = model.generate(text[None], max_new_tokens=9, return_dict_in_generate=True, **QUIET)
    cache = first.past_key_values
    assert isinstance(cache, LongMemCache) and cache.get_seq_length() == 38  # all but the token that was just chosen
    found = model.generate(first.sequences, past_key_values=cache, max_new_tokens=11, **QUIET)
    assert torch.equal(found, expected)


def test_samples_follow_the_seed(model):
    text = texts_of(13)[0][None]
    given = {**QUIET, "do_sample": True, "max_new_tokens": 12, "top_k": 0}

    def draw(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(text, **given, **kwargs)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    several = draw(3, num_return_sequences=4)
    assert len(several.unique(dim=0)) == 4
    torch.manual_seed(3)
    assert torch.equal(several, model.generate(text.expand(4, -1), **given))


def test_it_stops_where_it_is_told_to(model):
    text = texts_of(13)[0]
    tokens = expected_tokens(model.longmem, text, 12)
    stop = tokens[6]
    until = tokens.index(stop) + 1
    ending = {**QUIET, "eos_token_id": stop, "pad_token_id": 0}
    found = model.generate(text[None], max_new_tokens=12, attention_mask=torch.ones(1, 13), **ending)
    assert found[0, 13:].tolist() == tokens[:until]
    criteria = StoppingCriteriaList([MaxLengthCriteria(13 + 5)])
    assert model.generate(text[None], stopping_criteria=criteria, max_new_tokens=12, **QUIET).shape == (1, 18)
    # A row that has ended waits for the others, which go on as if it were not there.
    ids, mask = padded([text, texts_of(20)[0]])
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=12, **ending)[:, 20:]
    assert rows[0].tolist() == tokens[:until] + [0] * (rows.shape[1] - until)
    other = expected_tokens(model.longmem, texts_of(20)[0], 12)
    assert stop not in other and rows[1].tolist() == other


class Listening(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_each_token_once(model):
    text, listener = texts_of(30)[0], Listening()
    found = model.generate(text[None], streamer=listener, max_new_tokens=9, prefill_chunk_size=7, **QUIET)
    assert listener.heard == [text.tolist()] + [[token] for token in found[0, 30:].tolist()]
    assert listener.ended == 1


def held_bytes(thing: Any, seen: set[int]) -> int:
    """Bytes of all tensors and arrays below a thing, and 8 for each number in a list; the model's own are left out."""
    if id(thing) in seen or isinstance(thing, (LongMem, nn.Module, type, Callable)):  # type: ignore[arg-type]
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(held_bytes(part, seen) for pair in thing.items() for part in pair)
    if isinstance(thing, (list, tuple)):
        return sum(8 if isinstance(part, int) else held_bytes(part, seen) for part in thing)
    if is_dataclass(thing):
        return sum(held_bytes(getattr(thing, field.name), seen) for field in fields(thing))
    return held_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


@pytest.mark.parametrize(("step", "length"), [(1, 6 * MEMORY), (24, 24 * MEMORY)])
def test_a_stream_has_no_end(model, step, length):
    """After many times the memory's length, one token at a time or many, it holds what it held when memory was full."""
    cache, held, tokens = LongMemCache(), [], tiny_tokens((2, length))
    for start in range(0, tokens.shape[1], step):
        model(tokens[:, start : start + step], past_key_values=cache, logits_to_keep=1)
        if (start + step) % (3 * SEGMENT) == 0:
            held.append(held_bytes(cache, set()))
    assert cache.get_seq_length() == length
    assert min(held) == held[1] == held[-1] > 2 * 2 * MEMORY, held


@pytest.mark.parametrize("name", ["reset", "select", "repeat"])
def test_rows_of_a_cache_are_chosen(model, name):
    texts, more = torch.stack(texts_of(20) * 3), tiny_tokens((3, 5), seed=9)
    texts[1:] = tiny_tokens((2, 20), seed=5)
    cache = model(texts, use_cache=True).past_key_values
    if name == "reset":
        cache.reset()
        assert cache.get_seq_length() == 0
        found, expected = model(more, past_key_values=cache).logits, expected_logits(model.longmem, more)
    elif name == "select":
        cache.batch_select_indices(torch.tensor([2, 0]))
        found = model(more[:2], past_key_values=cache).logits
        expected = expected_logits(model.longmem, torch.cat([texts[[2, 0]], more[:2]], dim=1))[:, 20:]
    else:
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
        found = model(more, past_key_values=cache).logits
        expected = expected_logits(model.longmem, torch.cat([texts[[1, 1, 1]], more], dim=1))[:, 20:]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_without_memory_a_segment_knows_nothing_of_those_before():
    settings = {**DEEP, "backbone": {"context_tokens": 0}}
    model, text = tiny_face(settings=settings), texts_of(40)[0][None]
    found = model(text, memory=False).logits
    for start in range(0, 40, SEGMENT):
        piece = text[:, start : start + SEGMENT]
        alone = model(piece, memory=False).logits
        torch.testing.assert_close(found[:, start : start + SEGMENT], alone, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(found[:, SEGMENT:], model(text).logits[:, SEGMENT:], atol=0.1)


def test_rows_that_say_the_same_at_other_places_are_not_taken_for_one(model):
    """Of a text that is one token again and again, what was read last is alike wherever a row stands."""
    begun = model(torch.full((2, 36), 5), use_cache=True).past_key_values
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1] * 7])
    parted = model(torch.full((2, 7), 5), attention_mask=mask, past_key_values=begun).past_key_values
    found = model(torch.full((2, 2), 5), past_key_values=parted).logits
    for row, length in zip(found, (41, 45), strict=True):
        expected = expected_logits(model.longmem, torch.full((1, length), 5))[0, -2:]
        torch.testing.assert_close(row, expected, atol=2 * TOLERANCE, rtol=TOLERANCE)  # chunks score alike: ties


def test_what_was_begun_in_inference_mode_goes_on_outside_of_it(model):
    text = tiny_tokens((1, 60))
    with torch.inference_mode():
        begun = model(text[:, :40], use_cache=True).past_key_values
    found = model(text[:, 40:], past_key_values=begun).logits
    torch.testing.assert_close(found, expected_logits(model.longmem, text)[:, 40:], atol=TOLERANCE, rtol=TOLERANCE)
