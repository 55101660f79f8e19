"""Banks of all ranks of a job, filled as training fills them, and what of them can be seen."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.memory.bank import EMPTY, BankShape, MemoryBank
from pipeline.memory.place import ShardPlace, Turn, ring_chunks

NUM_LANES, SEGMENT, CHUNK = 4, 8, 2
KV_HEADS, HEAD_DIM, LAYERS = 2, 3, 2


def place_of(rank: int, *, world_size: int, group_size: int, num_tokens: int) -> ShardPlace:
    """The part of the memory that a rank of a job keeps."""
    per_group = NUM_LANES * group_size // world_size
    first = rank // group_size * per_group
    return ShardPlace(
        lanes=tuple(range(first, first + per_group)),
        num_lanes=NUM_LANES,
        turn=Turn(rank % group_size, group_size, SEGMENT),
        num_tokens=num_tokens,
    )


def empty_bank(place: ShardPlace) -> MemoryBank:
    """A rank's bank."""
    num_chunks = ring_chunks(place.num_tokens, segment_tokens=SEGMENT, chunk_size=CHUNK, group_size=place.turn.size)
    shape = BankShape(LAYERS, len(place.lanes), KV_HEADS, HEAD_DIM, num_chunks, CHUNK)
    return MemoryBank(shape, dtype=torch.bfloat16, device=torch.device("cpu"))


def filled_bank(place: ShardPlace, *, num_segments: int) -> MemoryBank:
    """A rank's bank after some segments of every lane, of which it has written its own."""
    bank = empty_bank(place)
    for index in range(place.turn.rank, num_segments, place.turn.size):
        documents = torch.stack([_of_lane(lane, index)[0] for lane in place.lanes])
        rows = torch.stack([_of_lane(lane, index)[1] for lane in place.lanes])  # [B, layers, 2, Hkv, T, D]
        memory = [(rows[:, layer, 0], rows[:, layer, 1]) for layer in range(LAYERS)]
        bank.append(memory, start=index * SEGMENT, documents=documents)
    return bank


def in_slot_order(bank: MemoryBank) -> dict[str, torch.Tensor]:
    """What the first version of the stored form says of a bank, written down as it was."""
    filled = torch.from_numpy(np.flatnonzero(bank.positions != EMPTY))
    state = {
        "slots": filled,
        "num_chunks": torch.tensor(bank.shape.num_chunks),
        "next_slot": torch.tensor(bank.next_slot),
        "positions": torch.from_numpy(bank.positions)[filled],
        "documents": bank.documents[:, filled],
    }
    for index, store in enumerate(bank.layers):
        state[f"keys.{index}"] = store.keys[:, :, filled].contiguous()
        state[f"values.{index}"] = store.values[:, :, filled].contiguous()
    return state


def visible(bank: MemoryBank, *, end: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Everything in a bank that a query at or after a place can see, slot by slot, and where it goes on."""
    slots = torch.from_numpy(np.flatnonzero(bank.positions >= max(0, end - num_tokens)))
    found = {
        "slots": slots,
        "positions": torch.from_numpy(bank.positions)[slots],
        "documents": bank.documents[:, slots],
        "next_slot": torch.tensor(bank.next_slot),
    }
    for index, store in enumerate(bank.layers):
        for name in ("keys", "values", "chunk_keys"):
            found[f"{name}.{index}"] = getattr(store, name)[:, :, slots]
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def _of_lane(lane: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * lane + index)
    documents = torch.randint(3, (SEGMENT,), generator=generator)
    return documents, torch.randn(LAYERS, 2, KV_HEADS, SEGMENT, HEAD_DIM, generator=generator)
