"""Every family as a model of transformers: untrained it is its backbone; caches, padding and memory change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.face import LongMemForCausalLM
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import FAMILIES, save_tiny_model, tiny_model
from tests.unit.face.models import (
    DEEP,
    PAPER,
    QUIET,
    SEGMENT,
    TOLERANCE,
    are_likeliest,
    expected_logits,
    padded,
    tiny_face,
)

LENGTHS = (3, 7, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_and_without_memory_it_says_what_its_backbone_says(family):
    backbone = tiny_model(family)
    ids, mask = padded([tiny_tokens((1, length), seed=length)[0] for length in LENGTHS])
    given = {"inputs": ids, "attention_mask": mask, "max_new_tokens": SEGMENT - ids.shape[1], **QUIET}
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0},
    )
    expected = [backbone.generate(**given, **way) for way in ways]
    without_sink = {**DEEP, "memory": {**DEEP["memory"], "sink": False}}  # which is read without memory too
    for settings, memory in ((PAPER, None), (without_sink, False)):
        model = tiny_face(family, settings, backbone=tiny_model(family), trained=False)
        for way, tokens in zip(ways, expected, strict=True):
            assert torch.equal(model.generate(**given, **way, memory=memory), tokens), (settings, way)


@pytest.mark.parametrize("family", FAMILIES)
def test_across_segment_ends_each_token_is_that_of_the_whole_text(family):
    model, texts = tiny_face(family), [tiny_tokens((1, length), seed=length)[0] for length in (9, 30)]
    ids, mask = padded(texts)
    given = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 14, **QUIET}
    found = model.generate(**given)
    assert all(are_likeliest(model.longmem, text, row[30:]) for text, row in zip(texts, found, strict=True))
    assert torch.equal(model.generate(**given, use_cache=False), found)
    assert len(found[:, 30:].unique()) > 3, "a backbone that repeats itself proves little"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_memorized_is_as_if_it_had_just_been_read(family):
    model, text = tiny_face(family), tiny_tokens((1, 60))[0]
    expected = expected_logits(model.longmem, text[None])
    for count in (32, 45):  # fills segments; leaves a tail, and that no chunk
        memory = model.memorize(text[:count], progress=False)
        found = model(text[None, count:], memory=memory).logits
        torch.testing.assert_close(found, expected[:, count:], atol=TOLERANCE, rtol=TOLERANCE)
    tokens = model.generate(text[None, count:], memory=memory, max_new_tokens=6, **QUIET)  # on into the next segment
    assert are_likeliest(model.longmem, text, tokens[0, 60 - count :])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family, tmp_path):
    backbone, ids = save_tiny_model(family, tmp_path / "backbone"), tiny_tokens((2, 40))
    model = tiny_face(family, backbone=backbone, name=str(tmp_path / "backbone"))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "beside")
    model.save_pretrained(tmp_path / "with", save_backbone=True)
    for name in ("beside", "with"):
        loaded = LongMemForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(ids).logits, expected)
        assert loaded.memory_kind == model.memory_kind


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_sidenet_learns(family):
    model, ids = tiny_face(family).train(), tiny_tokens((2, 40))
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    silent = [name for name, each in model.sidenet.named_parameters() if each.grad is None or not each.grad.any()]
    assert not silent
    torch.testing.assert_close(out.logits, expected_logits(model.longmem, ids), atol=TOLERANCE, rtol=TOLERANCE)
