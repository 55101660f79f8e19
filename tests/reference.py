"""LongMem once more, slow and obvious: float64, dense masks, explicit loops. It shares no code with the fast one.

A layer is worked out from the weights by each family's formulas, and so is attention over memory: for each lane, head
and token the visible chunks are listed, scored, sorted and attended to. Gradients come from autograd.

Shapes as in design section 2: `B` lanes, `T` tokens, `E` hidden size, `H` heads, `Hkv` key/value heads, `D` head size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# ---------------------------------------------------------------------------------------------------- attention


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


# ------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Rules:
    """How memory is read; the names are those of the configuration."""

    tokens: int
    chunk_size: int
    top_k_tokens: int
    scope: str = "lane"
    position: str = "none"


@dataclass
class Past:
    """Everything one memory layer was ever given, nothing forgotten."""

    keys: list[Tensor] = field(default_factory=list)  # [B, Hkv, T, D], unrotated
    values: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    documents: list[Tensor] = field(default_factory=list)  # [B, T]

    def add(self, key: Tensor, value: Tensor, *, start: int, documents: Tensor) -> None:
        """Remembers one segment of every lane."""
        self.keys.append(key.double())
        self.values.append(value.double())
        self.positions.extend(range(start, start + key.shape[2]))
        self.documents.append(documents)


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one lane."""

    lane: int
    tokens: list[int]  # indices into Past
    positions: list[int]
    documents: set[int]


@dataclass(frozen=True)
class Read:
    """What memory gave: values `[B, H, T, D]`, log-sum-exp `[B, H, T]`, positions of each query's chunks."""

    values: Tensor
    log_sum_exp: Tensor
    chunks: Mapping[tuple[int, int, int], list[tuple[int, int]]]  # (lane, head, token) -> (lane, first position)


def read_memory(past: Past, q: Tensor, attention: Attention, rules: Rules, *, start: int, documents: Tensor) -> Read:
    """Design section 3 and 4, word by word, for unrotated queries `[B, H, T, D]`."""
    num_lanes, num_heads, num_tokens, dim = q.shape
    if not past.keys:
        return Read(torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf), {})
    keys, values, owner = torch.cat(past.keys, 2), torch.cat(past.values, 2), torch.cat(past.documents, 1)
    group = num_heads // keys.shape[1]
    every = _chunks(past, owner, rules, start)
    rows, log_sum_exps, found = [], [], {}
    for lane in range(num_lanes):
        for head in range(num_heads):
            for token in range(num_tokens):
                query, now = q[lane, head, token], start + token
                document = int(documents[lane, token])
                seen = [chunk for chunk in every if _sees(lane, document, chunk, rules.scope)]
                best = _best(query, keys[:, head // group], seen, now, head, attention, rules)
                found[lane, head, token] = [(chunk.lane, chunk.positions[0]) for chunk in best]
                if not best:
                    rows.append(query.new_zeros(dim))
                    log_sum_exps.append(query.new_tensor(-math.inf))
                    continue
                key = torch.cat([keys[c.lane, head // group, c.tokens] for c in best])
                distances = [now - at for c in best for at in c.positions]
                logits = _logits(query, key, distances, head, attention, rules.position)
                value = torch.cat([values[c.lane, head // group, c.tokens] for c in best])
                rows.append(torch.softmax(logits, 0) @ value)
                log_sum_exps.append(torch.logsumexp(logits, 0))
    shape = (num_lanes, num_heads, num_tokens)
    return Read(torch.stack(rows).view(*shape, dim), torch.stack(log_sum_exps).view(shape), found)


def _chunks(past: Past, owner: Tensor, rules: Rules, start: int) -> list[Chunk]:
    """Chunks of the last `tokens` tokens before the segment, of every lane."""
    found = []
    for first in range(0, len(past.positions), rules.chunk_size):
        tokens = list(range(first, first + rules.chunk_size))
        positions = [past.positions[i] for i in tokens]
        if positions[0] >= start - rules.tokens and positions[-1] < start:
            found += [Chunk(lane, tokens, positions, set(owner[lane, tokens].tolist())) for lane in range(len(owner))]
    return found


def _sees(lane: int, document: int, chunk: Chunk, scope: str) -> bool:
    if scope == "group":
        return True
    return chunk.lane == lane and (scope == "lane" or chunk.documents == {document})


def _best(
    query: Tensor, keys: Tensor, seen: list[Chunk], now: int, head: int, attention: Attention, rules: Rules
) -> list[Chunk]:
    """The top chunks of one query by their mean key, read at the distance of the chunk's centre."""
    if not seen:
        return []
    means = torch.stack([keys[chunk.lane, chunk.tokens].mean(0) for chunk in seen])
    distances = [now - sum(chunk.positions) / len(chunk.positions) for chunk in seen]
    scores = _logits(query.detach(), means, distances, head, attention, rules.position).tolist()
    order = sorted(range(len(seen)), key=lambda i: -scores[i])
    return [seen[i] for i in order[: rules.top_k_tokens // rules.chunk_size]]


def _logits(
    q: Tensor, keys: Tensor, distances: Sequence[float], head: int, attention: Attention, position: str
) -> Tensor:
    """One query `[D]` against keys `[S, D]` that lie so many tokens back, under a position rule."""
    kind, _, limit = position.partition(":")
    if kind == "none" or (attention.frequencies is None and attention.slopes is None):
        return attention.scale * (keys @ q)
    if kind == "fixed":
        distances = [int(limit)] * len(distances)
    if kind == "clamp":
        distances = [min(distance, int(limit)) for distance in distances]
    read_at = torch.tensor(distances, dtype=torch.float64)
    turned = rotate(q.expand(len(keys), -1), read_at, attention)  # only the difference of positions counts
    logits = attention.scale * (turned * rotate(keys, torch.zeros(len(keys)), attention)).sum(-1)
    return logits if attention.slopes is None else logits - attention.slopes[head] * read_at


def fuse(local: Tensor, local_lse: Tensor, read: Read, gate: Tensor, fusion: str) -> Tensor:
    """Mixes local attention `[B, H, T, D]` and memory, per head."""
    sees = torch.isfinite(read.log_sum_exp)
    if fusion == "gate":
        share = torch.sigmoid(gate)[None, :, None].expand_as(local_lse)
    else:
        memory_lse = torch.where(sees, read.log_sum_exp, 0.0) + gate[None, :, None]
        share = torch.exp(local_lse - torch.logaddexp(local_lse, memory_lse))
    share = torch.where(sees, share, 1.0)[..., None]
    return share * local + (1 - share) * read.values


# ------------------------------------------------------------------------------------------------------ families


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
        body = {"gpt2": "transformer", "bloom": "transformer", "gpt_neox": "gpt_neox"}.get(self.kind, "model")
        self.body: Any = getattr(self.model, body)
        if self.kind == "opt":
            self.body = self.body.decoder
        self.layers: list[Any] = list(self.body.h if self.kind in ("gpt2", "bloom") else self.body.layers)
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
        if self.kind == "gpt_neox":
            return self.body.embed_in.weight[tokens]
        # Gemma's factor is kept in float32 by the model.
        factor = float(torch.tensor(self.config.hidden_size**0.5)) if self.kind == "gemma3_text" else 1.0
        return self.body.embed_tokens.weight[tokens] * factor

    def final_norm(self) -> nn.Module:
        """The module of the final norm."""
        name = {"gpt2": "ln_f", "bloom": "ln_f", "gpt_neox": "final_layer_norm", "opt": "final_layer_norm"}
        module: nn.Module = getattr(self.body, name.get(self.kind, "norm"))
        return module

    def head(self, x: Tensor, norm: Any) -> Tensor:
        """Logits of the residual stream."""
        normed = self._norm(x, norm)
        logits = normed @ self.model.lm_head.weight.T
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def attention(self, index: int) -> Attention:
        """Attention of the layer with this index (from 0)."""
        scale = self.dim**-0.5
        if self.kind == "bloom":
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
            rope, scale = rope[kinds[index]], self.config.query_pre_attn_scalar**-0.5
        if rope["rope_type"] == "yarn":
            frequencies, factor = _yarn(
                rope["rope_theta"], self.dim, rope["factor"], rope["original_max_position_embeddings"]
            )
            return Attention(scale, frequencies, factor, window=window)
        turned = int(self.dim * rope.get("partial_rotary_factor", 1.0)) if self.kind == "gpt_neox" else self.dim
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
        attention = layer.self_attn
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
            logits = local_logits(q, _repeat(k, self.heads), self.attention(index), documents)
            return torch.softmax(logits, -1) @ _repeat(v, self.heads)

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


def _repeat(x: Tensor, heads: int) -> Tensor:
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


# ------------------------------------------------------------------------------------------------------- SideNet


class ReferenceSideNet:
    """Backbone, untrained SideNet and memory in float64 (design section 3).

    Args:
        model: The causal LM.
        boundaries: `b_0 .. b_L`.
        memory_layers: Side layers that read memory, counted from 1.
        residual: `interleaved` or `paper`.
        fusion: `gate` or `joint`.
        gate: First number of every head.
        rules: How memory is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        boundaries: Sequence[int],
        *,
        memory_layers: Sequence[int] = (),
        residual: str = "interleaved",
        fusion: str = "gate",
        gate: float = 0.0,
        rules: Rules | None = None,
    ) -> None:
        self.lm, self.boundaries, self.residual, self.fusion = Reference(model), list(boundaries), residual, fusion
        self.rules = rules
        for parameter in self.lm.model.parameters():
            parameter.requires_grad_(False)
        self.layers = {n: copy.deepcopy(self.lm.layers[b - 1]) for n, b in enumerate(boundaries) if n > 0}
        self.norm = copy.deepcopy(self.lm.final_norm())
        self.gates = {n: torch.full((self.lm.heads,), gate, dtype=torch.float64) for n in memory_layers}
        self.past = {n: Past() for n in memory_layers}
        self.trained = [p for m in (*self.layers.values(), self.norm) for p in m.parameters()] + [*self.gates.values()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def _inside(self, documents: Tensor) -> Tensor | None:
        return documents if self.rules is not None and self.rules.scope == "document" else None

    def remember(self, tokens: Tensor, *, start: int, documents: Tensor) -> None:
        """Encodes a segment of every lane and remembers it."""
        taps = self.lm.taps(tokens, self._inside(documents))
        for number, past in self.past.items():
            source = self.boundaries[number]
            caught: list[tuple[Tensor, Tensor]] = []

            def catch(q: Tensor, k: Tensor, v: Tensor, into: list[tuple[Tensor, Tensor]] = caught) -> Tensor:
                into.append((k, v))
                return q

            self.lm.layer(self.lm.layers[source - 1], taps[source - 1], catch)
            past.add(*caught[0], start=start, documents=documents)

    def logits(self, tokens: Tensor, *, start: int = 0, documents: Tensor | None = None) -> Tensor:
        """Logits `[B, T, V]` of a segment, memory read."""
        documents = torch.zeros_like(tokens) if documents is None else documents
        x, b = self.lm.taps(tokens, self._inside(documents)), self.boundaries
        state = x[b[0]]
        for number, layer in self.layers.items():
            attend = self._attend(number, start, documents)
            if self.residual == "interleaved":
                state = self.lm.layer(layer, state + (x[b[number] - 1] - x[b[number - 1]]), attend)
            else:
                state = self.lm.layer(layer, state, attend) + (x[b[number]] - x[b[number - 1]])
        return self.lm.head(state, self.norm)

    def _attend(self, number: int, start: int, documents: Tensor) -> Any:
        index, heads = self.boundaries[number] - 1, self.lm.heads
        attention = self.lm.attention(index)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = local_logits(q, _repeat(k, heads), attention, self._inside(documents))
            local = torch.softmax(logits, -1) @ _repeat(v, heads)
            if number not in self.past:
                return local
            assert self.rules is not None
            read = read_memory(self.past[number], q, attention, self.rules, start=start, documents=documents)
            return fuse(local, torch.logsumexp(logits, -1), read, self.gates[number], self.fusion)

        return attend
