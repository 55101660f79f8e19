"""LongMem once more, slow and obvious: float64, explicit loops, gradients by autograd.

It shares no code with `pipeline`. Attention over memory: for each lane, head and token the visible chunks are listed,
scored, sorted and attended to. Shapes as in `tests.reference_lm`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.reference_lm import Attention, Reference, local_logits, repeat, rotate


@dataclass(frozen=True)
class Rules:
    """How memory is read; the names are those of the configuration."""

    tokens: int
    chunk_size: int
    top_k_tokens: int
    scope: str = "lane"
    position: str = "none"
    retrieve_for: str = "head"
    window_tokens: int = 0


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


@dataclass(frozen=True, eq=False)
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
    chunks: Mapping[tuple[int, int, int], list[tuple[int, int]]]  # (row, head, token) -> (lane, first position)
    window: Read | None = None  # the same of the last tokens before the segment, which are read whole
    scores: Mapping[tuple[int, int, int], list[float]] = field(default_factory=dict)  # of those chunks
    weights: Mapping[tuple[int, int, int], list[float]] = field(default_factory=dict)  # of each, in the softmax inside


def read_memory(
    past: Past,
    q: Tensor,
    attention: Attention,
    rules: Rules,
    *,
    start: int,
    documents: Tensor,
    first: int = 0,
    lane_of_row: Sequence[int] | None = None,
    retrieve_from: Sequence[int] | None = None,
    visible: Tensor | None = None,
) -> Read:
    """Design section 3 and 4, word by word, for unrotated queries `[B, H, T, D]`.

    The queries stand `first` tokens inside the segment; row `b` reads lane `lane_of_row[b]`, of which it may see the
    chunks that `visible[b]` says, the newest one last. The window is of that lane; older chunks are of lane
    `retrieve_from[b]`, if that is said.
    """
    num_rows, num_heads, num_tokens, dim = q.shape
    lane_of_row = range(num_rows) if lane_of_row is None else lane_of_row
    retrieve_from = lane_of_row if retrieve_from is None else retrieve_from
    if not past.keys:
        return Read(torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf), {})
    keys, values, owner = torch.cat(past.keys, 2), torch.cat(past.values, 2), torch.cat(past.documents, 1)
    group = num_heads // keys.shape[1]
    every = _chunks(past, owner, rules, start)
    is_recent = [chunk.positions[0] >= start - rules.window_tokens for chunk in every]
    older = [chunk for chunk, recent in zip(every, is_recent, strict=True) if not recent]
    window = [chunk for chunk, recent in zip(every, is_recent, strict=True) if recent]
    rows, log_sum_exps, found, scores, weights = [], [], {}, {}, {}
    recent_rows: list[Tensor] = []
    recent_lse: list[Tensor] = []
    for row in range(num_rows):
        may = [chunk for chunk in older if visible is None or _may_see(visible[row], chunk, start, rules)]
        near = [chunk for chunk in window if visible is None or _may_see(visible[row], chunk, start, rules)]
        for head in range(num_heads):
            for token in range(num_tokens):
                query, now = q[row, head, token], start + first + token
                document = int(documents[row, token])
                seen = [chunk for chunk in may if _sees(retrieve_from[row], document, chunk, rules.scope)]
                of_lane = [chunk for chunk in near if chunk.lane == lane_of_row[row]]
                whole = [c for c in of_lane if _sees(lane_of_row[row], document, c, rules.scope)]
                for into, value in zip(
                    (recent_rows, recent_lse),
                    _attend(query, keys, values, whole, now, head, group, attention, "true"),
                    strict=True,
                ):
                    into.append(value)
                of_kv_head = range(head // group * group, (head // group + 1) * group)
                asking = of_kv_head if rules.retrieve_for == "kv_head" else [head]
                asked = {one: q[row, one, token] for one in asking}
                best = _best(asked, keys[:, head // group], seen, now, attention, rules)
                found[row, head, token] = [(chunk.lane, chunk.positions[0]) for chunk in best]
                scores[row, head, token] = [best[chunk] for chunk in best]
                read = _attend(query, keys, values, list(best), now, head, group, attention, rules.position)
                of_chunks = (keys[c.lane, head // group, c.tokens] for c in best)
                logits = [
                    _logits(query, key, [now - at for at in c.positions], head, attention, rules.position)
                    for c, key in zip(best, of_chunks, strict=True)
                ]
                weights[row, head, token] = [torch.exp(each - read[1]).sum().item() for each in logits]
                rows.append(read[0])
                log_sum_exps.append(read[1])
    shape = (num_rows, num_heads, num_tokens)
    recent = Read(torch.stack(recent_rows).view(*shape, dim), torch.stack(recent_lse).view(shape), {})
    values, log_sum_exp = torch.stack(rows).view(*shape, dim), torch.stack(log_sum_exps).view(shape)
    return Read(values, log_sum_exp, found, recent if rules.window_tokens else None, scores, weights)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunks: list[Chunk],
    now: int,
    head: int,
    group: int,
    attention: Attention,
    position: str,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query over the tokens of some chunks, and its log-sum-exp."""
    if not chunks:
        return query.new_zeros(query.shape), query.new_tensor(-math.inf)
    key = torch.cat([keys[c.lane, head // group, c.tokens] for c in chunks])
    value = torch.cat([values[c.lane, head // group, c.tokens] for c in chunks])
    logits = _logits(query, key, [now - at for c in chunks for at in c.positions], head, attention, position)
    return torch.softmax(logits, 0) @ value, torch.logsumexp(logits, 0)


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


def _may_see(visible: Tensor, chunk: Chunk, start: int, rules: Rules) -> bool:
    """Whether a row's `visible`, the chunk right before the segment last, allows a chunk."""
    chunks_back = -((chunk.positions[0] - start) // rules.chunk_size)
    return bool(visible[len(visible) - chunks_back])


def _best(
    queries: Mapping[int, Tensor], keys: Tensor, seen: list[Chunk], now: int, attention: Attention, rules: Rules
) -> dict[Chunk, float]:
    """The top chunks for the queries of some heads by their mean key, read at the distance of the chunk's centre.

    With their scores, the best first.
    """
    if not seen:
        return {}
    means = torch.stack([keys[chunk.lane, chunk.tokens].mean(0) for chunk in seen])
    distances = [now - sum(chunk.positions) / len(chunk.positions) for chunk in seen]
    of_heads = [
        _logits(query.detach(), means, distances, head, attention, rules.position) for head, query in queries.items()
    ]
    scores = torch.stack(of_heads).amax(0).tolist()
    order = sorted(range(len(seen)), key=lambda i: -scores[i])
    return {seen[i]: scores[i] for i in order[: rules.top_k_tokens // rules.chunk_size]}


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


def join(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of several: values `[B, H, T, D]` and log-sum-exps `[B, H, T]`."""
    whole = torch.logsumexp(torch.stack([log_sum_exp for _, log_sum_exp in parts]), 0)
    return sum(torch.exp(lse - whole)[..., None] * values for values, lse in parts), whole  # type: ignore[return-value]


def read_sink(q: Tensor, key: Tensor, value: Tensor, attention: Attention, rules: Rules) -> tuple[Tensor, Tensor]:
    """Values and logit of one token `[Hkv, D]` that lies at the far distance, or where memory ends under `true`."""
    position = f"fixed:{rules.tokens}" if rules.position == "true" else rules.position.replace("clamp", "fixed")
    heads = q.shape[1]
    of_heads = []
    for head in range(heads):
        own = key[head * len(key) // heads][None]
        rows = [_logits(row, own, [0], head, attention, position) for row in q[:, head].flatten(0, 1)]
        of_heads.append(torch.cat(rows).view(len(q), -1))
    values = torch.stack([value[head * len(value) // heads] for head in range(heads)])
    return values[None, :, None].expand_as(q), torch.stack(of_heads, 1)


def fuse(local: Tensor, local_lse: Tensor, read: Read, gate: Tensor, fusion: str) -> Tensor:
    """Mixes local attention `[B, H, T, D]` and memory, per head; a window is part of the local attention."""
    if read.window is not None:
        local, local_lse = join([(local, local_lse), (read.window.values, read.window.log_sum_exp)])
    sees = torch.isfinite(read.log_sum_exp)
    if fusion == "gate":
        share = torch.sigmoid(gate)[None, :, None].expand_as(local_lse)
    else:
        memory_lse = torch.where(sees, read.log_sum_exp, 0.0) + gate[None, :, None]
        share = torch.exp(local_lse - torch.logaddexp(local_lse, memory_lse))
    share = torch.where(sees, share, 1.0)[..., None]
    return share * local + (1 - share) * read.values


class ReferenceSideNet:
    """Backbone, untrained SideNet and memory in float64 (design section 3).

    Args:
        model: The causal LM.
        boundaries: `b_0 .. b_L`.
        memory_layers: Side layers that read memory, counted from 1.
        residual: `interleaved`, `paper` or `paper_normed`.
        fusion: `gate` or `joint`.
        gate: First number of every head.
        rules: How memory is read.
        sink: Token that every query can read, encoded alone; None: there is none.
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
        sink: int | None = None,
    ) -> None:
        self.lm, self.boundaries, self.residual, self.fusion = Reference(model), list(boundaries), residual, fusion
        self.rules = rules
        for parameter in self.lm.model.parameters():
            parameter.requires_grad_(False)
        self.layers = {n: copy.deepcopy(self.lm.layers[b - 1]) for n, b in enumerate(boundaries) if n > 0}
        self.norm = copy.deepcopy(self.lm.final_norm())
        self.gates = {n: torch.full((self.lm.heads,), gate, dtype=torch.float64) for n in memory_layers}
        self.past = {n: Past() for n in memory_layers}
        self.sinks = {n: self._key_and_value(n, torch.tensor([[sink]])) for n in memory_layers if sink is not None}
        self.trained = [p for m in (*self.layers.values(), self.norm) for p in m.parameters()] + [*self.gates.values()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def _inside(self, documents: Tensor) -> Tensor | None:
        return documents if self.rules is not None and self.rules.scope == "document" else None

    def remember(self, tokens: Tensor, *, start: int, documents: Tensor, num_context: int = 0) -> None:
        """Encodes a segment of every lane and remembers it; the first tokens may be left context."""
        after, of_segment = slice(num_context, None), documents[:, num_context:]
        for number, past in self.past.items():
            key, value = self._key_and_value(number, tokens, documents)
            past.add(key[:, :, after], value[:, :, after], start=start, documents=of_segment)

    def _key_and_value(self, number: int, tokens: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What a memory layer is given of a segment, `[B, Hkv, T, D]` each."""
        source, caught = self.boundaries[number], []
        taps = self.lm.taps(tokens, None if documents is None else self._inside(documents))

        def catch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            caught.append((k, v))
            return q

        self.lm.layer(self.lm.layers[source - 1], taps[source - 1], catch)
        return caught[0]

    def logits(
        self, tokens: Tensor, *, start: int = 0, documents: Tensor | None = None, num_context: int = 0
    ) -> Tensor:
        """Logits `[B, T, V]` of a segment, memory read; the first tokens may be left context."""
        documents = torch.zeros_like(tokens) if documents is None else documents
        x, b = [tap[:, num_context:] for tap in self.lm.taps(tokens, self._inside(documents))], self.boundaries
        documents = documents[:, num_context:]
        state = x[b[0]]
        for number, layer in self.layers.items():
            attend = self._attend(number, start, documents)
            if self.residual == "interleaved":
                state = self.lm.layer(layer, state + (x[b[number] - 1] - x[b[number - 1]]), attend)
            else:
                later = x[b[number]]
                if self.residual == "paper_normed" and number == len(self.layers):
                    later = self.lm.normed(later)
                state = self.lm.layer(layer, state, attend) + (later - x[b[number - 1]])
        return self.lm.head(state, self.norm)

    def _attend(self, number: int, start: int, documents: Tensor) -> Any:
        index, heads = self.boundaries[number] - 1, self.lm.heads
        attention = self.lm.attention(index)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = local_logits(q, repeat(k, heads), attention, self._inside(documents))
            local, log_sum_exp = torch.softmax(logits, -1) @ repeat(v, heads), torch.logsumexp(logits, -1)
            if number not in self.past:
                return local
            assert self.rules is not None
            if number in self.sinks:
                key, value = (x[0, :, 0] for x in self.sinks[number])
                local, log_sum_exp = join([(local, log_sum_exp), read_sink(q, key, value, attention, self.rules)])
            read = read_memory(self.past[number], q, attention, self.rules, start=start, documents=documents)
            return fuse(local, log_sum_exp, read, self.gates[number], self.fusion)

        return attend
