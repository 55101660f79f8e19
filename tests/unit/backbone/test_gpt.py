"""`longmem_gpt` as a model of transformers; the tests of all families and tests/official hold its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.backbone.gpt import LongMemGPTConfig
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import drawn, tiny_model

LENGTH = 12


def test_read_in_pieces_it_says_the_same() -> None:
    model, tokens = tiny_model("longmem_gpt"), tiny_tokens((2, LENGTH))
    with torch.no_grad():
        whole = model(tokens)
        assert whole.past_key_values.get_seq_length() == LENGTH
        found: list[torch.Tensor] = []
        cache = None
        for first, last in ((0, 5), (5, 6), (6, LENGTH)):
            part = model(tokens[:, first:last], past_key_values=cache, use_cache=True)
            found, cache = [*found, part.logits], part.past_key_values
    torch.testing.assert_close(torch.cat(found, dim=1), whole.logits, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    model, tokens = tiny_model("longmem_gpt"), tiny_tokens((1, LENGTH))
    padded = torch.cat([torch.ones(1, 3, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(LENGTH + 3) >= 3)[None].long()
    with torch.no_grad():
        expected = model(tokens).logits
        found = model(padded, attention_mask=mask).logits[:, 3:]
        begun = model(padded[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
        rest = model(padded[:, -2:], attention_mask=mask, past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest, expected[:, -2:], rtol=1e-4, atol=1e-5)


def test_it_generates_what_it_says_token_by_token() -> None:
    model, tokens = tiny_model("longmem_gpt"), tiny_tokens((2, LENGTH))
    expected = tokens
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    found = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)
    # Rows of different lengths, padded on the left.
    padded = torch.cat([torch.ones(1, 2, dtype=torch.int64), tokens[:1, 2:]], dim=1)
    mask = (torch.arange(LENGTH) >= 2)[None].long()
    alone = model.generate(tokens[:1, 2:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    both = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(both[:, 2:], alone)


def test_both_kinds_of_attention_are_alike() -> None:
    model, tokens = tiny_model("longmem_gpt"), tiny_tokens((2, LENGTH))
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation("eager")
        found = model(tokens, output_attentions=True)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert [weights.shape for weights in found.attentions] == [(2, 4, LENGTH, LENGTH)] * 4
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 5


def test_loss_and_kept_logits() -> None:
    model, tokens = tiny_model("longmem_gpt"), tiny_tokens((2, LENGTH))
    with torch.no_grad():
        whole = model(tokens, labels=tokens)
        last = model(tokens, logits_to_keep=2)
        as_tuple = model(tokens, return_dict=False)
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens))
    log_probabilities = whole.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    assert float(whole.loss) == pytest.approx(-float(log_probabilities.mean()), rel=1e-5)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    torch.testing.assert_close(as_tuple[0], whole.logits)
    torch.testing.assert_close(embedded.logits, whole.logits)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of them"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("longmem_gpt")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LongMemGPTConfig
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tiny_tokens((1, 5))).logits, model(tiny_tokens((1, 5))).logits)
    assert again.lm_head.weight is not again.get_input_embeddings().weight


def test_by_default_it_is_of_the_published_size() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LongMemGPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 407_072_768
    with pytest.raises(ValueError, match="num_attention_heads 3 does not divide hidden_size 1024"):
        LongMemGPTConfig(num_attention_heads=3)


def test_half_precision_attends_in_float32() -> None:
    model = drawn(LongMemGPTConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    tokens = tiny_tokens((1, 64))
    with torch.no_grad():
        exact, found = model(tokens).logits, model.to(torch.bfloat16)(tokens).logits
    assert found.dtype == torch.bfloat16
    assert float((found.float() - exact).abs().mean() / exact.abs().mean()) < 0.05
