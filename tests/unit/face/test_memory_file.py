"""Saving and opening: bad files in words, kills, full disks, many readers, nothing read before its time."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import LongMemMemoryError
from pipeline.face.memory import DTYPES, Memory
from pipeline.files import partial_of, the_only_writer
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.file import snapshot
from pipeline.metrics.peak import forget_peak
from tests.fault_injection import die_at
from tests.ranks import forks
from tests.unit.face.memories import KIND, assert_alike, memory_of

NAMES = {"a": 10, 'ö 好 "\\ \n': 8, "c": 13}
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mine.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_comes_back_bit_for_bit(path, dtype):
    for documents in (NAMES, {"a": 3}, {}):
        memory = memory_of(documents, dtype=dtype)
        memory.save(path)
        loaded = Memory.load(path, kind=KIND)
        assert_alike(loaded, memory)
        assert loaded.documents() == memory.documents()
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        whole, other = (each.bank(torch.float32, CPU).layers for each in (memory, loaded))
        assert all(torch.equal(one.chunk_keys, two.chunk_keys) for one, two in zip(whole, other, strict=True))


def test_a_loaded_memory_is_changed_and_saved_onto_its_own_file(path):
    memory, other = memory_of(NAMES), memory_of({"z": 9}, seed=1)
    memory.save(path)
    loaded = Memory.load(path)
    for each in (memory, loaded):
        each.append(other)
        each.forget("c")
    assert_alike(loaded, memory)
    loaded.save(path)
    assert_alike(loaded, memory)
    assert_alike(Memory.load(path), memory)


def test_what_the_file_says(path):
    memory_of({"a": 10}, dtype="int8").save(path)
    tensors = load_file(path)
    scales = {f"{kind}.{layer}" for kind in ("keys", "values", "key_scales", "value_scales") for layer in (0, 1)}
    assert tensors.keys() == {"positions", "documents", "tokens", "rest"} | scales
    assert tensors["keys.0"].shape == (2, 1, 2, 4, 4) and tensors["key_scales.0"].shape == (2, 1, 2, 4)
    assert json.loads(header(path)["__metadata__"]["longmem"]) == {
        "format": "longmem memory",
        "version": 3,
        "chunk_size": 4,
        "dtype": "int8",
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "backbone": "a" * 64,
        "layers": [3, 5],
        "documents": [{"name": "a", "start": 0, "num_tokens": 10}],
        "end": 10,
    }


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def test_a_memory_of_another_model_is_refused_when_it_is_opened(path):
    memory_of(NAMES).save(path)
    with pytest.raises(
        LongMemMemoryError, match="the memory has another backbone; got: a{64}; expected: b{64}; do: load"
    ):
        Memory.load(path, kind=replace(KIND, backbone="b" * 64))


def say(path: Path, change: Callable[[dict[str, Any]], object], *, with_hash: bool = True) -> None:
    """Has the file say something else of itself, with a hash that fits."""
    from pipeline.memory.file import _hash

    said, tensors = json.loads(header(path)["__metadata__"]["longmem"]), load_file(path)
    change(said)
    text = json.dumps(said)
    save_file(tensors, path, metadata={"longmem": text, "sha256": _hash(text, tensors) if with_hash else "0" * 64})


SAID: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 2": (lambda said: said.update(version=2), "version is 2"),
    "version true": (lambda said: said.update(version=True), "version is True"),
    "a new field": (lambda said: said.update(weather="fine"), "weather is 'fine' .Extra inputs are not permitted"),
    "a new field of a document": (lambda said: said["documents"][0].update(author="x"), "documents.0.author is 'x'"),
    "no backbone": (lambda said: said.pop("backbone"), "backbone is missing"),
    "no document": (lambda said: said.update(documents=[]), "places of its chunks and documents contradict"),
    "another layer": (lambda said: said.update(layers=[1, 2, 3]), "2 layers of keys, not 3"),
    "more layers": (lambda said: said.update(num_layers=3), "4 tensors of keys and values for 3 layers"),
    "another dtype": (lambda said: said.update(dtype="int8"), "4 tensors of keys and values for 2 layers"),
    "two alike": (lambda said: said["documents"][1].update(name="a"), "two of its documents are called alike"),
    "far": (lambda said: said.update(end=2**60), "end is "),
    "before": (lambda said: said["documents"][1].update(start=-1), "documents.1.start is -1"),
}


@pytest.mark.parametrize("name", SAID)
def test_a_file_that_contradicts_itself_is_refused(path, name):
    memory_of({"a": 10, "b": 9}).save(path)
    change, words = SAID[name]
    say(path, change)
    words = (
        rf"the file is damaged, or no memory; got: .*mine.safetensors .*{words}.*; expected: a whole file .*; do: copy"
    )
    with pytest.raises(LongMemMemoryError, match=words):
        Memory.load(path)


def test_a_newer_form_is_refused_in_words(path):
    memory_of(NAMES).save(path)
    say(path, lambda said: said.update(version=4, weather="fine"))
    words = (
        "the memory of mine.safetensors is stored in a newer form; got: version 4; expected: version 3 or an older "
        "one; do: read it with the version of LongMem that wrote it"
    )
    with pytest.raises(LongMemMemoryError, match=words):
        Memory.load(path)


def test_a_hash_that_differs_is_damage(path):
    memory_of(NAMES).save(path)
    say(path, lambda said: None, with_hash=False)
    with pytest.raises(LongMemMemoryError, match="mine.safetensors is not what was written: its hash differs"):
        Memory.load(path)


def test_what_is_no_memory_is_refused(path, tmp_path):
    with pytest.raises(LongMemMemoryError, match="the memory cannot be read; got: .*FileNotFound.*; do: name a file"):
        Memory.load(path)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(
            LongMemMemoryError, match="this is no file; got: .*; expected: a memory that save.. wrote; do: "
        ):
            Memory.load(place)
    path.write_text("a poem")
    with pytest.raises(LongMemMemoryError, match="the file is damaged, or no memory; got: .*SafetensorError"):
        Memory.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(LongMemMemoryError, match="the file is damaged, or no memory; got: .*slots"):
        Memory.load(path)
    bank = MemoryBank(BankShape(1, 2, 2, 4, 3, 4), dtype=torch.float32, device=CPU)
    snapshot(bank).write(path)
    words = "this is a rank's part of a training's memory; got: .*; expected: a memory that save.. wrote; do: memorize"
    with pytest.raises(LongMemMemoryError, match=words):
        Memory.load(path)
    memory_of(NAMES).save(path)  # beside a JSON of something else
    assert_alike(Memory.load(path), memory_of(NAMES))


def test_a_file_that_was_cut_anywhere_is_refused(path):
    memory_of(NAMES, dtype="int8").save(path)
    content = path.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for size in [*range(0, length, 7), *range(length, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(LongMemMemoryError, match="the file is damaged, or no memory; got: "):
            Memory.load(path)
    path.write_bytes(content + b"more")
    with pytest.raises(LongMemMemoryError, match="the file is damaged, or no memory; got: "):
        Memory.load(path)


def test_a_header_with_flipped_bits_is_refused_or_says_the_same(path):
    """A space for a tab, beside the header's braces, is no other content."""
    memory = memory_of(NAMES)
    memory.save(path)
    content = path.read_bytes()
    length, numbers = 8 + struct.unpack("<Q", content[:8])[0], random.Random(0)
    refused = 0
    for place in range(length):
        flipped = bytearray(content)
        flipped[place] ^= 1 << numbers.randrange(8)
        if place % 3 == 0:
            flipped[numbers.randrange(length)] = numbers.randrange(256)
        if flipped == content:
            continue
        path.write_bytes(flipped)
        try:
            assert_alike(Memory.load(path), memory)
        except LongMemMemoryError:
            refused += 1
    assert refused > 0.98 * length


def test_flipped_places_and_tokens_are_refused(path):
    memory_of(NAMES).save(path)
    content, found = path.read_bytes(), header(path)
    begin = len(content) - max(each["data_offsets"][1] for name, each in found.items() if name != "__metadata__")
    for name in ("positions", "documents", "tokens", "rest"):
        first, last = found[name]["data_offsets"]
        for place in range(begin + first, begin + last):
            flipped = bytearray(content)
            flipped[place] ^= 4
            path.write_bytes(flipped)
            with pytest.raises(LongMemMemoryError, match="is damaged, or no memory; got: "):
                Memory.load(path)


def killed(work: Callable[[], object], *, at: int, folder: Path, note: Path) -> bool:
    """Does something in a process that dies before one of its file operations; whether it came so far."""
    child = os.fork()
    if child == 0:
        die_at(at, str(folder), note)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the work itself failed: {status}"
    return status == signal.SIGKILL


def test_a_writer_killed_at_any_file_operation_leaves_a_whole_file(path, tmp_path):
    folder = path.parent / "memories"
    folder.mkdir()
    path = folder / "mine.safetensors"
    old, new = memory_of({"a": 10}), memory_of({"b": 90}, seed=1)
    at, seen = 1, set()
    while True:
        old.save(path)
        assert [found.name for found in folder.iterdir()] == [path.name]  # what the killed one left is gone
        if not killed(lambda: new.save(path), at=at, folder=folder, note=tmp_path / "note"):
            break
        loaded = Memory.load(path)
        assert_alike(loaded, old if loaded.sources[0].name == "a" else new)
        seen.add((loaded.sources[0].name, partial_of(path).exists()))
        at += 1
    assert seen >= {("a", False), ("a", True)} and at > 3
    assert_alike(Memory.load(path), new)


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(path):
    """It writes 58 MB again and again."""
    old, new = memory_of({"a": 10}), memory_of({"b": 400_000}, seed=1)
    numbers, left = random.Random(0), 0
    for _ in range(8):
        old.save(path)
        child = os.fork()
        try:
            while child == 0:
                new.save(path)
        finally:
            if child == 0:
                os._exit(1)
        time.sleep(numbers.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        left += partial_of(path).exists()
        loaded = Memory.load(path)
        assert_alike(loaded, old if loaded.sources[0].name == "a" else new)
    old.save(path)
    assert left > 0 and [found.name for found in path.parent.iterdir()] == [path.name]


def test_one_writer_at_a_time(path):
    memory = memory_of({"a": 10})
    memory.save(path)
    words = (
        "another process is writing this memory; got: .*mine.safetensors; do: wait for it, or save under another name"
    )
    with the_only_writer(path), pytest.raises(LongMemMemoryError, match=words):
        memory_of({"b": 10}).save(path)
    assert_alike(Memory.load(path), memory)
    assert partial_of(path).exists()  # of the writer that was killed inside
    memory_of({"b": 10}).save(path)
    assert not partial_of(path).exists()


def test_a_full_disk_leaves_the_old_file(path):
    memory = memory_of({"a": 10})
    memory.save(path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    words = r"cannot be written; what was there before is untouched; got: .*; needed: at least \d\d,\d+ bytes, free: "
    try:
        with pytest.raises(LongMemMemoryError, match=words):
            memory_of({"b": 400}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert_alike(Memory.load(path), memory)


@pytest.mark.parametrize("name", ["", "no/folder/a.safetensors", "x" * 300, "file/a.safetensors"])
def test_places_where_nothing_can_be_written_are_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    words = (
        "the memory cannot be written; .*; got: .*; expected: a file in a folder .*; do: name another path, make its"
    )
    with pytest.raises(LongMemMemoryError, match=words):
        memory_of({"a": 10}).save(tmp_path / name)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


# Numbers of 32 bits: 2 layers, keys and values, 2 heads of 64, for each of the tokens: 128 MiB.
LARGE_KIND, LARGE_TOKENS = replace(KIND, head_dim=64), 2**16
SMALL_PART = 0.1
"""Of the file, that opening it may keep in memory: its token ids are an 1/128, and libraries take some MiB."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    memory_of({"a": LARGE_TOKENS}, kind=LARGE_KIND).save(path)
    return path


def resident(of: str = "Rss") -> int:
    """Bytes of this process in memory: all, or `Private_Dirty`, its own that are no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{of}:")).split()[1])


def open_and_read(path: str) -> tuple[int, int, float]:
    """In a fresh process: bytes of it in memory that loading adds, that a bank and reading it add of its own, a sum."""
    Memory.load(path)  # imports and first uses
    forget_peak(CPU)
    before, own = resident(), resident("Private_Dirty")
    memory = Memory.load(path)
    loading = resident() - before
    layers = memory.bank(torch.float32, CPU).layers
    total = sum(float(store.keys.double().sum() + store.values.double().sum()) for store in layers[:1])
    del layers
    forget_peak(CPU)
    return loading, resident("Private_Dirty") - own, total


def test_loading_reads_nothing_before_its_time(large):
    size = large.stat().st_size
    with forks().Pool(1) as pool:
        loading, own, _ = pool.apply(open_and_read, (str(large),))
    assert size > 2**27 and loading < SMALL_PART * size, f"{loading:,} of {size:,} bytes"
    # What a bank adds of its own are the chunk keys: one for each four tokens' keys, an eighth of the whole.
    assert own < (0.125 + SMALL_PART) * size, f"{own:,} of {size:,} bytes"


def test_many_processes_read_one_file_at_once(large):
    with forks().Pool(4) as pool:
        found = pool.map(open_and_read, [str(large)] * 4, chunksize=1)
    assert len({total for _, _, total in found}) == 1


def test_a_file_that_is_replaced_does_not_disturb_its_readers(path):
    old, new = memory_of({"a": 40_000}), memory_of({"b": 8}, seed=1)
    old.save(path)
    opened = Memory.load(path)
    new.save(path)
    assert_alike(opened, old)  # it is read only here
    assert_alike(Memory.load(path), new)
    path.unlink()
    assert torch.equal(opened.bank(torch.float32, CPU).layers[1].values[:, 0], old.values[1])


def test_writing_into_what_was_loaded_does_not_change_the_file(path):
    memory_of({"a": 40}).save(path)
    Memory.load(path).keys[0].zero_()
    assert_alike(Memory.load(path), memory_of({"a": 40}))
