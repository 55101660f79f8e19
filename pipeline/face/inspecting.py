"""Inspects a memory: reads a prompt with it and without, and finds out what each token looked up.

Shapes: `n` tokens of the prompt, `H` query heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.face import checks
from pipeline.face.inspection import (
    Inspection,
    LayerGates,
    ReadChunk,
    RememberedDocument,
    RememberedText,
    SeenToken,
)
from pipeline.face.looking import Lane, LookedUp, LookUps, chosen_layers, text_of, watching
from pipeline.face.memory import Memory
from pipeline.face.model import LongMemForCausalLM
from pipeline.face.page import CHUNKS_PER_TOKEN
from pipeline.face.remembering import begun, start_of
from pipeline.model.longmem import LongMem
from pipeline.model.rows import Rows

_CUT = "\ufffd"  # what a tokenizer gives for a piece of a character
_LONGEST_CHARACTER = 4  # bytes, and so tokens at most


@torch.no_grad()
def inspect(
    model: LongMemForCausalLM,
    memories: Sequence[Memory],
    tokens: Tensor,
    tokenizer: Any,
    *,
    title: str,
    names: Sequence[str] = (),
    layers: Collection[int] | None = None,
    chunks_per_token: int = CHUNKS_PER_TOKEN,
) -> Inspection:
    """Reads a prompt with memory and without.

    Args:
        model: The model.
        memories: What comes before the prompt, one after another, as `forward` takes them for a row.
        tokens: The prompt, int64 `[n]`.
        tokenizer: Turns ids into text.
        title: What it is called.
        names: What the memories are called.
        layers: Memory layers whose chunks and gates are shown, counted from 1; None: all.
        chunks_per_token: How many chunks of a token are kept, those of the largest share.

    Returns:
        What memory changed, and what was read.

    Raises:
        DataError: The prompt is empty or has ids outside the vocabulary, a layer is no memory layer, or the model
            reads no memory.
        LongMemMemoryError: A memory is of another model.
    """
    longmem = model.longmem
    checks.check_ids(tokens[None], model.config.vocab_size)
    for memory in memories:
        memory.check(model.memory_kind)
    if not longmem.settings.memory.enabled:
        raise DataError("the model reads no memory", got="memory.enabled false", do="load one that does")
    shown = chosen_layers(longmem.sidenet, layers)
    start = start_of(longmem, memories)
    lane = Lane(memories, start, tokenizer, own_name="this prompt")
    rows = begun(longmem, start, reads_memory=True)
    watch = LookUps(shown, most=chunks_per_token)
    with watching(longmem.sidenet, shown, watch.note):
        read = _losses(longmem, rows, tokens)
    plain = _losses(longmem, begun(longmem, start_of(longmem, ()), reads_memory=False), tokens)
    first = lane.place
    lane.read += tokens.tolist()
    size = longmem.settings.memory.chunk_size
    seen = []
    for number, (text, kept) in enumerate(zip(token_texts(tokenizer, tokens.tolist()), watch.kept, strict=True)):
        chunks = [_chunk(lane, looked_up, at=first + number, size=size) for looked_up in kept]
        with_memory, without = (read[number - 1], plain[number - 1]) if number else (None, None)
        seen.append(SeenToken(text, with_memory, without, chunks, watch.num_read[number] - len(kept)))
    return Inspection(
        title=title,
        model=_told(model),
        memory=_remembered(memories, names),
        fusion=longmem.settings.sidenet.fusion,
        tokens=seen,
        gates=_gates(longmem, watch),
        perplexity_with=_perplexity(read),
        perplexity_without=_perplexity(plain),
    )


def _losses(model: LongMem, rows: Rows, tokens: Tensor) -> list[float]:
    """Of predicting every token but the first, nats."""
    hidden = rows.read(tokens[None].to(model.device))
    if len(tokens) == 1:
        return []
    losses: list[float] = model.losses(hidden[:, :-1], tokens[None, 1:].to(model.device))[0].tolist()
    return losses


def _chunk(lane: Lane, looked_up: LookedUp, *, at: int, size: int) -> ReadChunk:
    """What a token read that stands at a place of the lane."""
    share, place, score, layer, heads = looked_up
    document, text = lane.chunk(place, size)
    return ReadChunk(text, document, at - place, score, share, layer, heads)


def _gates(model: LongMem, watch: LookUps) -> list[LayerGates]:
    fusions = model.sidenet.fusions
    return [
        LayerGates(layer, torch.cat(weights, dim=1).mean(dim=1).tolist(), fusions[layer].gate.float().tolist())
        for layer, weights in watch.weights.items()
    ]


def _perplexity(losses: Sequence[float]) -> float | None:
    return math.exp(sum(losses) / len(losses)) if losses else None


def _remembered(memories: Sequence[Memory], names: Sequence[str]) -> RememberedText:
    documents = [RememberedDocument(each.name, each.num_tokens) for memory in memories for each in memory.documents()]
    return RememberedText(list(names), documents)


def _told(model: LongMemForCausalLM) -> str:
    """The model in a line."""
    backbone = Path(model.config.backbone_name).name or model.config.backbone_config.model_type
    memory = model.longmem.settings.memory
    fusions = model.longmem.sidenet.fusions
    return (
        f"{backbone}; SideNet of {model.longmem.sidenet.layout.num_layers} layers, {len(fusions)} of which read "
        f"memory, {memory.top_k_chunks} chunks of {memory.chunk_size} tokens each"
    )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token, so that all together are the whole; of a character of several, the last has it.

    Args:
        tokenizer: Turns ids into text.
        ids: The tokens.

    Returns:
        A text for each; a token that is but a piece of a character has U+FFFD.
    """
    found: list[str] = []
    shown = 0
    for number in range(len(ids)):
        # With the token before: some tokenizers drop the space that a text begins with.
        before, whole = (text_of(tokenizer, ids[max(0, shown - 1) : end]) for end in (shown, number + 1))
        text = whole[len(before) :]
        if text.endswith(_CUT) and number + 1 - shown < _LONGEST_CHARACTER and number + 1 < len(ids):
            found.append(_CUT)
            continue
        found.append(text)
        shown = number + 1
    return found
