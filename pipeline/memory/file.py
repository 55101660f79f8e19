"""The stored form of a memory: chunks of lanes by their place, and nothing of rings or ranks.

NAME.safetensors   `positions` `[F]`, ascending, and `documents` `[B, F]`, int64; for each memory layer `i`
                   `keys.i` and `values.i` `[Hkv, B, F, c, D]`, unrotated

What that is stands beside it or in it:

version 2, a rank's part of a checkpoint: NAME.json (`About`)
version 3, a memory by itself, of one lane: the file's metadata (`AboutWhole`), with a hash over it and over all that is
           no key or value. The file also has `tokens` `[F, c]` and `rest` `[< c]`, int64, and where keys and values are
           int8 their scales, `key_scales.i` and `value_scales.i`, float32 `[Hkv, B, F, c]`

Chunk keys are recomputed. Where a chunk is kept in a bank follows from its place (`Turn`), so a memory can be read by
other ranks, or into a larger or smaller ring, than it was written from. The first version had no JSON, and its chunks
stood in the order of their slots, with `slots`, `num_chunks` and `next_slot`; it is read, and not written any more.

Shapes: `B` lanes, `Hkv` key/value heads, `F` chunks of each lane, `c` tokens of a chunk, `D` head size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.untrusted import Typed, parse_json, read_small, shown, what_is_wrong
from pipeline.errors import LongMemMemoryError
from pipeline.memory.bank import MemoryBank
from pipeline.memory.writing import write_tensors

VERSION: Literal[2] = 2
VERSION_WHOLE: Literal[3] = 3
LONGEST_NAME = 1000
"""Characters of a document's name."""
_ABOUT_BYTES = 1 << 16
_ABOUT_WHOLE_BYTES = 1 << 26  # names of a million documents; a safetensors header ends at 100 MB
_FAR = 2**53  # beyond what any run reads
_LARGE = 2**20
_ABOUT, _HASH = "longmem", "sha256"
_HASHED = ("positions", "documents", "tokens", "rest")
_Said = TypeVar("_Said", bound="_Sizes")


class _Sizes(Typed):
    format: Literal["longmem memory"] = "longmem memory"
    chunk_size: int = Field(ge=1, le=_LARGE)
    num_layers: int = Field(ge=1, le=_LARGE)
    num_kv_heads: int = Field(ge=1, le=_LARGE)
    head_dim: int = Field(ge=1, le=_LARGE)


class About(_Sizes):
    """What a rank's part of a memory says of itself.

    Attributes:
        format: That it is one.
        version: Of this form.
        chunk_size: `c`, tokens.
        dtype: Of keys and values.
        num_layers: Memory layers.
        num_kv_heads: `Hkv`.
        head_dim: `D`.
    """

    version: Literal[2] = VERSION
    dtype: Literal["float32", "bfloat16", "float16"]


class StoredDocument(Typed):
    """A document of a memory.

    Attributes:
        name: What it is called; no two are called alike.
        start: Lane position of its first token.
        num_tokens: How many were read of it.
    """

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=LONGEST_NAME)
    start: int = Field(ge=0, le=_FAR)
    num_tokens: int = Field(ge=0, le=_FAR)


class AboutWhole(_Sizes):
    """What a memory that is a thing of its own says of itself, besides what `About` says.

    Attributes:
        backbone: Hash of the model whose keys and values these are.
        layers: The layers of it, counted from 1.
        documents: What was read.
        end: Lane position after the last token.
    """

    model_config = ConfigDict(extra="forbid")
    version: Literal[3] = VERSION_WHOLE
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    backbone: str = Field(min_length=1, max_length=_ABOUT_BYTES)
    layers: list[int] = Field(max_length=_LARGE)
    documents: list[StoredDocument] = Field(max_length=_LARGE)
    end: int = Field(ge=0, le=_FAR)


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


def write_whole(path: Path, about: AboutWhole, tensors: Mapping[str, Tensor]) -> None:
    """Writes a memory that is a thing of its own.

    Args:
        path: The file; what was there is overwritten as it is written.
        about: What it is.
        tensors: By their names in the file.

    Raises:
        ValueError: It has more documents than a file may name.
        OSError: It cannot be written.
    """
    text = about.model_dump_json()
    if len(text) > _ABOUT_WHOLE_BYTES:
        raise ValueError(f"the names of its {len(about.documents):,} documents have {len(text):,} characters")
    write_tensors(path, tensors, metadata={_ABOUT: text, _HASH: _hash(text, tensors)})


class StoredMemory:
    """An open memory of any version. Keys and values stay on the disk until they are asked for.

    Args:
        file: The open safetensors file.
        said: What it says that it is; None: it is of the first version.

    Attributes:
        about: What it is.
        positions: Lane positions of the chunks, ascending, int64 `[F]`.
        documents: int64 `[B, F]`.

    Raises:
        ValueError: It contradicts itself.
    """

    def __init__(self, file: Any, said: About | AboutWhole | None) -> None:
        self._file = file
        self.about = _of_first_version(file) if said is None else said
        positions, documents = file.get_tensor("positions"), file.get_tensor("documents")
        are_places = positions.dtype == documents.dtype == torch.int64 and positions.dim() == 1
        if not are_places or documents.shape[1:] != positions.shape:
            raise ValueError("the places of its chunks contradict each other")
        self._order: Tensor = positions.argsort() if said is None else torch.arange(len(positions))
        self.positions, self.documents = positions[self._order], documents[:, self._order]
        self._check()

    def whole(self) -> dict[str, Tensor]:
        """All tensors of a version 3 as they lie in the file, which stays mapped: read from it when they are used."""
        return {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 - no dict

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
        tokens = [about.num_kv_heads, *self.documents.shape, about.chunk_size]
        kinds = {kind: ([*tokens, about.head_dim], about.dtype) for kind in ("keys", "values")}
        if about.dtype == "int8":
            kinds |= {kind: (tokens, "float32") for kind in ("key_scales", "value_scales")}
        found = {name for name in self._file.keys() if "." in name}  # noqa: SIM118 - no dict
        if len(found) != len(kinds) * about.num_layers:
            raise ValueError(f"it has {len(found)} tensors of keys and values for {about.num_layers} layers")
        for kind, (shape, dtype) in kinds.items():
            for name in (f"{kind}.{layer}" for layer in range(about.num_layers)):
                stored = self._file.get_slice(name)
                if stored.get_shape() != shape or str(stored[:0].dtype) != f"torch.{dtype}":
                    raise ValueError(f"{name} is {stored.get_shape()}, {stored.get_dtype()}, not {shape}, {dtype}")


@contextmanager
def open_memory(path: Path) -> Iterator[StoredMemory]:
    """Opens a stored memory and checks all that says what it is.

    Args:
        path: `NAME.safetensors`.

    Yields:
        The memory; it can be read inside the `with`.

    Raises:
        LongMemMemoryError: It is of a version that does not exist yet.
        ValueError: It contradicts itself. Other errors of files and of safetensors: it is none.
    """
    with safe_open(path, framework="pt") as file:
        yield StoredMemory(file, _said(path, file))


def _said(path: Path, file: Any) -> About | AboutWhole | None:
    metadata, beside = file.metadata() or {}, path.with_suffix(".json")
    if _ABOUT in metadata:
        text = metadata[_ABOUT]
        if len(text) > _ABOUT_WHOLE_BYTES:
            raise ValueError(f"{path.name} says more than {_ABOUT_WHOLE_BYTES:,} characters of itself")
        said = _parsed(text, AboutWhole, name=path.name, version=VERSION_WHOLE)
        if metadata.get(_HASH) != _hash(text, {name: file.get_tensor(name) for name in _HASHED}):
            raise ValueError(f"{path.name} is not what was written: its hash differs")
        return said
    if not beside.exists():
        return None
    return _parsed(lambda: read_small(beside, limit=_ABOUT_BYTES), About, name=beside.name, version=VERSION)


def _parsed(text: str | Callable[[], str], kind: type[_Said], *, name: str, version: int) -> _Said:
    try:
        content = parse_json(text if isinstance(text, str) else text())
        found = content.get("version") if isinstance(content, dict) else None
        if type(found) is not int or found <= version:
            return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{name}: {what_is_wrong(error)}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    raise LongMemMemoryError(
        f"the memory of {name} is stored in a newer form",
        got=f"version {shown(found)}",
        expected=f"version {version} or an older one",
        do="read it with the version of LongMem that wrote it",
    )


def _hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in _HASHED:
        tensor = tensors[name]
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


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
