"""The bank by hand: sizes, chunk keys, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.memory.bank import EMPTY, MIXED, BankShape, MemoryBank

SHAPE = BankShape(num_layers=2, num_lanes=1, num_kv_heads=1, head_dim=2, num_chunks=3, chunk_size=2)


def make(dtype: torch.dtype = torch.float32) -> MemoryBank:
    return MemoryBank(SHAPE, dtype=dtype, device=torch.device("cpu"))


def segment(num_tokens: int, *, value: float = 1.0, layers: int = 2) -> list[tuple[Tensor, Tensor]]:
    key = torch.arange(num_tokens * 2.0).view(1, 1, num_tokens, 2) * value
    return [(key + layer, -key) for layer in range(layers)]


def test_bytes_are_those_of_its_tensors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bank = make(dtype)
        held = sum(t.nbytes for store in bank.layers for t in (store.keys, store.values, store.chunk_keys))
        assert SHAPE.bytes(dtype) == held


def test_keys_are_stored_as_they_come_and_chunk_keys_are_their_means() -> None:
    bank = make()
    bank.append(segment(4), start=0, documents=torch.zeros((1, 4), dtype=torch.int64))
    assert bank.layers[0].keys[0, 0, :2].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert bank.layers[0].values[0, 0, 0].tolist() == [[0, -1], [-2, -3]]
    assert bank.layers[0].chunk_keys[0, 0, :2].tolist() == [[1, 2], [5, 6]]
    assert bank.layers[1].chunk_keys[0, 0, :2].tolist() == [[2, 3], [6, 7]]


def test_chunk_keys_are_means_of_what_is_stored() -> None:
    """1 + 1/512 has no place in bfloat16: the mean is that of the rounded keys, so that a reload finds the same."""
    bank = make(torch.bfloat16)
    key = torch.full((1, 1, 2, 2), 1 + 1 / 512)
    bank.append([(key, key)] * 2, start=0, documents=torch.zeros((1, 2), dtype=torch.int64))
    assert bank.layers[0].chunk_keys[0, 0, 0].tolist() == [1.0, 1.0]
    assert bank.layers[0].chunk_keys.dtype == torch.float32


def test_a_chunk_of_two_documents_is_mixed() -> None:
    bank = make()
    bank.append(segment(6), start=0, documents=torch.tensor([[5, 5, 5, 6, 6, 6]]))
    assert bank.documents.tolist() == [[5, MIXED, 6]]


@pytest.mark.parametrize("num_tokens", [3, 8])
def test_a_segment_that_does_not_fit_is_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"a segment of {num_tokens} tokens does not fit 3 x 2"):
        make().append(segment(num_tokens), start=0, documents=torch.zeros((1, num_tokens), dtype=torch.int64))


def test_a_segment_that_does_not_follow_is_refused() -> None:
    bank, documents = make(), torch.zeros((1, 4), dtype=torch.int64)
    bank.append(segment(4), start=0, documents=documents)
    with pytest.raises(ValueError, match="2 layers from 3 do not continue 2 up to 4"):
        bank.append(segment(4), start=3, documents=documents)
    with pytest.raises(ValueError, match="1 layers from 4 do not continue 2 up to 4"):
        bank.append(segment(4, layers=1), start=4, documents=documents)


def test_chunks_are_put_into_the_slots_that_are_said_and_nothing_else_is_left() -> None:
    bank = make()
    bank.append(segment(6), start=0, documents=torch.zeros((1, 6), dtype=torch.int64))
    keys, slots = torch.tensor([[[[[8.0, 1], [2, 5]], [[4, 4], [4, 6]]]]]), torch.tensor([2, 0])
    bank.label(torch.tensor([4, 8]), torch.tensor([[5, MIXED]]), slots=slots, next_slot=1)
    bank.put(1, keys, -keys, lanes=torch.tensor([0]), slots=slots)
    assert bank.positions.tolist() == [8, EMPTY, 4]
    assert bank.documents.tolist() == [[MIXED, EMPTY, 5]]
    assert (bank.filled().tolist(), bank.next_slot, bank.end) == ([2, 0], 1, 10)
    assert torch.equal(bank.layers[1].keys[0, 0, slots], keys[0, 0])
    assert torch.equal(bank.layers[1].values[0, 0, slots], -keys[0, 0])
    assert bank.layers[1].chunk_keys[0, 0, slots].tolist() == [[5, 3], [4, 5]]
    bank.append(segment(2), start=10, documents=torch.zeros((1, 2), dtype=torch.int64))
    assert bank.positions.tolist() == [8, 10, 4]


def test_a_bank_of_fp16_keeps_what_is_too_large_for_it_as_its_largest_number() -> None:
    bank = make(torch.float16)
    bank.append(segment(2, value=1e5), start=0, documents=torch.zeros((1, 2), dtype=torch.int64))
    store = bank.layers[0]
    assert store.keys[0, 0, 0].tolist() == [[0, 65504], [65504, 65504]]
    assert torch.isfinite(store.chunk_keys).all()
