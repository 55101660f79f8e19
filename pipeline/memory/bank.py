"""One shard of the memory bank: for every memory layer and lane a ring of chunks.

Shapes: `B` lanes, `Hkv` key/value heads, `C` chunks of a ring, `c` tokens of a chunk, `D` head size, `T` tokens of a
segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.memory.dtypes import within

EMPTY = -1  # position and document of a slot that holds nothing
MIXED = -2  # document of a chunk whose tokens belong to several documents: invisible under scope `document`


@dataclass(frozen=True)
class BankShape:
    """How large a bank is.

    Attributes:
        num_layers: Memory layers.
        num_lanes: `B`.
        num_kv_heads: `Hkv`.
        head_dim: `D`.
        num_chunks: `C`, chunks of each ring.
        chunk_size: `c`, tokens.
    """

    num_layers: int
    num_lanes: int
    num_kv_heads: int
    head_dim: int
    num_chunks: int
    chunk_size: int

    def marks_bytes(self) -> int:
        """Bytes of what says where the chunks belong: positions and documents, int64."""
        return (self.num_lanes + 1) * self.num_chunks * torch.int64.itemsize

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys, values and chunk keys.

        Args:
            dtype: Dtype of keys and values (chunk keys are float32).

        Returns:
            The number of bytes.
        """
        token = 2 * self.chunk_size * self.head_dim * dtype.itemsize
        chunk_key = self.head_dim * torch.float32.itemsize
        return self.num_layers * self.num_lanes * self.num_kv_heads * self.num_chunks * (token + chunk_key)


@dataclass(frozen=True)
class LayerStore:
    """The rings of one memory layer.

    Attributes:
        keys: `[Hkv, B, C, c, D]`, unrotated.
        values: `[Hkv, B, C, c, D]`.
        chunk_keys: Mean of each chunk's keys, float32 `[Hkv, B, C, D]`.
    """

    keys: Tensor
    values: Tensor
    chunk_keys: Tensor


class MemoryBank:
    """Keys and values of the past of `B` lanes that advance in lockstep.

    The bank holds somewhat more than is remembered: a segment is appended before it is read, so a ring has room for
    the remembered tokens and for the segments of one step. What is visible is decided when it is read.

    Args:
        shape: Sizes.
        dtype: Dtype of keys and values.
        device: Where they are kept.
        layers: What it is made of, where that is there already; None: empty rings.
        chunk_keys: Mean of the keys as they are `stored`, or of `unrounded` ones, as they came.
    """

    def __init__(
        self,
        shape: BankShape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: Sequence[LayerStore] | None = None,
        chunk_keys: str = "stored",
    ) -> None:
        self.shape = shape
        self._of_stored = chunk_keys == "stored"
        self.dtype = dtype
        self.device = device
        self.is_writable = True
        self.layers = [self._empty_store() for _ in range(shape.num_layers)] if layers is None else list(layers)
        # Lane position of each slot's first token, the same in all lanes. On the host: it decides which slots a
        # read looks at, and reading it from an accelerator would wait for the accelerator.
        self.positions = np.full(shape.num_chunks, EMPTY, dtype=np.int64)
        self.documents = torch.full((shape.num_lanes, shape.num_chunks), EMPTY, dtype=torch.int64, device=device)
        self.next_slot = 0

    def _empty_store(self) -> LayerStore:
        shape = self.shape
        rings = (shape.num_kv_heads, shape.num_lanes, shape.num_chunks)
        whole = (*rings, shape.chunk_size, shape.head_dim)
        return LayerStore(
            keys=torch.zeros(whole, dtype=self.dtype, device=self.device),
            values=torch.zeros(whole, dtype=self.dtype, device=self.device),
            chunk_keys=torch.zeros((*rings, shape.head_dim), device=self.device),
        )

    @classmethod
    @torch.no_grad()
    def over(cls, layers: Sequence[tuple[Tensor, Tensor]], *, positions: Tensor, documents: Tensor) -> MemoryBank:
        """A bank over keys and values that are there already, for reading only: nothing but chunk keys is made.

        Args:
            layers: Keys and values `[Hkv, B, C, c, D]` of each memory layer, contiguous, all of one dtype and device.
            positions: Lane position of each chunk, ascending, int64 `[C]`.
            documents: Documents, int64 `[B, C]`.

        Returns:
            The bank, full; what would write into it raises.
        """
        keys = layers[0][0]
        num_kv_heads, num_lanes, num_chunks, chunk_size, head_dim = keys.shape
        shape = BankShape(len(layers), num_lanes, num_kv_heads, head_dim, num_chunks, chunk_size)
        stores = [LayerStore(key, value, torch.stack([_chunk_keys(head) for head in key])) for key, value in layers]
        bank = cls(shape, dtype=keys.dtype, device=keys.device, layers=stores)
        bank.label(positions.cpu(), documents, slots=torch.arange(num_chunks), next_slot=0)
        bank.is_writable = False
        return bank

    def _must_be_writable(self) -> None:
        if not self.is_writable:
            raise ValueError("this bank is a memory that many may read: it is never written")

    @property
    def num_filled(self) -> int:
        """Chunks that hold something, of each ring."""
        return int((self.positions != EMPTY).sum())

    def filled_bytes(self) -> int:
        """Bytes of the keys and values of the chunks that hold something."""
        shape = self.shape
        chunk = 2 * shape.num_kv_heads * shape.num_lanes * shape.chunk_size * shape.head_dim * self.dtype.itemsize
        return shape.num_layers * self.num_filled * chunk

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and chunk keys, of all its room."""
        return self.shape.bytes(self.dtype)

    @property
    def end(self) -> int:
        """Lane position after the newest token, 0 for an empty bank."""
        return int(self.positions.max()) + self.shape.chunk_size if self.num_filled else 0

    def reset(self, *, next_slot: int = 0) -> None:
        """Forgets everything.

        Args:
            next_slot: Where the next chunk is written.
        """
        self._must_be_writable()
        self.positions.fill(EMPTY)
        self.documents.fill_(EMPTY)
        self.next_slot = next_slot

    @torch.no_grad()
    def append(self, memory: Sequence[tuple[Tensor, Tensor]], *, start: int, documents: Tensor) -> None:
        """Writes one segment of every lane over the oldest chunks; nothing else moves.

        Args:
            memory: Keys and values `[B, Hkv, T, D]` of each memory layer, any floating dtype; `T` a multiple of `c`. In
                a bank of fp16 a number beyond 65,504 is stored as that.
            start: Lane position of the segment's first token; not before the end of what is stored.
            documents: Document of each token, int64 `[B, T]`, not negative.

        Raises:
            ValueError: The segment does not fit the bank (length, layers, order), or the bank is for reading only.
        """
        self._must_be_writable()
        shape = self.shape
        num_tokens = documents.shape[1]
        count = num_tokens // shape.chunk_size
        if num_tokens % shape.chunk_size or not 0 < count <= shape.num_chunks:
            raise ValueError(f"a segment of {num_tokens} tokens does not fit {shape.num_chunks} x {shape.chunk_size}")
        if len(memory) != shape.num_layers or start < self.end:
            raise ValueError(f"{len(memory)} layers from {start} do not continue {shape.num_layers} up to {self.end}")
        first = min(count, shape.num_chunks - self.next_slot)
        for begin, end, slot in ((0, first, self.next_slot), (first, count, 0)):
            if begin < end:
                self._write(memory, slice(begin, end), slice(slot, slot + end - begin))
                self._label(documents, start, slice(begin, end), slice(slot, slot + end - begin))
        self.next_slot = (self.next_slot + count) % shape.num_chunks

    def _write(self, memory: Sequence[tuple[Tensor, Tensor]], chunks: slice, slots: slice) -> None:
        size = self.shape.chunk_size
        tokens = slice(chunks.start * size, chunks.stop * size)
        for store, (key, value) in zip(self.layers, memory, strict=True):
            for target, source in ((store.keys, key), (store.values, value)):
                chunked = (
                    within(source[:, :, tokens], self.dtype).unflatten(2, (-1, size)).transpose(0, 1)
                )  # [Hkv, B, chunks, c, D]
                target[:, :, slots].copy_(chunked)
            keys = store.keys[:, :, slots]  # a reader can recompute their means from the bank
            if not self._of_stored:
                keys = key[:, :, tokens].unflatten(2, (-1, size)).transpose(0, 1).to(self.device)
            store.chunk_keys[:, :, slots] = _chunk_keys(keys)

    def _label(self, documents: Tensor, start: int, chunks: slice, slots: slice) -> None:
        size = self.shape.chunk_size
        self.positions[slots] = start + size * np.arange(chunks.start, chunks.stop)
        chunked = documents[:, chunks.start * size : chunks.stop * size].unflatten(1, (-1, size)).to(self.device)
        same = (chunked == chunked[..., :1]).all(dim=-1)
        self.documents[:, slots] = torch.where(same, chunked[..., 0], MIXED)

    def grown(self, larger: MemoryBank) -> MemoryBank:
        """A larger bank with the same past.

        Args:
            larger: An empty one, alike but for its rings, which have no fewer chunks.

        Returns:
            The larger bank.
        """
        slots, count = self.filled(), self.num_filled
        into, next_slot = torch.arange(count), count % larger.shape.num_chunks
        there = slots.to(self.device)
        positions = torch.from_numpy(self.positions)[slots]
        larger.label(positions, self.documents[:, there], slots=into, next_slot=next_slot)
        for old, new in zip(self.layers, larger.layers, strict=True):
            new.keys[:, :, :count] = old.keys[:, :, there]
            new.values[:, :, :count] = old.values[:, :, there]
            new.chunk_keys[:, :, :count] = old.chunk_keys[:, :, there]
        return larger

    def filled(self) -> Tensor:
        """Slots that hold something, the oldest chunk's first, int64 `[F]` on the host."""
        oldest_first = np.argsort(self.positions)  # empty slots before all others
        return torch.from_numpy(oldest_first[self.shape.num_chunks - self.num_filled :])

    def label(self, positions: Tensor, documents: Tensor, *, slots: Tensor, next_slot: int) -> None:
        """Forgets everything, and says what slots hold from now on: `put` writes it there.

        Args:
            positions: Lane position of each chunk, int64 `[F]` on the host.
            documents: Documents, int64 `[B, F]`.
            slots: Where the chunks are kept, int64 `[F]` on the host, no slot twice.
            next_slot: Where the next chunk is written.
        """
        self.reset(next_slot=next_slot)
        self.positions[slots.numpy()] = positions.numpy()
        self.documents[:, slots.to(self.device)] = documents.to(self.device)

    @torch.no_grad()
    def put(self, index: int, keys: Tensor, values: Tensor, *, lanes: Tensor, slots: Tensor) -> None:
        """Writes chunks of some lanes into slots; `label` says which chunks they are.

        Args:
            index: Index of the memory layer.
            keys: In the bank's dtype, `[Hkv, lanes, slots, c, D]`.
            values: The same.
            lanes: Which lanes, int64.
            slots: Which slots, int64.
        """
        self._must_be_writable()
        store, keys = self.layers[index], keys.to(self.device)
        lanes, slots = lanes.to(self.device)[:, None], slots.to(self.device)
        store.keys[:, lanes, slots] = keys
        store.values[:, lanes, slots] = values.to(self.device)
        store.chunk_keys[:, lanes, slots] = _chunk_keys(keys)


def _chunk_keys(keys: Tensor) -> Tensor:
    """Mean keys of chunks `[..., c, D]`, float32 `[..., D]`.

    Summed in float64, where the order does not show: chunks of the same tokens in another order, which are common in
    low layers, then have the same key to the last bit, and searching need not decide between them by rounding.
    """
    return keys.double().mean(dim=-2).float()
