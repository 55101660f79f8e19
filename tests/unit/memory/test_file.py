"""The stored form: what the file says, read in pieces, into rings of other sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import LongMemMemoryError
from pipeline.memory import fill as fill_module
from pipeline.memory.bank import MIXED, BankShape, MemoryBank
from pipeline.memory.file import open_memory, snapshot
from pipeline.memory.fill import Part, fill
from pipeline.memory.place import Turn
from tests.shards import assert_same, in_slot_order

SHAPE = BankShape(num_layers=2, num_lanes=2, num_kv_heads=3, head_dim=4, num_chunks=6, chunk_size=2)
SEGMENT = 4
TURN = Turn(0, 1, SEGMENT)


def empty(**changes: int) -> MemoryBank:
    return MemoryBank(replace(SHAPE, **changes), dtype=torch.float32, device=torch.device("cpu"))


def filled(num_segments: int, **changes: int) -> MemoryBank:
    """Segments of two chunks: those of a document in lane 0, in lane 1 a chunk of two documents each."""
    bank, generator = empty(**changes), torch.Generator().manual_seed(0)
    for number in range(num_segments):
        pairs = torch.randn(SHAPE.num_layers, 2, 2, 3, SEGMENT, 4, generator=generator)
        documents = torch.tensor([[number] * 4, [number] * 3 + [number + 1]])
        bank.append([(keys, values) for keys, values in pairs], start=SEGMENT * number, documents=documents)
    return bank


def load(path: Path, bank: MemoryBank, *, num_tokens: int = 8) -> None:
    lanes = torch.arange(bank.shape.num_lanes)
    with open_memory(path) as memory:
        fill(bank, [Part(memory, lanes, lanes)], TURN, num_tokens=num_tokens)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.safetensors"


def test_the_file_says_what_it_is_and_nothing_of_rings(path: Path) -> None:
    bank = filled(4)  # eight chunks into six slots
    snapshot(bank).write(path)
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": "longmem memory",
        "version": 2,
        "chunk_size": 2,
        "dtype": "float32",
        "num_layers": 2,
        "num_kv_heads": 3,
        "head_dim": 4,
    }
    tensors = load_file(path)
    assert tensors.keys() == {"positions", "documents", "keys.0", "keys.1", "values.0", "values.1"}
    assert tensors["positions"].tolist() == [4, 6, 8, 10, 12, 14]
    assert tensors["documents"].tolist() == [[1, 1, 2, 2, 3, 3], [1, MIXED, 2, MIXED, 3, MIXED]]
    slots = [2, 3, 4, 5, 0, 1]
    for layer, store in enumerate(bank.layers):
        assert torch.equal(tensors[f"keys.{layer}"], store.keys[:, :, slots])
        assert torch.equal(tensors[f"values.{layer}"], store.values[:, :, slots])


def test_both_versions_are_read_alike(path: Path, tmp_path: Path) -> None:
    bank, old = filled(4), tmp_path / "old.safetensors"
    snapshot(bank).write(path)
    save_file(in_slot_order(bank), old)
    whole, lanes, chunks = snapshot(bank).tensors, torch.tensor([1]), torch.tensor([5, 0, 3])
    for name in (path, old):
        with open_memory(name) as memory:
            assert memory.about == snapshot(bank).about
            assert memory.positions.tolist() == [4, 6, 8, 10, 12, 14]
            assert torch.equal(memory.documents, whole["documents"])
            for layer in range(2):
                keys, values = memory.read(layer, lanes=lanes, chunks=chunks)
                assert torch.equal(keys, whole[f"keys.{layer}"][:, 1:][:, :, chunks])
                assert torch.equal(values, whole[f"values.{layer}"][:, 1:][:, :, chunks])


@pytest.mark.parametrize("num_segments", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("num_chunks", [4, 5, 6, 9])
def test_a_bank_with_another_ring_becomes_what_it_would_be(path: Path, num_segments: int, num_chunks: int) -> None:
    """As far back as was stored: a larger ring would have remembered more."""
    snapshot(filled(num_segments)).write(path)
    bank, own = empty(num_chunks=num_chunks), filled(num_segments, num_chunks=num_chunks)
    for more in range(3):
        if more:
            rows = torch.full((2, 3, SEGMENT, 4), float(more))
            for each in (bank, own):
                documents = torch.full((2, SEGMENT), more)
                each.append([(rows, rows)] * 2, start=SEGMENT * (num_segments + more), documents=documents)
        else:
            load(path, bank)
        stored_from = max(0, SEGMENT * num_segments - 2 * SHAPE.num_chunks)
        got, expected = snapshot(bank).tensors, snapshot(own).tensors
        kept = expected["positions"] >= stored_from
        assert got["positions"].tolist() == expected["positions"][kept].tolist()
        assert torch.equal(got["documents"], expected["documents"][:, kept])
        for layer in range(2):
            assert torch.equal(got[f"keys.{layer}"], expected[f"keys.{layer}"][:, :, kept])
            assert torch.equal(got[f"values.{layer}"], expected[f"values.{layer}"][:, :, kept])
        assert bank.next_slot == own.next_slot


def test_less_than_is_to_be_remembered_is_refused(path: Path) -> None:
    snapshot(filled(4)).write(path)
    load(path, empty(), num_tokens=12)
    with pytest.raises(ValueError, match="the stored memory goes back to token 4 of 16, not to 3"):
        load(path, empty(), num_tokens=13)


def test_memory_is_read_a_little_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer may be as large as what the host has left."""
    source, bank, put = filled(4), empty(), MemoryBank.put
    snapshot(source).write(path)
    sizes = []

    def note(self: MemoryBank, layer: int, keys: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        sizes.append(keys.shape[2])
        put(self, layer, keys, *args, **kwargs)

    monkeypatch.setattr(MemoryBank, "put", note)
    monkeypatch.setattr(
        fill_module, "_NUMBERS_AT_ONCE", 4 * 3 * 2 * 2 * 4 + 1
    )  # of four chunks: heads, lanes, tokens, head
    load(path, bank)
    assert sizes == [4, 2] * 2
    assert_same(in_slot_order(bank), in_slot_order(source))


def test_a_newer_form_is_refused_in_words(path: Path) -> None:
    snapshot(filled(1)).write(path)
    said = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**said, "version": 3, "chunk_size": "varied"}))
    words = (
        "the memory of mine.json is stored in a newer form; got: version 3; expected: version 2 or an older one; "
        "do: read it with the version of LongMem that wrote it"
    )
    with pytest.raises(LongMemMemoryError, match=words), open_memory(path):
        pass
