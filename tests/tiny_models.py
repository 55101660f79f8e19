"""Tiny random causal LMs of every family: made in milliseconds, in fp32, without files or network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.backbone.gpt import LongMemGPTConfig

VOCABULARY = 96
MAX_TOKENS = 128
WINDOW = 5  # tokens: shorter than any segment of the tests, and no multiple of a chunk

_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
)
GATED: Mapping[str, Any] = MappingProxyType(
    {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": MAX_TOKENS}
)
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


def _layered(layers: int) -> dict[str, Any]:
    """Alternating layers with and without a sliding window."""
    kinds = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": kinds, "sliding_window": WINDOW}


_CONFIGS: Mapping[str, Callable[[int], PreTrainedConfig]] = MappingProxyType(
    {
        "llama": lambda n: LlamaConfig(**GATED, num_hidden_layers=n, attention_bias=True),
        "mistral": lambda n: MistralConfig(**GATED, num_hidden_layers=n, sliding_window=None),
        "qwen2": lambda n: Qwen2Config(**GATED, num_hidden_layers=n),
        "qwen3": lambda n: Qwen3Config(**GATED, num_hidden_layers=n, head_dim=12),
        "gemma3_text": lambda n: Gemma3TextConfig(
            **GATED, **_layered(n), head_dim=16, query_pre_attn_scalar=6, final_logit_softcapping=3.0
        ),
        "olmo2": lambda n: Olmo2Config(**GATED, num_hidden_layers=n),
        "phi3": lambda n: Phi3Config(**GATED, num_hidden_layers=n, rope_parameters=_HALF_ROTARY),
        "gpt2": lambda n: GPT2Config(**_SIZES, num_hidden_layers=n, max_position_embeddings=MAX_TOKENS),
        "gpt_neox": lambda n: GPTNeoXConfig(
            **_SIZES, num_hidden_layers=n, intermediate_size=48, rotary_pct=0.5, max_position_embeddings=MAX_TOKENS
        ),
        "bloom": lambda n: BloomConfig(**_SIZES, num_hidden_layers=n),
        "opt": lambda n: OPTConfig(
            **_SIZES,
            num_hidden_layers=n,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=MAX_TOKENS,
        ),
        "longmem_gpt": lambda n: LongMemGPTConfig(**_SIZES, num_hidden_layers=n, max_position_embeddings=MAX_TOKENS),
        # The same families with settings that change the arithmetic of attention.
        "llama-yarn": lambda n: LlamaConfig(**GATED, num_hidden_layers=n, rope_parameters=_YARN),
        "mistral-window": lambda n: MistralConfig(**GATED, num_hidden_layers=n, sliding_window=WINDOW),
        "phi3-window": lambda n: Phi3Config(**GATED, num_hidden_layers=n, sliding_window=WINDOW),
        "qwen2-window": lambda n: Qwen2Config(**GATED, **_layered(n), use_sliding_window=True),
        "gpt2-layer-scale": lambda n: GPT2Config(
            **_SIZES, num_hidden_layers=n, max_position_embeddings=MAX_TOKENS, scale_attn_by_inverse_layer_idx=True
        ),
        "gpt_neox-serial": lambda n: GPTNeoXConfig(
            **_SIZES,
            num_hidden_layers=n,
            intermediate_size=48,
            use_parallel_residual=False,
            max_position_embeddings=MAX_TOKENS,
        ),
        "bloom-6-heads": lambda n: BloomConfig(**{**_SIZES, "hidden_size": 36, "num_attention_heads": 6}, n_layer=n),
    }
)

VARIANTS = tuple(_CONFIGS)  # the families, and more of some
FAMILIES = tuple(name for name in VARIANTS if "-" not in name)


def tiny_model(family: str, *, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random causal LM in fp32, in evaluation mode; every parameter is drawn, norms and biases too.

    Args:
        family: One of VARIANTS.
        layers: Number of layers.
        seed: Of the parameters.
    """
    return drawn(_CONFIGS[family](layers), seed=seed)


def drawn(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A causal LM like `tiny_model`, of any configuration."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise / (config.hidden_size**0.5 if config.model_type.startswith("gemma") else 1.0))
            else:  # twice the usual size, so that attention is far from uniform
                parameter.copy_(noise * 2 / min(parameter.shape) ** 0.5)
    return model


def save_tiny_model(family: str, folder: Path, *, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """Makes a `tiny_model` and saves it as a Hugging Face folder (without tokenizer)."""
    model = tiny_model(family, layers=layers, seed=seed)
    model.save_pretrained(folder)
    return model
