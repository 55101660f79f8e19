"""Small memories of random numbers, and a slow, obvious one: lists of tokens by document and place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.face.contents import Document, MemoryKind
from pipeline.face.memory import Memory

KIND = MemoryKind(backbone="a" * 64, layers=(3, 5), num_kv_heads=2, head_dim=4, chunk_size=4)


def memory_of(
    documents: dict[str, int], *, seed: int = 0, kind: MemoryKind = KIND, segment: int = 8, dtype: str = "fp32"
) -> Memory:
    """Documents of so many tokens, each begun at a segment; of all but the last, what fills no chunk is not kept.

    Args:
        documents: Tokens of each.
        seed: Of its numbers.
        kind: Of what.
        segment: Tokens.
        dtype: As which it is stored.

    Returns:
        The memory.
    """
    size, generator = kind.chunk_size, torch.Generator().manual_seed(seed)
    sources, positions, of_document, end = [], [], [], 0
    for index, (name, count) in enumerate(documents.items()):
        start = -(-end // segment) * segment
        sources.append(Document(name, start, count))
        chunks = range(start, start + count // size * size, size)
        positions += list(chunks)
        of_document += [index] * len(chunks)
        end = start + count
    rest = list(documents.values())[-1] % size if documents else 0
    shape = (len(kind.layers), 2, kind.num_kv_heads, len(positions), size, kind.head_dim)
    keys, values = torch.randn(shape, generator=generator).unbind(1)
    return Memory(
        kind,
        sources,
        positions=torch.tensor(positions, dtype=torch.int64),
        of_document=torch.tensor(of_document, dtype=torch.int64),
        tokens=torch.randint(1000, (len(positions), size), generator=generator),
        rest=torch.randint(1000, (rest,), generator=generator),
        keys=list(keys),
        values=list(values),
        end=end,
    ).to(dtype)


def assert_alike(left: Memory, right: Memory) -> None:
    """Bit for bit."""
    assert (left.kind, left.sources, left.end, left.dtype) == (right.kind, right.sources, right.end, right.dtype)
    for name in ("positions", "of_document", "tokens", "rest"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert len(getattr(left, name)) == len(getattr(right, name)), name
        for one, other in zip(getattr(left, name), getattr(right, name), strict=True):
            assert torch.equal(one, other), name


Chunk = tuple[str, int, list[int], list[float]]


def chunks_of(memory: Memory) -> list[Chunk]:
    """Of each chunk its document, its place, its tokens, and all its numbers."""
    found = []
    for number, (position, index) in enumerate(
        zip(memory.positions.tolist(), memory.of_document.tolist(), strict=True)
    ):
        numbers = [tensor[:, number].flatten() for each in (memory.keys, memory.values) for tensor in each]
        found.append(
            (memory.sources[index].name, position, memory.tokens[number].tolist(), torch.cat(numbers).tolist())
        )
    return found


def one_behind_another(memories: Sequence[Memory], align: int) -> tuple[list[Chunk], int]:
    """What joining them should give, chunk by chunk, and where it ends."""
    found, end = [], 0
    for number, memory in enumerate(memories):
        shift = 0
        if number and memory.sources:
            while (memory.sources[0].start // align) * align + shift < end:
                shift += align
        if not number and memory.sources:
            assert memory.sources[0].start == 0
        for name, position, tokens, numbers in chunks_of(memory):
            found.append((name, position + shift, tokens, numbers))
        if memory.sources:
            end = memory.end + shift
    return found, end
