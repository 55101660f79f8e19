"""What an inspection says a token read is what the slow reference reads, with the same scores and shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.reference
from pipeline.errors import DataError, LongMemMemoryError
from pipeline.face import LongMemForCausalLM, Memory
from pipeline.face.inspecting import inspect, token_texts
from pipeline.face.inspection import Inspection
from pipeline.face.page import render
from tests.reference import Read, fuse
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import VOCABULARY, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.face.models import DEEP, SEGMENT, tiny_face

REMEMBERED, LENGTH = 45, 75  # the document ends inside a segment and inside a chunk; it is all remembered
EVERYTHING = 10_000
# float32 against float64 over four random layers that magnify rounding; a wrong rule is off by more than 0.01.
TOLERANCE = 1e-3
PAPER: Mapping[str, Any] = {
    "sidenet": {"layout": "uniform", "memory_layers": [1, 2], "fusion": "gate", "gate_init": 0.4},
    "memory": {"position": "none"},
}


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return "".join(f"<{number}>" for number in ids)


def varied(settings: Mapping[str, Any], **memory: Any) -> Mapping[str, Any]:
    return {**settings, "memory": {**settings["memory"], **memory}}


def face(settings: Mapping[str, Any], family: str = "llama") -> LongMemForCausalLM:
    return tiny_face(family, settings, trained=False)


Looked = dict[tuple[int, int, int], tuple[float, float, tuple[int, ...]]]
"""By token, memory layer and place of a chunk: share, score, heads."""


@torch.no_grad()
def slow(settings: Mapping[str, Any], family: str, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What every token of a text reads, the weights of memory `[H, n]` by layer, and losses; by the reference."""
    backbone = tiny_model(family)
    fast = TinyLongMem(backbone, lanes=1, **settings)
    layout = fast.longmem.sidenet.layout
    fast.config = fast.config.model_copy(
        update={"sidenet": fast.config.sidenet.model_copy(update={"memory_layers": layout.memory_layers})}
    )
    reference, calls = fast.reference(backbone, layout.boundaries), []

    def watched(local: Tensor, local_lse: Tensor, read: Read, gate: Tensor, fusion: str) -> Tensor:
        near = local_lse if read.window is None else torch.logaddexp(local_lse, read.window.log_sum_exp)
        far = read.log_sum_exp + gate[None, :, None]
        share = torch.exp(far - torch.logaddexp(near, far))
        if fusion == "gate":
            share = torch.sigmoid(-gate)[None, :, None] * torch.isfinite(read.log_sum_exp)
        calls.append((read, share))
        return fuse(local, local_lse, read, gate, fusion)

    monkeypatch.setattr(tests.reference, "fuse", watched)
    looked: Looked = {}
    logits, weights = [], defaultdict(list)
    left = fast.longmem.settings.context_tokens
    for start in range(0, len(text), SEGMENT):
        context = min(left, start)
        tokens = text[None, start - context : start + SEGMENT]
        logits.append(reference.logits(tokens, start=start, num_context=context)[0])
        for layer, (read, share) in zip(layout.memory_layers, calls, strict=True):
            weights[layer].append(share[0])
            _note(looked, layer, read, share[0], start)
        calls.clear()
        if start + SEGMENT <= len(text):
            reference.remember(tokens, start=start, documents=torch.zeros_like(tokens), num_context=context)
    losses = F.cross_entropy(torch.cat(logits)[:-1], text[1:], reduction="none")
    return looked, {layer: torch.cat(parts, dim=1) for layer, parts in weights.items()}, losses


def _note(looked: Looked, layer: int, read: Read, share: Tensor, start: int) -> None:
    for (_, head, token), chunks in read.chunks.items():
        for (_, place), score, weight in zip(
            chunks, read.scores[0, head, token], read.weights[0, head, token], strict=True
        ):
            key = start + token, layer, place
            before, best, heads = looked.get(key, (0.0, float("-inf"), ()))
            whole = before + weight * float(share[head, token]) / len(share)
            looked[key] = whole, max(best, score), tuple(sorted({*heads, head}))


def found_in(inspection: Inspection) -> Looked:
    found: Looked = {}
    for number, token in enumerate(inspection.tokens):
        for chunk in token.chunks:
            key = REMEMBERED + number, chunk.layer, REMEMBERED + number - chunk.distance
            assert key not in found
            found[key] = chunk.share, chunk.score, chunk.heads
    return found


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [DEEP, varied(DEEP, retrieve_for="head", position="true"), PAPER, varied(PAPER, retrieve_for="kv_head")],
    ids=["joint-kv_head", "joint-head", "gate-head", "gate-kv_head"],
)
def test_an_inspection_shows_what_the_reference_reads(settings, family, monkeypatch):
    text, model = tiny_tokens((1, LENGTH))[0], face(settings, family)
    looked, weights, losses = slow(settings, family, text, monkeypatch)
    memory = model.memorize(text[:REMEMBERED], names="doc", progress=False)
    found = inspect(model, [memory], text[REMEMBERED:], Numbers(), title="", names=["m"], chunks_per_token=EVERYTHING)
    expected = {key: value for key, value in looked.items() if key[0] >= REMEMBERED}
    shown = found_in(found)
    assert shown.keys() == expected.keys() and len(expected) > LENGTH - REMEMBERED
    for key, (share, score, heads) in expected.items():
        assert shown[key][0] == pytest.approx(share, abs=TOLERANCE), key
        assert shown[key][1] == pytest.approx(score, abs=TOLERANCE, rel=TOLERANCE), key
        assert shown[key][2] == heads, key
    for gates in found.gates:
        mean = weights[gates.layer][:, REMEMBERED:].mean(dim=1)
        assert gates.weights == pytest.approx(mean.tolist(), abs=TOLERANCE)
        assert gates.learnt == pytest.approx([settings["sidenet"]["gate_init"]] * len(mean))
    with_memory = [token.loss_with for token in found.tokens[1:]]
    assert with_memory == pytest.approx(losses[REMEMBERED:].tolist(), abs=TOLERANCE, rel=TOLERANCE)
    plain = model(text[None, REMEMBERED:], labels=text[None, REMEMBERED:], memory=False).loss
    assert found.perplexity_without == pytest.approx(plain.exp().item(), rel=TOLERANCE)


def inspected(**kwargs: Any) -> tuple[Inspection, Tensor, Memory]:
    text, model = tiny_tokens((1, LENGTH))[0], face(DEEP)
    memory = model.memorize(text[:REMEMBERED], names="doc", progress=False)
    return inspect(model, [memory], text[REMEMBERED:], Numbers(), title="t", names=["m"], **kwargs), text, memory


def test_every_chunk_has_its_text_and_its_document():
    found, text, _ = inspected()
    names = set()
    for number, token in enumerate(found.tokens):
        assert token.text == f"<{int(text[REMEMBERED + number])}>"
        for chunk in token.chunks:
            place = REMEMBERED + number - chunk.distance
            assert chunk.text == Numbers().decode(text[place : place + 4].tolist())
            assert chunk.document == ("doc" if place < REMEMBERED else "this prompt")
            names.add(chunk.document)
    assert names == {"doc", "this prompt"}
    assert [(each.name, each.tokens) for each in found.memory.documents] == [("doc", REMEMBERED)]
    assert render(found).startswith("<!DOCTYPE html>")


def test_of_several_memories_each_chunk_is_of_its_own():
    texts, model = tiny_tokens((2, 38)), face(varied(DEEP, tokens=64))
    memories = [model.memorize(text, names=f"doc {n}", progress=False) for n, text in enumerate(texts)]
    prompt = tiny_tokens((1, 20), seed=3)[0]
    found = inspect(model, memories, prompt, Numbers(), title="", names=["a", "b"])
    seen = {(chunk.document, chunk.text) for token in found.tokens for chunk in token.chunks}
    for number, text in enumerate((texts[0], torch.cat([texts[1], prompt]))):  # the last goes on into the prompt
        pieces = {Numbers().decode(text[at : at + 4].tolist()) for at in range(0, 38, 4)}
        own = {chunk for document, chunk in seen if document == f"doc {number}"}
        assert own and own <= pieces


def test_only_the_largest_shares_are_kept_and_the_others_counted():
    whole, _, _ = inspected(chunks_per_token=EVERYTHING)
    few, _, _ = inspected(chunks_per_token=3)
    for token, kept in zip(whole.tokens, few.tokens, strict=True):
        assert sorted((chunk.share for chunk in token.chunks), reverse=True)[:3] == [c.share for c in kept.chunks]
        assert kept.left_out == len(token.chunks) - len(kept.chunks)


def test_layers_can_be_chosen():
    whole, _, _ = inspected(chunks_per_token=EVERYTHING)
    one, _, _ = inspected(chunks_per_token=EVERYTHING, layers=[2])
    assert [gates.layer for gates in one.gates] == [2] and len(whole.gates) > 1
    for token, chosen in zip(whole.tokens, one.tokens, strict=True):
        assert sorted(chunk.share for chunk in token.chunks if chunk.layer == 2) == sorted(
            chunk.share for chunk in chosen.chunks
        )


def test_watching_changes_nothing_and_ends():
    text, model = tiny_tokens((1, LENGTH))[0], face(DEEP)
    before = model(text[None], use_cache=False).logits
    inspect(model, [], text, Numbers(), title="")
    assert all(fusion.observe is None for fusion in model.longmem.sidenet.fusions.values())
    assert torch.equal(model(text[None], use_cache=False).logits, before)


def test_a_prompt_of_one_token_predicts_nothing():
    found = inspect(face(DEEP), [], tiny_tokens((1, 1))[0], Numbers(), title="")
    assert (found.tokens[0].loss_with, found.perplexity_with, found.perplexity_without) == (None, None, None)
    assert render(found)


def test_bad_input_is_told_in_words():
    text, model = tiny_tokens((1, LENGTH))[0], face(DEEP)
    with pytest.raises(DataError, match=r"reads no memory in a layer; got: 7; expected: of 1, 2"):
        inspect(model, [], text, Numbers(), title="", layers=[1, 7])
    with pytest.raises(DataError, match="the prompt is empty"):
        inspect(model, [], text[:0], Numbers(), title="")
    with pytest.raises(DataError, match=f"outside the vocabulary; got: {VOCABULARY}"):
        inspect(model, [], torch.tensor([VOCABULARY]), Numbers(), title="")
    with pytest.raises(DataError, match="the model reads no memory"):
        inspect(face(varied(DEEP, enabled=False)), [], text, Numbers(), title="")
    foreign = face(DEEP, "mistral").memorize(text, progress=False)
    with pytest.raises(LongMemMemoryError, match="the memory has another backbone"):
        inspect(model, [foreign], text, Numbers(), title="")


@pytest.mark.parametrize("text", ["Wörter – und\n\n  mehr", "日本語のテキスト 🙂!", "plain"])
def test_the_texts_of_tokens_are_the_whole_text(text, tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path)
    ids = tokenizer(text)["input_ids"]
    shown = token_texts(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown).replace("\ufffd", "") == text
