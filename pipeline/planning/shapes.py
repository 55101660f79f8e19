"""The sizes of a backbone, without its weights: from its configuration, or of models that everyone knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.load import in_a_line
from pipeline.errors import BackboneError

KNOWN_SHAPES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "gpt2-medium": lambda: GPT2Config(n_embd=1024, n_layer=24, n_head=16),
        "llama-3-8b": lambda: _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, heads=32),
        "llama-3-70b": lambda: _llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, heads=64),
    }
)
"""Name to the `transformers` configuration with these sizes."""
_SAVED_BY_ACTIVATION = {"relu": 1, "gelu_new": 5}  # with the input of what follows; others: 2


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a backbone. Parameters are counted in numbers, not bytes.

    Attributes:
        hidden_size: `E`.
        num_heads: `H`.
        num_kv_heads: `Hkv`.
        head_dim: `D`.
        vocab_size: `V`.
        mlp_size: Numbers of a token inside the MLP.
        mlp_saved: Tensors of that size that autograd keeps for the backward pass of one MLP.
        has_rms_norm: Whether norms are RMSNorms, which compute in float32 and keep it.
        keeps_attention: Whether attention is computed with its `[T, T]` weights whole, whatever is asked for.
        is_fused: Whether queries, keys and values come out of one projection.
        positions: `rotary`, `alibi` or `learned`.
        layers: Parameters of each layer.
        largest_in_layer: The largest parameter of a layer.
        norm: Parameters of the final norm.
        decoder: Each parameter of the decoder (embeddings, layers, final norm).
        head: Each parameter of the LM head.
        head_is_tied: Whether the head is the embedding.
        max_positions: Tokens of the longest text that it was made for; None: it does not say.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_size: int
    mlp_saved: int
    has_rms_norm: bool
    keeps_attention: bool
    is_fused: bool
    positions: str
    layers: tuple[int, ...]
    largest_in_layer: int
    norm: int
    decoder: tuple[int, ...]
    head: tuple[int, ...]
    head_is_tied: bool
    max_positions: int | None = None

    @property
    def parameters(self) -> tuple[int, ...]:
        """Each parameter of the backbone."""
        return self.decoder if self.head_is_tied else self.decoder + self.head


def known_shape(name: str) -> BackboneShape:
    """The sizes of a model that everyone knows.

    Args:
        name: One of KNOWN_SHAPES.

    Returns:
        The sizes.
    """
    return shape_of(KNOWN_SHAPES[name]())


def read_shape(path: str) -> BackboneShape:
    """The sizes of a backbone, from its configuration alone.

    Args:
        path: `config.json`, the folder that holds it, or a hub name.

    Returns:
        The sizes.

    Raises:
        BackboneError: There is no such file, it is no configuration, or of an unknown family.
    """
    try:
        if Path(path).is_file():
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(path)
        return shape_of(config.get_text_config())
    except BackboneError:
        raise
    except Exception as error:  # foreign code on a foreign file
        raise BackboneError(
            "the backbone's configuration cannot be read",
            got=f"backbone.path {path!r} ({in_a_line(error)})",
            expected="a Hugging Face config.json, the folder that holds it, or a hub name",
            do=f"set backbone.path, or name a known size: --shape {', '.join(KNOWN_SHAPES)}",
        ) from error


def shape_of(config: Any) -> BackboneShape:
    """Counts the parameters of a model that is built without memory for them.

    Args:
        config: The `transformers` configuration of a causal LM.

    Returns:
        The sizes.

    Raises:
        BackboneError: The family is unknown or the variant is not supported.
    """
    with torch.device("meta"):
        backbone = Backbone(AutoModelForCausalLM.from_config(config))
    head, embedding = backbone.head, backbone.model.get_input_embeddings()
    inner = [getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")]
    activation = getattr(config, "activation_function", getattr(config, "hidden_act", ""))
    is_gated = any("gate_" in name for name, _ in backbone.layers[0].named_modules())
    return BackboneShape(
        hidden_size=backbone.hidden_size,
        num_heads=backbone.num_heads,
        num_kv_heads=backbone.num_kv_heads,
        head_dim=backbone.head_dim,
        vocab_size=int(config.vocab_size),
        mlp_size=int(next(filter(None, inner), 4 * backbone.hidden_size)),
        mlp_saved=4 if is_gated else _SAVED_BY_ACTIVATION.get(activation, 2),
        has_rms_norm="RMSNorm" in type(backbone.norm).__name__,
        keeps_attention=config.model_type == "bloom",
        is_fused=bool(backbone.family.fused),
        positions=backbone.family.positions,
        layers=tuple(sum(_numbers(layer)) for layer in backbone.layers),
        largest_in_layer=max(numbers for layer in backbone.layers for numbers in _numbers(layer)),
        norm=sum(_numbers(backbone.norm)),
        decoder=_numbers(backbone.decoder),
        head=_numbers(head),
        head_is_tied=head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False)),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _numbers(module: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in module.parameters())


def _llama(*, heads: int, **sizes: int) -> LlamaConfig:
    """Llama 3: 8 key/value heads of 128, a vocabulary of 128,256, a head of its own."""
    return LlamaConfig(**sizes, vocab_size=128256, num_attention_heads=heads, num_key_value_heads=8)
