"""A bank put together from stored memories, whichever ranks wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.memory.bank import MemoryBank
from pipeline.memory.file import StoredMemory, about_of
from pipeline.memory.place import Turn

_NUMBERS_AT_ONCE = 2**20  # keys that are read into a bank at once: beside the bank it needs some ten MiB


@dataclass(frozen=True)
class Part:
    """Some lanes of a stored memory, and the lanes of a bank that they become.

    Attributes:
        memory: The stored memory.
        lanes: Its lanes, int64.
        rows: The bank's, as many.
    """

    memory: StoredMemory
    lanes: Tensor
    rows: Tensor


def fill(bank: MemoryBank, parts: Sequence[Part], turn: Turn, *, num_tokens: int) -> None:
    """Makes a bank what it would be if its rank had read the lanes itself: the same chunks in the same slots.

    Reads some MiB at a time: nothing like a whole layer stands beside the bank.

    Args:
        bank: The bank; what it held is forgotten.
        parts: Where the past of its lanes is stored; all of it for each lane, whoever kept it.
        turn: Which segments of the lanes the bank keeps.
        num_tokens: `M`, how far back a lane must be there.

    Raises:
        ValueError: What is stored is of another kind than what the bank holds, or not all of it is there. The bank is
            as it was.
    """
    size, num_chunks = bank.shape.chunk_size, bank.shape.num_chunks
    for part in parts:
        if part.memory.about != about_of(bank):
            raise ValueError(f"the stored memory does not fit a bank of {bank.shape} in {bank.dtype}")
    stored = torch.cat([part.memory.positions for part in parts]).unique()
    end = int(stored[-1]) + size if len(stored) else 0
    oldest = max(0, end - num_tokens)
    if len(stored) and int(stored[0]) > oldest:
        raise ValueError(f"the stored memory goes back to token {int(stored[0])} of {end}, not to {oldest}")
    # Those of its own that the ring has not written over.
    following, before = (turn.num_before(x, chunk_size=size) for x in (torch.tensor(end), stored))
    kept = turn.holds(stored) & (before >= following - num_chunks)
    positions, slots = stored[kept], before[kept] % num_chunks
    documents = torch.zeros(bank.shape.num_lanes, len(positions), dtype=torch.int64)
    missing = torch.ones_like(documents, dtype=torch.bool)
    moves = []
    for part in parts:
        chunks = torch.isin(part.memory.positions, positions).nonzero()[:, 0]
        places = torch.searchsorted(positions, part.memory.positions[chunks])
        documents[part.rows[:, None], places] = part.memory.documents[part.lanes[:, None], chunks]
        missing[part.rows[:, None], places] = False
        moves.append((part, chunks, slots[places]))
    if bool(missing.any()):
        raise ValueError(f"the stored memory lacks {int(missing.sum())} chunks that other lanes have")
    bank.label(positions, documents, slots=slots, next_slot=int(following) % num_chunks)
    for layer in range(bank.shape.num_layers):
        for part, chunks, into in moves:
            _copy(bank, layer, part, chunks=chunks, slots=into)


def _copy(bank: MemoryBank, layer: int, part: Part, *, chunks: Tensor, slots: Tensor) -> None:
    shape = bank.shape
    each = shape.num_kv_heads * len(part.rows) * shape.chunk_size * shape.head_dim
    at_once = max(1, _NUMBERS_AT_ONCE // each)
    for some, into in zip(chunks.split(at_once), slots.split(at_once), strict=True):
        keys, values = part.memory.read(layer, lanes=part.lanes, chunks=some)
        bank.put(layer, keys, values, lanes=part.rows, slots=into)
