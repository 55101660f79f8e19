"""The stored form of a memory: chunks of lanes by their place, and nothing of rings or ranks.

NAME.safetensors   `positions` `[F]`, ascending, and `documents` `[B, F]`, int64; for each memory layer `i`
                   `keys.i` and `values.i` `[Hkv, B, F, c, D]`, unrotated
NAME.json          what that is (`About`)

Chunk keys are recomputed. Where a chunk is kept in a bank follows from its place (`Turn`), so a memory can be read by
other ranks, or into a larger or smaller ring, than it was written from. The first version had no JSON, and its chunks
stood in the order of their slots, with `slots`, `num_chunks` and `next_slot`; it is read, and not written any more.

Shapes: `B` lanes, `Hkv` key/value heads, `F` chunks of each lane, `c` tokens of a chunk, `D` head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.untrusted import Typed, parse_json, read_small, shown, what_is_wrong
from pipeline.errors import CheckpointError
from pipeline.memory.bank import MemoryBank
from pipeline.memory.place import Turn

VERSION: Literal[2] = 2
_ABOUT_BYTES = 1 << 16
_FAR = 2**53  # beyond what any run reads
_LARGE = 2**20
_NUMBERS_AT_ONCE = 2**20  # keys that are read into a bank at once: beside the bank it needs some ten MiB


class About(Typed):
    """What a stored memory says of itself.

    Attributes:
        format: That it is one.
        version: Of this form.
        chunk_size: `c`, tokens.
        dtype: Of keys and values.
        num_layers: Memory layers.
        num_kv_heads: `Hkv`.
        head_dim: `D`.
    """

    format: Literal["longmem memory"] = "longmem memory"
    version: Literal[2] = VERSION
    chunk_size: int = Field(ge=1, le=_LARGE)
    dtype: Literal["float32", "bfloat16", "float16"]
    num_layers: int = Field(ge=1, le=_LARGE)
    num_kv_heads: int = Field(ge=1, le=_LARGE)
    head_dim: int = Field(ge=1, le=_LARGE)


@dataclass(frozen=True)
class Snapshot:
    """What a bank held at one moment, on the host: it can be written while the bank goes on.

    Attributes:
        about: What it is.
        tensors: By their names in the file.
    """

    about: About
    tensors: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Writes both files.

        Args:
            path: `NAME.safetensors`.
        """
        save_file(self.tensors, path)
        path.with_suffix(".json").write_text(self.about.model_dump_json(indent=1) + "\n")


def about_of(bank: MemoryBank) -> About:
    """What is said of a memory that a bank holds."""
    shape = bank.shape
    return About.model_validate(
        {
            "chunk_size": shape.chunk_size,
            "dtype": str(bank.dtype).removeprefix("torch."),
            "num_layers": shape.num_layers,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
        }
    )


def snapshot(bank: MemoryBank) -> Snapshot:
    """Copies what a bank holds.

    Args:
        bank: The bank.

    Returns:
        The filled part, as large on the host as in the bank.
    """
    filled = bank.filled()
    slots = filled.to(bank.device)
    tensors = {
        "positions": torch.from_numpy(bank.positions)[filled],
        "documents": bank.documents[:, slots].cpu().contiguous(),
    }
    for index, store in enumerate(bank.layers):
        tensors[f"keys.{index}"] = store.keys[:, :, slots].cpu().contiguous()
        tensors[f"values.{index}"] = store.values[:, :, slots].cpu().contiguous()
    return Snapshot(about_of(bank), tensors)


class StoredMemory:
    """An open memory of either version. Keys and values stay on the disk until they are asked for.

    Args:
        file: The open safetensors file.
        said: What its JSON says; None: it is of the first version.

    Attributes:
        about: What it is.
        positions: Lane positions of the chunks, ascending, int64 `[F]`.
        documents: int64 `[B, F]`.

    Raises:
        ValueError: It contradicts itself.
    """

    def __init__(self, file: Any, said: About | None) -> None:
        self._file = file
        self.about = _of_first_version(file) if said is None else said
        positions, documents = file.get_tensor("positions"), file.get_tensor("documents")
        are_places = positions.dtype == documents.dtype == torch.int64 and positions.dim() == 1
        if not are_places or documents.shape[1:] != positions.shape:
            raise ValueError("the places of its chunks contradict each other")
        self._order: Tensor = positions.argsort() if said is None else torch.arange(len(positions))
        self.positions, self.documents = positions[self._order], documents[:, self._order]
        self._check()

    def read(self, index: int, *, lanes: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Reads keys and values.

        Args:
            index: Index of the memory layer.
            lanes: Which lanes, int64.
            chunks: Which chunks, as numbers in `positions`, int64.

        Returns:
            Keys and values `[Hkv, lanes, chunks, c, D]`.
        """
        at = (slice(None), lanes[:, None], self._order[chunks])
        return self._file.get_tensor(f"keys.{index}")[at], self._file.get_tensor(f"values.{index}")[at]

    def _check(self) -> None:
        positions, about = self.positions, self.about
        apart = bool((positions.diff() >= about.chunk_size).all())
        if not apart or not bool(((positions >= 0) & (positions <= _FAR)).all()):
            raise ValueError("the places of its chunks contradict each other")
        shape = [about.num_kv_heads, *self.documents.shape, about.chunk_size, about.head_dim]
        found = {name for name in self._file.keys() if "." in name}  # noqa: SIM118 - no dict
        if len(found) != 2 * about.num_layers:
            raise ValueError(f"it has {len(found)} tensors of keys and values for {about.num_layers} layers")
        for name in (f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(about.num_layers)):
            stored = self._file.get_slice(name)
            if stored.get_shape() != shape or str(stored[:0].dtype) != f"torch.{about.dtype}":
                raise ValueError(f"{name} is {stored.get_shape()}, {stored.get_dtype()}, not {shape}, {about.dtype}")


@contextmanager
def open_memory(path: Path) -> Iterator[StoredMemory]:
    """Opens a stored memory and checks all that says what it is.

    Args:
        path: `NAME.safetensors`.

    Yields:
        The memory; it can be read inside the `with`.

    Raises:
        CheckpointError: It is of a version that does not exist yet.
        ValueError: It contradicts itself. Other errors of files and of safetensors: it is none.
    """
    beside = path.with_suffix(".json")
    said = _said(beside) if beside.exists() else None
    with safe_open(path, framework="pt") as file:
        yield StoredMemory(file, said)


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


def _said(path: Path) -> About:
    try:
        content = parse_json(read_small(path, limit=_ABOUT_BYTES))
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version <= VERSION:
            return About.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path.name}: {what_is_wrong(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    raise CheckpointError(
        f"the memory of {path.name} is stored in a newer form",
        got=f"version {shown(version)}",
        expected=f"version {VERSION} or an older one",
        do="read it with the version of LongMem that wrote it",
    )


def _of_first_version(file: Any) -> About:
    """What a memory in the order of its slots is; its ring must be one, though nothing is made of it any more."""
    slots, num_chunks, next_slot = (file.get_tensor(name) for name in ("slots", "num_chunks", "next_slot"))
    inside = bool(((slots >= 0) & (slots < int(num_chunks))).all()) and 0 <= int(next_slot) < max(1, int(num_chunks))
    is_whole = slots.dtype == torch.int64 and slots.shape == file.get_tensor("positions").shape
    if not is_whole or not inside or len(slots.unique()) != len(slots):
        raise ValueError("the places of its chunks contradict each other")
    first = file.get_slice("keys.0")
    heads, _, _, chunk_size, head_dim = first.get_shape()
    layers = sum(name.startswith("keys.") for name in file.keys())  # noqa: SIM118 - no dict
    sizes = {"chunk_size": chunk_size, "num_layers": layers, "num_kv_heads": heads, "head_dim": head_dim}
    return About.model_validate({**sizes, "dtype": str(first[:0].dtype).removeprefix("torch.")})
