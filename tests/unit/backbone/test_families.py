"""What the family table says of each family, against Hugging Face's own arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.families import FAMILIES as TABLE
from pipeline.backbone.families import alibi_slopes, family_of
from pipeline.errors import BackboneError
from tests.reference_lm import Reference
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import FAMILIES, VARIANTS, WINDOW, tiny_model

FP32_TOLERANCE = 1e-4  # keys of size 4 after three random layers; a wrong split is off by more than 1

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
    from pipeline.backbone.families import sliding_window

    expected = {
        "llama": [None] * 4,
        "mistral": [None] * 4,
        "mistral-window": [WINDOW] * 4,
        "qwen2-window": [WINDOW, None] * 2,
        "gemma3_text": [WINDOW, None] * 2,
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
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    )
    with pytest.raises(BackboneError, match="depend on the length of the input; got: rope_type 'dynamic'"):
        Backbone(AutoModelForCausalLM.from_config(config)).positions(1)
