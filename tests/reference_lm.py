"""Every family's causal LM once more, slow and obvious: float64, from the weights, with dense masks.

It shares no code with `pipeline`. Shapes as in design section 2: `B` lanes, `T` tokens, `E` hidden size, `H` heads,
`Hkv` key/value heads, `D` head size.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Attention:
    """What the attention of one layer does: plain numbers and lists."""

    scale: float
    frequencies: list[float] | None = None  # rotary, radians per token
    rotary_factor: float = 1.0  # on the rotated query and on the rotated key
    slopes: list[float] | None = None  # ALiBi
    window: int | None = None


def rotate(x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """RoPE on `[..., S, D]` with positions `[S]`: pairs `(i, i + R/2)` are turned as complex numbers."""
    if attention.frequencies is None:
        return x
    half = len(attention.frequencies)
    turn = torch.outer(positions.double(), torch.tensor(attention.frequencies, dtype=torch.float64))
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(turn), turn)
    turned = turned * attention.rotary_factor
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def local_logits(q: Tensor, k: Tensor, attention: Attention, documents: Tensor | None = None) -> Tensor:
    """Masked logits `[B, H, T, T]` of unrotated `q` and `k`, both with `H` heads."""
    length = q.shape[2]
    place = torch.arange(length)
    logits = attention.scale * rotate(q, place, attention) @ rotate(k, place, attention).transpose(-1, -2)
    distance = place[:, None] - place[None, :]
    if attention.slopes is not None:
        logits = logits - torch.tensor(attention.slopes, dtype=torch.float64)[:, None, None] * distance
    hidden = distance < 0
    if attention.window is not None:
        hidden = hidden | (distance >= attention.window)
    hidden = hidden.expand(q.shape[0], 1, length, length)
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    return logits.masked_fill(hidden, -math.inf)


def _yarn(theta: float, dim: int, factor: float, original: int) -> tuple[list[float], float]:
    """YaRN (Peng et al. 2023), with its usual constants beta 32 and 1."""

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), dim - 1)
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(dim // 2)]
    return [f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)], 0.1 * math.log(factor) + 1.0


def _alibi(num_heads: int) -> list[float]:
    """Press et al. 2022, their own recursion."""

    def power(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(num_heads).is_integer():
        return power(num_heads)
    closest = 2 ** math.floor(math.log2(num_heads))
    return power(closest) + _alibi(2 * closest)[0::2][: num_heads - closest]


def _rms(x: Tensor, norm: Any, plus_one: bool = False) -> Tensor:
    """Root-mean-square norm in float64 (the originals go through float32)."""
    epsilon = norm.eps if plus_one else norm.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (norm.weight + (1 if plus_one else 0))


class Reference:
    """A causal LM in float64, layer by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: Any = model.config
        self.kind: str = model.config.model_type
        self.model: Any = copy.deepcopy(model).double()
        for module in self.model.modules():  # what the fast code hung onto the model is no business of ours
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        bodies = dict.fromkeys(("gpt2", "bloom", "longmem_gpt"), "transformer") | {"gpt_neox": "gpt_neox"}
        self.body: Any = getattr(self.model, bodies.get(self.kind, "model"))
        if self.kind == "opt":
            self.body = self.body.decoder
        self.layers: list[Any] = list(self.body.h if hasattr(self.body, "h") else self.body.layers)
        self.heads: int = self.config.num_attention_heads
        self.dim: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embedding output `X_0`, `[B, T, E]`."""
        if self.kind == "gpt2":
            return self.body.wte.weight[tokens] + self.body.wpe.weight[positions]
        if self.kind == "opt":
            return self.body.embed_tokens.weight[tokens] + self.body.embed_positions.weight[positions + 2]
        if self.kind == "bloom":
            return self.body.word_embeddings_layernorm(self.body.word_embeddings.weight[tokens])
        if self.kind == "longmem_gpt":
            return self.body.wte.weight[tokens]
        if self.kind == "gpt_neox":
            return self.body.embed_in.weight[tokens]
        # Gemma's factor is kept in float32 by the model.
        factor = float(torch.tensor(self.config.hidden_size**0.5)) if self.kind == "gemma3_text" else 1.0
        return self.body.embed_tokens.weight[tokens] * factor

    def final_norm(self) -> nn.Module:
        """The module of the final norm."""
        name = dict.fromkeys(("gpt2", "bloom", "longmem_gpt"), "ln_f")
        name |= dict.fromkeys(("gpt_neox", "opt"), "final_layer_norm")
        module: nn.Module = getattr(self.body, name.get(self.kind, "norm"))
        return module

    def normed(self, x: Tensor) -> Tensor:
        """The residual stream after the model's own final norm."""
        return self._norm(x, self.final_norm())

    def head(self, x: Tensor, norm: Any) -> Tensor:
        """Logits of the residual stream."""
        normed = self._norm(x, norm)
        logits = _linear(self.model.lm_head, normed)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def attention(self, index: int) -> Attention:
        """Attention of the layer with this index (from 0)."""
        scale = self.dim**-0.5
        if self.kind in ("bloom", "longmem_gpt"):
            return Attention(scale, slopes=_alibi(self.heads))
        if self.kind == "gpt2":
            return Attention(scale / (index + 1) if self.config.scale_attn_by_inverse_layer_idx else scale)
        if self.kind == "opt":
            return Attention(scale)
        return self._rotary(index, scale)

    def _rotary(self, index: int, scale: float) -> Attention:
        rope, window = self.config.rope_parameters, getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            window = None
        if self.kind == "gemma3_text":
            assert kinds is not None
            rope, scale = rope[kinds[index]], self.config.query_pre_attn_scalar**-0.5
        if rope["rope_type"] == "yarn":
            frequencies, factor = _yarn(
                rope["rope_theta"], self.dim, rope["factor"], rope["original_max_position_embeddings"]
            )
            return Attention(scale, frequencies, factor, window=window)
        turned = int(self.dim * rope.get("partial_rotary_factor", 1.0))
        frequencies = [rope["rope_theta"] ** (-2 * i / turned) for i in range(turned // 2)]
        return Attention(scale, frequencies, window=window)

    def project(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unrotated q `[B, H, T, D]`, k and v `[B, Hkv, T, D]` of normed hidden states, head by head."""
        if self.kind == "gpt2":
            module = layer.attn.c_attn
            whole = x @ module.weight + module.bias  # all queries, all keys, all values
            width = self.heads * self.dim
            parts = [whole[..., i * width : (i + 1) * width] for i in range(3)]
            return self._heads(parts[0]), self._heads(parts[1]), self._heads(parts[2])
        if self.kind in ("gpt_neox", "bloom"):
            module = (layer.attention if self.kind == "gpt_neox" else layer.self_attention).query_key_value
            cut: list[list[Tensor]] = [[], [], []]
            for head in range(self.heads):  # query, key, value of one head, then the next head
                for part in range(3):
                    at = (3 * head + part) * self.dim
                    rows = slice(at, at + self.dim)
                    cut[part].append(x @ module.weight[rows].T + module.bias[rows])
            return torch.stack(cut[0], 1), torch.stack(cut[1], 1), torch.stack(cut[2], 1)
        attention = layer.attn if self.kind == "longmem_gpt" else layer.self_attn
        if self.kind == "phi3":  # all queries, fewer keys, as many values
            whole, first = _linear(attention.qkv_proj, x), self.heads * self.dim
            last = first + self.config.num_key_value_heads * self.dim
            return self._heads(whole[..., :first]), self._heads(whole[..., first:last]), self._heads(whole[..., last:])
        if self.kind == "olmo2":  # norms over all heads together
            q = self._norm(_linear(attention.q_proj, x), attention.q_norm)
            k = self._norm(_linear(attention.k_proj, x), attention.k_norm)
            return self._heads(q), self._heads(k), self._heads(_linear(attention.v_proj, x))
        q, k, v = (self._heads(_linear(m, x)) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        if self.kind in ("qwen3", "gemma3_text"):
            q, k = self._norm(q, attention.q_norm), self._norm(k, attention.k_norm)
        return q, k, v

    def layer(self, layer: Any, x: Tensor, attend: Any) -> Tensor:
        """One layer; `attend(q, k, v)` gives the heads' outputs `[B, H, T, D]`."""

        def attended(normed: Tensor, output: Any) -> Tensor:
            heads = attend(*self.project(layer, normed)).transpose(1, 2).flatten(2)
            return heads @ output.weight + output.bias if self.kind == "gpt2" else _linear(output, heads)

        if self.kind == "gpt2":
            x = x + attended(layer.ln_1(x), layer.attn.c_proj)
            return x + layer.mlp(layer.ln_2(x))
        if self.kind == "longmem_gpt":  # one norm, attention and MLP beside each other
            normed = layer.ln_1(x)
            return x + attended(normed, layer.attn.out_proj) + layer.mlp(normed)
        if self.kind == "gpt_neox":
            first = x + attended(layer.input_layernorm(x), layer.attention.dense)
            other = x if self.config.use_parallel_residual else first
            return first + layer.mlp(layer.post_attention_layernorm(other))
        if self.kind == "bloom":
            x = x + attended(layer.input_layernorm(x), layer.self_attention.dense)
            return x + layer.mlp(layer.post_attention_layernorm(x), torch.zeros_like(x))
        if self.kind == "opt":
            x = x + attended(layer.self_attn_layer_norm(x), layer.self_attn.out_proj)
            return x + _linear(layer.fc2, torch.relu(_linear(layer.fc1, layer.final_layer_norm(x))))
        if self.kind == "olmo2":  # norms after what they belong to
            x = x + self._norm(attended(x, layer.self_attn.o_proj), layer.post_attention_layernorm)
            return x + self._norm(layer.mlp(x), layer.post_feedforward_layernorm)
        mixed = attended(self._norm(x, layer.input_layernorm), layer.self_attn.o_proj)
        if self.kind == "gemma3_text":
            x = x + self._norm(mixed, layer.post_attention_layernorm)
            inner = layer.mlp(self._norm(x, layer.pre_feedforward_layernorm))
            return x + self._norm(inner, layer.post_feedforward_layernorm)
        x = x + mixed
        return x + layer.mlp(self._norm(x, layer.post_attention_layernorm))

    def local(self, index: int, documents: Tensor | None) -> Any:
        """`attend` of the backbone's own layer `index` (from 0)."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = local_logits(q, repeat(k, self.heads), self.attention(index), documents)
            return torch.softmax(logits, -1) @ repeat(v, self.heads)

        return attend

    def taps(self, tokens: Tensor, documents: Tensor | None = None) -> list[Tensor]:
        """`X_0 .. X_L'` of one segment; with documents, attention and positions stay inside each."""
        x = self.embed(tokens, _places(tokens, documents))
        found = [x]
        for index, layer in enumerate(self.layers):
            x = self.layer(layer, x, self.local(index, documents))
            found.append(x)
        return found

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the LM itself."""
        return self.head(self.taps(tokens)[-1], self.final_norm())

    def _heads(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., i : i + self.dim] for i in range(0, x.shape[-1], self.dim)], 1)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            normed: Tensor = norm(x)
            return normed
        return _rms(x, norm, plus_one=self.kind == "gemma3_text")


def _linear(module: Any, x: Tensor) -> Tensor:
    out: Tensor = x @ module.weight.T
    return out if module.bias is None else out + module.bias


def repeat(x: Tensor, heads: int) -> Tensor:
    """`[B, Hkv, ...]` -> `[B, H, ...]`: consecutive query heads share a key/value head."""
    return torch.stack([x[:, h * x.shape[1] // heads] for h in range(heads)], 1)


def _places(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Position of each token in its segment, or since its document began there."""
    places = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        for at in range(1, tokens.shape[1]):
            same = documents is None or bool(documents[row, at] == documents[row, at - 1])
            places[row, at] = places[row, at - 1] + 1 if same else 0
    return places
