"""What a memory consists of, and what must hold of it.

Shapes: `Hkv` key/value heads, `F` remembered chunks, `c` tokens of a chunk, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import LongMemMemoryError
from pipeline.memory.file import LONGEST_NAME

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
OF_LAYERS = ("keys", "values", "key_scales", "value_scales")
"""The tensors that there is one of for each memory layer; all have their chunks in dimension 1."""


@dataclass(frozen=True)
class MemoryKind:
    """What a memory must have in common with the model that reads it.

    Attributes:
        backbone: Identity of the backbone (`pipeline.backbone.backbone.identity`).
        layers: Backbone layers, counted from 1, whose keys and values these are.
        num_kv_heads: `Hkv`.
        head_dim: `D`.
        chunk_size: `c`, tokens.
    """

    backbone: str
    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    chunk_size: int

    def check(self, wanted: MemoryKind) -> None:
        """Makes sure that a memory of this kind can be read by a model that makes another, or joined with one.

        Args:
            wanted: The other kind.

        Raises:
            LongMemMemoryError: They differ.
        """
        told = {
            "backbone": (
                "another backbone",
                "load the model that it was made with, or memorize the texts again with this one",
            ),
            "layers": ("other memory layers", "memorize the texts again with this model"),
            "num_kv_heads": ("another number of key/value heads", "memorize the texts again with this model"),
            "head_dim": ("another head size", "memorize the texts again with this model"),
            "chunk_size": (
                "another chunk size",
                "memorize the texts again, or set memory.chunk_size to that of the memory",
            ),
        }
        for name, (words, do) in told.items():
            own, other = getattr(self, name), getattr(wanted, name)
            if own != other:
                as_told = [list(each) if name == "layers" else each for each in (own, other)]
                raise LongMemMemoryError(f"the memory has {words}", got=as_told[0], expected=as_told[1], do=do)


@dataclass(frozen=True)
class Document:
    """A document that was read.

    Attributes:
        name: What it is called.
        start: Lane position of its first token, a multiple of `c`.
        num_tokens: How many were read of it; as many are remembered, or fewer.
    """

    name: str
    start: int
    num_tokens: int


@dataclass(eq=False)
class Contents:
    """Keys and values of documents, each chunk with its tokens and its place. Its tensors are never written.

    Attributes:
        kind: What a model must have in common with it to read it.
        sources: The documents, in order.
        positions: Lane position of each chunk, a multiple of `c`, ascending, int64 `[F]`.
        of_document: Index of each chunk's document in `sources`, int64 `[F]`.
        tokens: Token ids of each chunk, int64 `[F, c]`.
        rest: Token ids of the last document behind its last chunk, too few to fill one, int64 `[< c]`.
        keys: Of each memory layer, unrotated, `[Hkv, F, c, D]`; fp32, bf16, fp16, or int8.
        values: The same.
        end: Lane position after the last token, `rest` included.
        key_scales: For int8, what a unit of each token is, float32 `[Hkv, F, c]`, of each layer; else none.
        value_scales: The same for values.

    Raises:
        ValueError: They contradict each other.
    """

    kind: MemoryKind
    sources: Sequence[Document]
    positions: Tensor
    of_document: Tensor
    tokens: Tensor
    rest: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    end: int
    key_scales: Sequence[Tensor] = ()
    value_scales: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        for name in ("positions", "of_document", "tokens", "rest"):
            setattr(self, name, getattr(self, name).cpu().contiguous())
        vars(self).update(self.of_layers(lambda chunks: chunks.detach().contiguous()))
        self.sources = tuple(self.sources)
        for wrong in (_wrong_shape(self), _wrong_names(self)):
            if wrong is not None:
                raise ValueError(wrong)
        if not _is_in_order(self):
            raise ValueError("the places of its chunks and documents contradict each other")

    def of_layers(self, work: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Does something to every tensor of every layer, `[Hkv, F, ...]`.

        Args:
            work: What.

        Returns:
            By the names of `OF_LAYERS`, one for each layer.
        """
        return {name: tuple(work(chunks) for chunks in getattr(self, name)) for name in OF_LAYERS}

    def chunk_bytes(self) -> int:
        """Bytes of one chunk: its tokens, place, document, keys and values."""
        kind = self.kind
        token = kind.head_dim * self.keys[0].itemsize + (torch.float32.itemsize if self.key_scales else 0)
        of_layers = 2 * len(kind.layers) * kind.num_kv_heads * kind.chunk_size * token
        return of_layers + (kind.chunk_size + 2) * torch.int64.itemsize


def _wrong_shape(held: Contents) -> str | None:
    kind, count = held.kind, len(held.positions)
    if not kind.layers or len(held.keys) != len(kind.layers):
        return f"it has {len(held.keys)} layers of keys, not {len(kind.layers)}"
    dtype = held.keys[0].dtype
    if dtype not in DTYPES.values():
        return f"its keys are {dtype}, none of {' | '.join(DTYPES)}"
    chunks = (kind.num_kv_heads, count, kind.chunk_size)
    num_scales = len(kind.layers) if dtype == torch.int8 else 0
    expected: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {
        "keys": (len(kind.layers), (*chunks, kind.head_dim), dtype),
        "values": (len(kind.layers), (*chunks, kind.head_dim), dtype),
        "key_scales": (num_scales, chunks, torch.float32),
        "value_scales": (num_scales, chunks, torch.float32),
    }
    found = {name: (len(getattr(held, name)), list(getattr(held, name))) for name in OF_LAYERS}
    found |= {name: (1, [getattr(held, name)]) for name in ("positions", "of_document", "tokens")}
    expected |= {name: (1, (count,), torch.int64) for name in ("positions", "of_document")}
    expected["tokens"] = (1, (count, kind.chunk_size), torch.int64)
    for name, (number, shape, as_dtype) in expected.items():
        if found[name][0] != number:
            return f"it has {found[name][0]} layers of {name}, not {number}"
        for tensor in found[name][1]:
            if tensor.shape != shape or tensor.dtype != as_dtype:
                return f"{name} is {tuple(tensor.shape)}, {tensor.dtype}, not {shape}, {as_dtype}"
    if held.rest.dim() != 1 or held.rest.dtype != torch.int64 or len(held.rest) >= kind.chunk_size:
        return f"rest is {tuple(held.rest.shape)}, {held.rest.dtype}, not fewer than {kind.chunk_size} int64"
    return None


def _wrong_names(held: Contents) -> str | None:
    names = [document.name for document in held.sources]
    if len(set(names)) != len(names):
        return "two of its documents are called alike"
    try:
        ill = [name for name in names if len(name.encode()) < 1 or len(name) > LONGEST_NAME]
    except UnicodeEncodeError:
        return "the name of a document is no text that can be written"
    return f"a name of {len(ill[0])} characters is not of 1 to {LONGEST_NAME}" if ill else None


def _is_in_order(held: Contents) -> bool:
    """Whether documents lie one behind another, each with its own chunks inside, and the rest behind all."""
    size, positions, of_document = held.kind.chunk_size, held.positions, held.of_document
    starts = torch.tensor([*(document.start for document in held.sources), held.end])
    stops = starts[:-1] + torch.tensor([document.num_tokens for document in held.sources], dtype=torch.int64)
    behind_all = held.end - len(held.rest)
    if bool((starts.diff() < 0).any()) or bool((starts[:-1] % size != 0).any()) or int(starts[0]) < 0:
        return False
    if len(held.rest) and (not held.sources or behind_all < int(starts[-2]) or int(stops[-1]) < held.end):
        return False
    if not len(positions):
        return behind_all >= 0
    if int(of_document.min()) < 0 or int(of_document.max()) >= len(held.sources):
        return False
    inside = (positions >= starts[of_document]) & (positions + size <= stops[of_document])
    ascending = (positions % size == 0).all() & (positions.diff() >= size).all() & (of_document.diff() >= 0).all()
    return bool(inside.all() & ascending) and int(positions[-1]) + size <= behind_all
