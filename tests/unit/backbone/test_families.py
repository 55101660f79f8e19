"""What the family table says of each family, against Hugging Face's own arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from pipeline.backbone import backbone as backbone_module
from pipeline.backbone.backbone import Backbone
from pipeline.backbone.families import FAMILIES as TABLE
from pipeline.backbone.families import Family, family_of, sliding_window
from pipeline.errors import BackboneError
from pipeline.positions import alibi_slopes
from tests.reference_lm import Reference
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import FAMILIES, GATED, VARIANTS, WINDOW, drawn, tiny_model

FP32_TOLERANCE = 1e-4  # keys of size 4 after three random layers; a wrong split is off by more than 1
WEIGHT_TOLERANCE = 1e-5  # attention weights, at most 1; a wrong rule is off by more than 0.001

LAYERS = (1, 2, 3, 4)


def test_every_family_of_the_table_is_tested() -> None:
    assert set(TABLE) == set(FAMILIES) == {name.partition("-")[0] for name in VARIANTS}


@pytest.mark.parametrize("family", VARIANTS)
def test_memory_keys_and_values_are_those_of_the_models_own_cache(family: str) -> None:
    """The cache holds keys as attention used them: rotated by Hugging Face, where they are rotated at all."""
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    backbone = Backbone(model, memory_layers=LAYERS)
    for layer, memory in zip(LAYERS, backbone(tokens).memory, strict=True):
        key = backbone.positions(layer).rotate(memory.key, torch.arange(16))
        # A sliding-window layer caches the last tokens of its window only.
        cached = cache.layers[layer - 1].keys, cache.layers[layer - 1].values
        torch.testing.assert_close(key[:, :, -cached[0].shape[2] :], cached[0], atol=FP32_TOLERANCE, rtol=0)
        torch.testing.assert_close(memory.value[:, :, -cached[1].shape[2] :], cached[1], atol=FP32_TOLERANCE, rtol=0)
        assert memory.key.shape == (2, backbone.num_kv_heads, 16, backbone.head_dim)


def check_attention(model: PreTrainedModel) -> None:
    """Rebuilds every layer's attention from its table entry; the model's own weights and heads are what is expected.

    Queries, keys and values are cut from the projections' outputs, turned, scaled, biased and hidden by what the table
    says; nothing is repeated, capped or added that the table does not know.
    """
    model.set_attn_implementation("eager")
    backbone = Backbone(model, memory_layers=LAYERS)
    family, seen = backbone.family, dict[tuple[int, str], Tensor]()
    for layer in LAYERS:
        attention = backbone.attention(layer)
        for name in family.hooked:
            module = attention.get_submodule(name)
            module.register_forward_hook(lambda _, args, output, at=(layer, name): seen.update({at: output}))
        output = attention.get_submodule(family.output)
        output.register_forward_pre_hook(lambda _, args, at=(layer, "heads"): seen.update({at: args[0]}))
    with torch.no_grad():
        expected = model(tiny_tokens((2, 16)), output_attentions=True).attentions
    place, sizes = torch.arange(16), {"num_heads": backbone.num_heads, "head_dim": backbone.head_dim}
    for layer in LAYERS:
        q, k, v = family.split([seen[layer, name] for name in family.hooked], **sizes)
        encoding, groups = backbone.positions(layer), q.shape[1] // k.shape[1]
        turned = encoding.rotate(q, place), encoding.rotate(k, place).repeat_interleave(groups, 1)
        logits = torch.einsum("bhtd,bhsd->bhts", *turned) * backbone.scale(layer)
        distance = place[:, None] - place
        if encoding.slopes is not None:
            logits = logits - encoding.slopes[:, None, None] * distance
        window = sliding_window(backbone.attention(layer)) or 16
        weights = logits.masked_fill((distance < 0) | (distance >= window), float("-inf")).softmax(-1)
        torch.testing.assert_close(weights, expected[layer - 1], atol=WEIGHT_TOLERANCE, rtol=0)
        heads = weights @ v.repeat_interleave(groups, 1)
        torch.testing.assert_close(heads.transpose(1, 2).flatten(2), seen[layer, "heads"], atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", VARIANTS)
def test_attention_is_the_models_own(family: str) -> None:
    check_attention(tiny_model(family))


MISTAKES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "parts read as heads": ("gpt2", {"fused": "heads"}),
        "parts of fewer keys read as heads": ("phi3", {"fused": "heads"}),
        "heads read as parts": ("gpt_neox", {"fused": "parts"}),
        "key and value exchanged": ("llama", {"projections": ("q_proj", "v_proj", "k_proj")}),
        "norms forgotten": ("qwen3", {"norms": ()}),
        "norms of a whole projection forgotten": ("olmo2", {"norms": ()}),
        "norms see the tokens first": ("gemma3_text", {"norm_heads_first": False}),
        "norms see the heads first": ("qwen3", {"norm_heads_first": True}),
        "rotary read as learned": ("phi3", {"positions": "learned"}),
        "rotary read as ALiBi": ("phi3", {"positions": "alibi"}),
        "ALiBi read as learned": ("bloom", {"positions": "learned"}),
        "learned read as ALiBi": ("opt", {"positions": "alibi"}),
        "a projection of another name": ("phi3", {"projections": ("query_key_value",)}),
        "another output projection": ("phi3", {"output": "qkv_proj"}),
    }
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_entry_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MISTAKES[mistake]
    entry: Family = replace(TABLE[name], **wrong)
    monkeypatch.setattr(backbone_module, "family_of", lambda config: entry)
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        check_attention(tiny_model(name))


@pytest.mark.parametrize("family", ["mistral-window", "phi3-window", "qwen2-window", "gemma3_text"])
def test_a_window_that_is_not_found_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "sliding_window", lambda attention: None)
    with pytest.raises(AssertionError):
        check_attention(tiny_model(family))


@pytest.mark.parametrize("foreign", [Gemma2Config, CohereConfig], ids=["capped logits", "neighbours turned together"])
def test_what_the_table_has_no_word_for_is_seen(
    foreign: type[PreTrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry is right for all else of these families, and goes red until there is more than an entry."""
    monkeypatch.setattr(backbone_module, "family_of", lambda config: Family())
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_attention(drawn(foreign(**GATED, num_hidden_layers=4)))


@pytest.mark.parametrize("family", VARIANTS)
def test_geometry_is_that_of_the_formulas(family: str) -> None:
    model = tiny_model(family)
    backbone, reference = Backbone(model), Reference(model)
    for layer in LAYERS:
        expected, encoding = reference.attention(layer - 1), backbone.positions(layer)
        assert backbone.scale(layer) == pytest.approx(expected.scale)
        assert encoding.attention_scaling == pytest.approx(expected.rotary_factor)
        for found, wanted in ((encoding.inv_freq, expected.frequencies), (encoding.slopes, expected.slopes)):
            assert (found is None) == (wanted is None)
            if found is not None:
                assert found.tolist() == pytest.approx(wanted)


def test_windows_are_those_of_each_layer() -> None:
    expected = {
        "llama": [None] * 4,
        "mistral": [None] * 4,
        "mistral-window": [WINDOW] * 4,
        "qwen2-window": [WINDOW, None] * 2,
        "gemma3_text": [WINDOW, None] * 2,
        "phi3-window": [WINDOW] * 4,
        "gpt2": [None] * 4,
        "bloom": [None] * 4,
    }
    for family, windows in expected.items():
        backbone = Backbone(tiny_model(family))
        assert [sliding_window(backbone.attention(layer)) for layer in LAYERS] == windows


def test_alibi_slopes_by_hand() -> None:
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(
        BackboneError, match=r"model family is not supported; got: model_type 't5'; expected: one of bloom, .*; do: "
    ):
        family_of(T5Config())


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gpt2", "add_cross_attention", True),
        ("bloom", "slow_but_exact", True),
        ("opt", "do_layer_norm_before", False),
        ("opt", "_remove_final_layer_norm", True),
    ],
)
def test_an_unsupported_variant_is_refused(family: str, setting: str, value: Any) -> None:
    model = tiny_model(family, layers=1)
    setattr(model.config, setting, value)
    with pytest.raises(
        BackboneError, match=f"this variant of {family} is not supported; got: {setting} = {value!r}; expected: "
    ):
        Backbone(model)


def test_rotary_frequencies_that_change_with_length_are_refused() -> None:
    factors = {"rope_theta": 100.0, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for kind, make in (("dynamic", LlamaConfig), ("longrope", Phi3Config)):
        config = make(**GATED, num_hidden_layers=1, rope_parameters={"rope_type": kind, **factors})
        with pytest.raises(BackboneError, match=f"depend on the length of the input; got: rope_type '{kind}'"):
            Backbone(AutoModelForCausalLM.from_config(config)).positions(1)
