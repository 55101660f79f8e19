"""The family table: where each model family keeps its layers, norms and projections, and how it splits q, k, v.

A new family is one entry of `FAMILIES`; nothing else in the project knows a family by name.

Shapes: `B` rows, `T` tokens, `H` query heads, `Hkv` key/value heads, `D` head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from pipeline.backbone import gpt
from pipeline.errors import BackboneError
from pipeline.positions import PositionEncoding, alibi_slopes


@dataclass(frozen=True)
class Family:
    """Names and habits of one model family.

    Attributes:
        decoder: Path from the causal LM to the module that holds the layers.
        layers: Name of the list of layers in the decoder.
        norm: Name of the final norm in the decoder.
        attention: Name of the attention module in a layer.
        output: Name of the output projection in the attention module.
        projections: Names of the modules whose outputs hold q, k, v, in this order; one name if they are fused.
        fused: How a fused output is cut: `heads` (q, k, v of one head, then of the next: `[H, 3, D]`) or `parts` (all
            queries, all keys, all values: `[H + 2 Hkv, D]`).
        norms: Names of the query norm and key norm that come before the rotary embedding, if any; over one head each,
            or over the whole projection.
        norm_heads_first: Whether those norms see `[B, H, T, D]` rather than `[B, T, H, D]`.
        positions: `rotary`, `alibi` or `learned`.
        unsupported: Configuration values that change the arithmetic in ways this table does not cover:
            (attribute name, the only values that work).
    """

    decoder: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    output: str = "o_proj"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    norms: tuple[str, ...] = ()
    norm_heads_first: bool = False
    positions: str = "rotary"
    unsupported: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def hooked(self) -> tuple[str, ...]:
        """Names of the modules of an attention module whose outputs are needed to know q, k and v."""
        if self.norms:
            return (*self.norms, self.projections[2])
        return self.projections

    def split(self, outputs: Sequence[Tensor], *, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cuts the outputs of the `hooked` modules into heads.

        Args:
            outputs: One tensor for each name in `hooked`.
            num_heads: `H`.
            head_dim: `D`.

        Returns:
            q `[B, H, T, D]`, k and v `[B, Hkv, T, D]`, without any rotary embedding.
        """
        if self.fused == "heads":
            query, key, value = outputs[0].unflatten(-1, (-1, 3, head_dim)).unbind(-2)  # of [B, T, H, 3, D]
        elif self.fused == "parts":
            heads = outputs[0].unflatten(-1, (-1, head_dim))  # [B, T, H + 2 Hkv, D]
            query, key, value = heads.tensor_split((num_heads, (num_heads + heads.shape[2]) // 2), dim=2)
        else:  # what comes from the norm of one head is cut already
            query, key, value = (x if x.dim() == 4 else x.unflatten(-1, (-1, head_dim)) for x in outputs)
            if self.norm_heads_first:
                return query, key, value.transpose(1, 2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # from [B, T, H or Hkv, D]


_ROTARY = Family()
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _ROTARY,
        "mistral": _ROTARY,
        "qwen2": _ROTARY,
        "qwen3": Family(norms=("q_norm", "k_norm")),
        "olmo2": Family(norms=("q_norm", "k_norm")),
        "phi3": Family(projections=("qkv_proj",), fused="parts"),
        "gemma3_text": Family(
            norms=("q_norm", "k_norm"),
            norm_heads_first=True,
            unsupported=(("attn_logit_softcapping", (None,)), ("use_bidirectional_attention", (None, False))),
        ),
        "gpt2": Family(
            decoder="transformer",
            layers="h",
            norm="ln_f",
            attention="attn",
            output="c_proj",
            projections=("c_attn",),
            fused="parts",
            positions="learned",
            unsupported=(("add_cross_attention", (False,)),),
        ),
        "gpt_neox": Family(
            decoder="gpt_neox",
            norm="final_layer_norm",
            attention="attention",
            output="dense",
            projections=("query_key_value",),
            fused="heads",
        ),
        "bloom": Family(
            decoder="transformer",
            layers="h",
            norm="ln_f",
            attention="self_attention",
            output="dense",
            projections=("query_key_value",),
            fused="heads",
            positions="alibi",
            # With slow_but_exact BLOOM reads the weight of its output projection without calling the module.
            unsupported=(("slow_but_exact", (False,)),),
        ),
        "opt": Family(
            decoder="model.decoder",
            norm="final_layer_norm",
            output="out_proj",
            positions="learned",
            # OPT-350m alone: norms after the residual and a projection before the head.
            unsupported=(("do_layer_norm_before", (True,)), ("_remove_final_layer_norm", (False,))),
        ),
        gpt.MODEL_TYPE: Family(
            decoder="transformer", layers="h", norm="ln_f", attention="attn", output="out_proj", positions="alibi"
        ),
    }
)


def family_of(config: Any) -> Family:
    """Finds the table entry of a model.

    Args:
        config: The `transformers` configuration of the model.

    Returns:
        The family.

    Raises:
        BackboneError: The model type is not in the table, or uses a variant that the table does not cover.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise BackboneError(
            "the backbone's model family is not supported",
            got=f"model_type {model_type!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            do="choose another backbone, or add one entry to FAMILIES in pipeline/backbone/families.py",
        )
    family = FAMILIES[model_type]
    for name, allowed in family.unsupported:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise BackboneError(
                f"this variant of {model_type} is not supported",
                got=f"{name} = {value!r}",
                expected=f"{name} in {list(allowed)}",
                do="choose a backbone of this family with the usual setting",
            )
    return family


def attention_scale(attention: nn.Module, head_dim: int) -> float:
    """The factor on `q k^T` of one attention module (Gemma's and GPT-2's are not always `D^-1/2`)."""
    scaling = getattr(attention, "scaling", None)
    return float(scaling) if scaling is not None else head_dim**-0.5


def sliding_window(attention: nn.Module) -> int | None:
    """How many tokens, the query's own among them, an attention module sees; None: its whole segment."""
    config = getattr(attention, "config", None)
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def position_encoding(family: Family, decoder: nn.Module, layer: int, *, num_heads: int) -> PositionEncoding:
    """The position encoding that one attention layer uses.

    Args:
        family: The model's family.
        decoder: The module that holds the layers (and the rotary embedding).
        layer: The layer, counted from 1.
        num_heads: `H`.

    Returns:
        The encoding.

    Raises:
        BackboneError: The rotary frequencies change with the length of the input.
    """
    if family.positions == "learned":
        return PositionEncoding()
    if family.positions == "alibi":
        return PositionEncoding(slopes=alibi_slopes(num_heads))
    rotary: Any = decoder.rotary_emb
    # Gemma 3 has a set of frequencies for each kind of layer; other families one for all.
    layer_types = getattr(rotary.config, "layer_types", None)
    layer_type = layer_types[layer - 1] if isinstance(rotary.rope_type, dict) and layer_types else ""
    prefix = f"{layer_type}_" if layer_type else ""
    kind = rotary.rope_type[layer_type] if layer_type else rotary.rope_type
    if kind in ("dynamic", "longrope"):
        raise BackboneError(
            "the backbone's rotary frequencies depend on the length of the input",
            got=f"rope_type {kind!r}",
            expected="default, linear, llama3 or yarn",
            do="set another rope_type in the backbone's config.json",
        )
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    return PositionEncoding(getattr(rotary, f"{prefix}inv_freq").float().clone(), scaling)
