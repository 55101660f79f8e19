"""Memories joined, thinned and stored otherwise: each gives a new one, and shares with the old what need not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import LongMemMemoryError
from pipeline.face.contents import DTYPES, OF_LAYERS, Contents
from pipeline.memory.dtypes import dequantized, quantized, within

Held = TypeVar("Held", bound=Contents)


def joined(memories: Sequence[Held], *, align: int | None = None) -> Held:
    """The documents of memories, one behind another.

    Args:
        memories: At least one, stored alike.
        align: Tokens: the documents of each begin at the next multiple; None: `c`.

    Returns:
        The first with the chunks of the others behind its own.

    Raises:
        LongMemMemoryError: One is foreign, or two documents are called alike.
    """
    first, *others = memories
    size = first.kind.chunk_size
    align = size if align is None else align
    if align < 1 or align % size:
        raise LongMemMemoryError(
            "documents cannot begin there",
            got=f"align={align}",
            expected=f"a multiple of the chunk size {size}",
            do="give the tokens of a segment, or leave it out",
        )
    sources, shifts, indices = list(first.sources), [0], [0]
    rest, end = first.rest, first.end
    for other in others:
        other.kind.check(first.kind)
        # Where documents begin inside a segment of theirs, so they do now.
        origin = other.sources[0].start // align * align if other.sources else 0
        shifts.append(-(-end // align) * align - origin)
        indices.append(len(sources))
        sources += [replace(document, start=document.start + shifts[-1]) for document in other.sources]
        if other.sources:
            rest, end = other.rest, other.end + shifts[-1]
    _check_names([document.name for document in sources])
    of_layers: dict[str, Any] = {name: _in_a_row([getattr(memory, name) for memory in memories]) for name in OF_LAYERS}
    return replace(
        first,
        sources=sources,
        positions=torch.cat([memory.positions + shift for memory, shift in zip(memories, shifts, strict=True)]),
        of_document=torch.cat([memory.of_document + index for memory, index in zip(memories, indices, strict=True)]),
        tokens=torch.cat([memory.tokens for memory in memories]),
        rest=rest,
        end=end,
        **of_layers,
    )


def _in_a_row(of_memories: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    device = of_memories[0][0].device if of_memories[0] else None
    layers = zip(*of_memories, strict=True)
    return [torch.cat([chunks.to(device) for chunks in layer], dim=1) for layer in layers]


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise LongMemMemoryError(
            "documents of these memories are called alike",
            got=f"{len(twice)} name(s) twice, such as {twice[0][:200]}",
            expected="different names, by which a document can be forgotten",
            do="memorize one of them under other names (names=...), or forget one first",
        )


def without(memory: Held, index: int) -> Held:
    """A memory without one of its documents.

    Args:
        memory: The memory.
        index: Of the document in `sources`.

    Returns:
        What is left; places stay, so that there is a gap, but where it was the last.
    """
    kept = memory.of_document != index
    positions, of_document = memory.positions[kept], memory.of_document[kept]
    sources = [document for number, document in enumerate(memory.sources) if number != index]
    rest, end = memory.rest, memory.end
    if index == len(sources):  # what comes next comes right behind what is left
        of_chunks = int(positions[-1]) + memory.kind.chunk_size if len(positions) else 0
        rest, end = rest[:0], max(of_chunks, sources[-1].start if sources else 0)
    return replace(
        memory,
        sources=sources,
        positions=positions,
        of_document=of_document - (of_document > index).long(),
        tokens=memory.tokens[kept],
        rest=rest,
        end=end,
        **memory.of_layers(lambda chunks: chunks[:, kept.to(chunks.device)]),
    )


def stored_as(memory: Held, dtype: str) -> Held:
    """A memory whose keys and values are stored otherwise.

    Args:
        memory: The memory.
        dtype: A name of `DTYPES`.

    Returns:
        The memory, with the same tensors if it is stored so.

    Raises:
        LongMemMemoryError: There is no such dtype, or int8 is asked of numbers that are not finite.
    """
    if dtype not in DTYPES:
        raise LongMemMemoryError(
            "a memory is not stored so", got=repr(dtype)[:200], expected=" | ".join(DTYPES), do="give one of them"
        )
    if memory.keys[0].dtype == DTYPES[dtype]:
        return replace(memory)
    if dtype == "int8":
        return _as_int8(memory)
    pairs = [floats(memory, layer, DTYPES[dtype]) for layer in range(len(memory.keys))]
    keys, values = zip(*pairs, strict=True)
    return replace(memory, keys=keys, values=values, key_scales=(), value_scales=())


def _as_int8(memory: Held) -> Held:
    try:
        keys, values = ([quantized(chunks) for chunks in each] for each in (memory.keys, memory.values))
    except ValueError as error:
        raise LongMemMemoryError(
            "the memory cannot be stored as int8",
            got=error,
            expected="finite keys and values",
            do="memorize the texts with the model in fp32 or bf16, whose largest numbers are larger than fp16's",
        ) from error
    return replace(
        memory,
        keys=[whole for whole, _ in keys],
        values=[whole for whole, _ in values],
        key_scales=[scales for _, scales in keys],
        value_scales=[scales for _, scales in values],
    )


def floats(memory: Contents, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer in a floating dtype.

    Args:
        memory: The memory.
        layer: Index of the memory layer.
        dtype: Wanted.

    Returns:
        `[Hkv, F, c, D]`: the memory's own tensors where they are of that dtype.
    """
    pair = memory.keys[layer], memory.values[layer]
    if pair[0].dtype == torch.int8:
        scales = memory.key_scales[layer], memory.value_scales[layer]
        return dequantized(pair[0], scales[0], dtype), dequantized(pair[1], scales[1], dtype)
    if pair[0].dtype == dtype:
        return pair
    return within(pair[0], dtype).to(dtype), within(pair[1], dtype).to(dtype)
