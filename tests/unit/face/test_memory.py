"""A memory as a thing: its banks, joined and thinned against a slow reference, stored as other dtypes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from pipeline.errors import LongMemMemoryError
from pipeline.face.contents import Document
from pipeline.face.memory import DTYPES, Memory
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.dtypes import quantized
from pipeline.memory.layer import Geometry
from pipeline.memory.reader import BankReader, MemoryRead
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.positions import PositionEncoding, PositionRule
from tests.unit.face.memories import KIND, assert_alike, chunks_of, memory_of, one_behind_another

CPU = torch.device("cpu")
ROUNDING = 127 * 2.0**-22  # numbers of up to 127 units are divided in float32
FLOATS = {name: dtype for name, dtype in DTYPES.items() if name != "int8"}


def filled_bank(memory: Memory, dtype: torch.dtype) -> MemoryBank:
    """A bank that a stream would have: its chunks appended one by one."""
    kind, count = memory.kind, len(memory.positions)
    shape = BankShape(len(kind.layers), 1, kind.num_kv_heads, kind.head_dim, count, kind.chunk_size)
    bank = MemoryBank(shape, dtype=dtype, device=CPU)
    for number, position in enumerate(memory.positions.tolist()):
        pairs = zip(memory.keys, memory.values, strict=True)
        rows = [(keys[None, :, number].float(), values[None, :, number].float()) for keys, values in pairs]
        documents = memory.of_document[number].expand(1, kind.chunk_size)
        bank.append(rows, start=position, documents=documents)
    return bank


@pytest.mark.parametrize(("stored", "dtype"), list(product(FLOATS, FLOATS.values())))
def test_its_bank_is_one_that_was_filled_by_appending(stored, dtype):
    memory = memory_of({"a": 10, "b": 8, "c": 13}, dtype=stored)
    bank, other = memory.bank(dtype, CPU), filled_bank(memory, dtype)
    assert bank.shape == other.shape and bank.dtype == dtype and bank.end == other.end == 36
    assert bank.positions.tolist() == other.positions.tolist() == [0, 4, 16, 20, 24, 28, 32]
    assert torch.equal(bank.documents, other.documents)
    for own, appended in zip(bank.layers, other.layers, strict=True):
        for name in ("keys", "values", "chunk_keys"):
            assert torch.equal(getattr(own, name), getattr(appended, name)), name


def test_what_is_beyond_fp16_is_its_largest_number_in_a_bank_and_stored():
    memory = memory_of({"a": 8})
    memory.keys[0][0, 0, 0, 0] = 1e6
    assert memory.bank(torch.float16, CPU).layers[0].keys[0, 0, 0, 0, 0] == 65504
    assert memory.to("fp16").keys[0][0, 0, 0, 0] == 65504


def test_a_bank_copies_nothing_and_is_made_once_until_the_memory_changes():
    memory = memory_of({"a": 8, "b": 8})
    bank = memory.bank(torch.float32, CPU)
    for store, keys, values in zip(bank.layers, memory.keys, memory.values, strict=True):
        assert store.keys.data_ptr() == keys.data_ptr() and store.values.data_ptr() == values.data_ptr()
    assert memory.bank(torch.float32, "cpu") is bank
    assert memory.bank(torch.bfloat16, CPU) is not bank
    memory.forget("a")
    assert memory.bank(torch.float32, CPU) is not bank
    assert bank.positions.tolist() == [0, 4, 8, 12] and memory.bank(torch.float32, CPU).positions.tolist() == [8, 12]


def test_a_bank_of_it_is_never_written():
    memory = memory_of({"a": 8})
    bank, rows = memory.bank(torch.float32, CPU), torch.ones(1, 2, 4, 4)
    before = chunks_of(memory)
    one = torch.tensor([0])
    for write in (
        lambda: bank.append([(rows, rows)] * 2, start=8, documents=torch.zeros(1, 4, dtype=torch.int64)),
        lambda: bank.put(0, rows[0][:, None, None], rows[0][:, None, None], lanes=one, slots=one),
        bank.reset,
        lambda: bank.label(one, one[None], slots=one, next_slot=0),
    ):
        with pytest.raises(ValueError, match="this bank is a memory that many may read: it is never written"):
            write()
    assert chunks_of(memory) == before and bank.positions.tolist() == [0, 4]


def read(bank: MemoryBank, query: torch.Tensor, *, start: int, **reading: Any) -> MemoryRead:
    """Queries `[B, 2, T, 4]` that all read one lane."""
    geometry = Geometry(PositionEncoding(torch.tensor([1.0, 0.2]), 1.0, None), 0.5)
    documents = torch.zeros(query.shape[0], query.shape[2], dtype=torch.int64)
    asked = Reading(start, documents, lane_of_row=torch.zeros(len(query), dtype=torch.int64), **reading)
    settings = ReadSettings(num_tokens=64, top_k_chunks=2, rule=PositionRule.parse("clamp:16"), window_tokens=8)
    return BankReader(bank, settings, [geometry] * 2, asked).read(1, query)


def test_many_rows_read_what_each_would_read_alone():
    memory, query = memory_of({"a": 10, "b": 8, "c": 13}), torch.randn(3, 2, 8, 4)
    before = chunks_of(memory)
    bank, other = memory.bank(torch.float32, CPU), filled_bank(memory, torch.float32)
    together = read(bank, query, start=40)
    assert bool(together.log_sum_exp.isfinite().all())
    for row in range(3):
        alone = read(other, query[row : row + 1], start=40)
        torch.testing.assert_close(together.values[row : row + 1], alone.values)
    assert chunks_of(memory) == before


def test_a_bank_of_no_chunk_gives_nothing_to_read():
    memory = memory_of({"a": 3})
    assert len(memory) == 3 and memory.bank(torch.float32, CPU).end == 0
    assert memory.documents() == [("a", 3, 24)]
    for visible in (None, torch.ones(2, 16, dtype=torch.bool)):
        found = read(memory.bank(torch.float32, CPU), torch.randn(2, 2, 4, 4), start=8, visible=visible)
        assert bool((found.values == 0).all()) and bool((found.log_sum_exp == -torch.inf).all())


def test_documents_say_what_is_remembered_and_what_it_takes():
    memory = memory_of({"a": 10, "b": 2, "c": 13})
    # A chunk: 4 tokens of 2 layers, keys and values, 2 heads of 4 floats; 4 token ids, a place and a document.
    chunk = 4 * 2 * 2 * 2 * 4 * 4 + 6 * 8
    assert memory.documents() == [("a", 8, 2 * chunk), ("b", 0, 0), ("c", 13, 3 * chunk + 8)]
    assert len(memory) == 8 + 13 and memory.num_bytes == 5 * chunk + 8
    whole = [*memory.keys, *memory.values, memory.positions, memory.of_document, memory.tokens, memory.rest]
    assert memory.num_bytes == sum(tensor.nbytes for tensor in whole)
    small = memory.to("int8")  # a byte a number, and four for each token and head
    assert small.num_bytes == 5 * (4 * 2 * 2 * 2 * (4 + 4) + 6 * 8) + 8
    assert repr(small) == f"Memory(21 tokens of 3 documents, int8, {small.num_bytes:,} bytes)"


MANY: list[dict[str, int]] = [{"a": 10, "b": 9}, {}, {"c": 3}, {"d": 8, "e": 1, "f": 21}, {"g": 16}]


@pytest.mark.parametrize("align", [None, 4, 8, 20])
def test_merge_is_one_behind_another(align):
    memories = [memory_of(names, seed=seed) for seed, names in enumerate(MANY)]
    before = [chunks_of(memory) for memory in memories]
    merged = Memory.merge(memories, align=align)
    expected, end = one_behind_another(memories, align or 4)
    assert chunks_of(merged) == expected and merged.end == end
    assert [source.name for source in merged.sources] == list("abcdefg")
    assert [source.num_tokens for source in merged.sources] == [10, 9, 3, 8, 1, 21, 16]
    assert all(source.start % (align or 4) == 0 for source in (merged.sources[2], merged.sources[3], merged.sources[6]))
    assert [chunks_of(memory) for memory in memories] == before
    appended = memory_of(MANY[0])
    for memory in memories[1:]:
        appended.append(memory, align=align)
    assert_alike(appended, merged)


def test_the_rest_is_that_of_the_last_document():
    first, second = memory_of({"a": 10}), memory_of({"b": 7}, seed=1)
    merged = Memory.merge([first, second])
    assert merged.rest.tolist() == second.rest.tolist() and merged.end == 12 + 7 and len(merged) == 8 + 7
    first.append(memory_of({}))
    assert len(first.rest) == 2 and first.end == 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_appended_is_stored_as_the_memory_is(dtype):
    first, second = memory_of({"a": 8}, dtype=dtype), memory_of({"b": 8}, seed=1)
    first.append(second)
    assert first.dtype == dtype and second.dtype == "fp32"
    assert chunks_of(first)[2:] == [(name, place + 8, *more) for name, place, *more in chunks_of(second.to(dtype))]


@pytest.mark.parametrize("name", "abcd")
def test_forget_takes_out_one_document_and_leaves_the_others_where_they_are(name):
    memory = memory_of({"a": 10, "b": 3, "c": 16, "d": 9})
    expected = [chunk for chunk in chunks_of(memory) if chunk[0] != name]
    memory.forget(name)
    assert chunks_of(memory) == expected
    assert [source.name for source in memory.sources] == [each for each in "abcd" if each != name]
    # c begins at 24 and fills 4 chunks, d begins at 40.
    assert (memory.end, len(memory.rest)) == ((40, 0) if name == "d" else (49, 1))


def test_all_documents_can_be_forgotten_and_others_remembered():
    memory = memory_of({"a": 10, "b": 3, "c": 16})
    for name in "bca":
        memory.forget(name)
    assert len(memory) == 0 and memory.end == 0 and memory.documents() == []
    other = memory_of({"a": 9})
    memory.append(other)
    assert_alike(memory, other)


def test_inner_gaps_are_kept_when_a_thinned_memory_is_appended():
    memory, thinned = memory_of({"a": 8}), memory_of({"b": 12, "c": 8, "d": 4, "e": 8})  # at 0, 16, 24, 32
    thinned.forget("b")
    thinned.forget("d")
    memory.append(thinned, align=8)
    assert memory.positions.tolist() == [0, 4, 8, 12, 24, 28]
    memory = memory_of({"a": 8})
    memory.append(thinned, align=32)  # c began at 16 of 32
    assert memory.positions.tolist() == [0, 4, 48, 52, 64, 68]


def test_int8_is_off_by_half_a_unit_at_most():
    keys = torch.tensor([[[[127.0, -63.6, 0.4, 0.0], [2.54, -2.54, 0.031, -0.009], [0, 0, 0, 0], [1e-44, 0, 0, 0]]]])
    whole, scales = quantized(keys)
    assert whole[0, 0, :3].tolist() == [[127, -64, 0, 0], [127, -127, 2, 0], [0, 0, 0, 0]]
    assert scales[0, 0, :3].tolist() == pytest.approx([1, 0.02, 0])
    memory = memory_of({"a": 400})
    small = memory.to("int8")
    for float_ones, whole_ones, units in (
        (memory.keys, small.keys, small.key_scales),
        (memory.values, small.values, small.value_scales),
    ):
        for numbers, whole, scales in zip(float_ones, whole_ones, units, strict=True):
            assert torch.equal(scales, numbers.abs().amax(-1) / 127)
            off = (whole.double() * scales.double()[..., None] - numbers.double()).abs()
            assert bool((off <= scales.double()[..., None] / 2 * (1 + ROUNDING)).all())
            assert float(off.max() / scales.max()) > 0.3  # it is not the numbers themselves
    bank = small.bank(torch.float32, CPU)
    assert torch.equal(bank.layers[1].values[:, 0], small.values[1].float() * small.value_scales[1][..., None])


def test_bfloat16_in_float32_and_back():
    memory = memory_of({"a": 30}, dtype="bf16")
    assert_alike(memory.to("fp32").to("bf16"), memory)
    assert memory.to("bf16").keys[0].data_ptr() == memory.keys[0].data_ptr()


def test_quantizing_what_was_quantized_changes_nothing():
    small = memory_of({"a": 100}, dtype="int8")
    again = small.to("fp32").to("int8")
    for one, other in zip(small.keys, again.keys, strict=True):
        assert torch.equal(one, other)


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "backbone": (
        {"backbone": "b" * 64},
        "the memory has another backbone; got: b{64}; expected: a{64}; do: load the model that it was made with, or ",
    ),
    "layers": (
        {"layers": (3, 6)},
        r"the memory has other memory layers; got: \[3, 6\]; expected: \[3, 5\]; do: memorize the texts again",
    ),
    "heads": ({"num_kv_heads": 1}, "another number of key/value heads; got: 1; expected: 2; do: memorize"),
    "size": ({"head_dim": 8}, "another head size; got: 8; expected: 4; do: memorize"),
    "chunks": ({"chunk_size": 2}, "another chunk size; got: 2; expected: 4; do: .* set memory.chunk_size"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_memory_is_refused(name):
    change, words = FOREIGN[name]
    memory, foreign = memory_of({"a": 9}), memory_of({"b": 8}, kind=replace(KIND, **change))
    before = chunks_of(memory)
    memory.check(KIND)
    for refuse in (
        lambda: foreign.check(KIND),
        lambda: memory.append(foreign),
        lambda: Memory.merge([memory, foreign]),
    ):
        with pytest.raises(LongMemMemoryError, match=words):
            refuse()
    assert chunks_of(memory) == before and len(memory.rest) == 1


def test_documents_that_are_called_alike_are_refused():
    memory = memory_of({"a": 9, "b": 8})
    words = "documents of these memories are called alike; got: 1 name.s. twice, such as b; .* do: .*names=..."
    with pytest.raises(LongMemMemoryError, match=words):
        memory.append(memory_of({"c": 8, "b": 8}))
    assert [source.name for source in memory.sources] == ["a", "b"]


def test_a_document_that_is_not_there_cannot_be_forgotten():
    memory = memory_of({"alice": 9, "bob": 8})
    words = (
        r"no document of this memory is called so; got: alise; expected: one of its 2 name\(s\), such as alice; do: doc"
    )
    with pytest.raises(LongMemMemoryError, match=words):
        memory.forget("alise")
    with pytest.raises(LongMemMemoryError, match=r"got: a; expected: one of its 0 name\(s\); do: documents\(\) lists"):
        memory_of({}).forget("a")


def test_other_bad_input_is_refused():
    memory = memory_of({"a": 9})
    with pytest.raises(LongMemMemoryError, match="there is nothing to merge; got: no memory; do: give at least one"):
        Memory.merge([])
    for align in (0, -4, 6):
        words = f"documents cannot begin there; got: align={align}; expected: a multiple of the chunk size 4; do: give"
        with pytest.raises(LongMemMemoryError, match=words):
            memory.append(memory_of({"b": 8}), align=align)
    words = r"a memory is not stored so; got: 'int4'; expected: fp32 \| bf16 \| fp16 \| int8; do: give one of them"
    with pytest.raises(LongMemMemoryError, match=words):
        memory.to("int4")
    memory.values[1][0, 0, 0, 0] = float("nan")
    words = (
        "cannot be stored as int8; got: it holds numbers that are not finite; expected: finite keys and values; do: "
    )
    with pytest.raises(LongMemMemoryError, match=words):
        memory.to("int8")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"keys": []}, "0 layers of keys, not 2"),
    "fewer values": ({"values": [torch.zeros(2, 4, 4, 4)]}, "1 layers of values, not 2"),
    "another shape": (
        {"keys": [torch.zeros(2, 3, 4, 4)] * 2},
        r"keys is \(2, 3, 4, 4\), torch.float32, not \(2, 4, 4, 4\)",
    ),
    "two dtypes": ({"values": [torch.zeros(2, 4, 4, 4).half()] * 2}, "values is .*float16, not .*float32"),
    "no dtype": ({"keys": [torch.zeros(2, 4, 4, 4).int()] * 2}, r"keys are torch.int32, none of fp32 \| bf16"),
    "no scales": (
        {"keys": [torch.zeros(2, 4, 4, 4).char()] * 2, "values": [torch.zeros(2, 4, 4, 4).char()] * 2},
        "0 layers of key_scales",
    ),
    "tokens": ({"tokens": torch.zeros(4, 4)}, "tokens is .*float32, not .*int64"),
    "rest": ({"rest": torch.zeros(4, dtype=torch.int64)}, r"rest is \(4,\), torch.int64, not fewer than 4 int64"),
    "places": ({"positions": torch.tensor([4, 0, 16, 20])}, "places of its chunks"),
    "no multiple": ({"positions": torch.tensor([0, 5, 16, 20])}, "places of its chunks"),
    "overlap": ({"positions": torch.tensor([0, 0, 16, 20])}, "places of its chunks"),
    "outside": ({"positions": torch.tensor([0, 8, 16, 20])}, "places of its chunks"),
    "documents": ({"of_document": torch.tensor([0, 0, 1, 2])}, "places of its chunks"),
    "negative": ({"of_document": torch.tensor([-1, 0, 1, 1])}, "places of its chunks"),
    "end": ({"end": 24}, "places of its chunks"),
    "alike": ({"sources": [Document("a", 0, 10), Document("a", 16, 9)]}, "two of its documents are called alike"),
    "no name": ({"sources": [Document("", 0, 10), Document("a", 16, 9)]}, "a name of 0 characters is not of 1 to 1000"),
    "surrogate": ({"sources": [Document("\ud800", 0, 10), Document("a", 16, 9)]}, "no text that can be written"),
    "long name": ({"sources": [Document("x" * 1001, 0, 10), Document("a", 16, 9)]}, "a name of 1001 characters"),
    "unordered": ({"sources": [Document("a", 16, 10), Document("b", 0, 9)]}, "places of its chunks"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contents_that_contradict_each_other_are_refused(name):
    change, words = CONTRADICTIONS[name]
    memory = memory_of({"a": 10, "b": 9})
    with pytest.raises(ValueError, match=words):
        replace(memory, **change)
