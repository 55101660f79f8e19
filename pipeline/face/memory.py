"""A memory as a thing: what a frozen backbone made of some documents, to be kept, joined, and read by many."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.config.untrusted import short
from pipeline.errors import LongMemMemoryError
from pipeline.face import stored
from pipeline.face.changes import floats, joined, stored_as, without
from pipeline.face.contents import DTYPES, Contents, MemoryKind
from pipeline.memory.bank import MemoryBank

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Remembered(NamedTuple):
    """What a memory holds of a document: its name, tokens that are remembered, bytes that they take."""

    name: str
    num_tokens: int
    num_bytes: int


@dataclass(eq=False, repr=False)
class Memory(Contents):
    """Keys and values of documents, each chunk with its tokens and its place (`Contents`).

    `append` and `forget` put other tensors in place of its own, so that banks and memories that were made before stay
    what they are.
    """

    _banks: dict[tuple[torch.dtype, torch.device], MemoryBank] = field(default_factory=dict, init=False)

    @property
    def dtype(self) -> str:
        """What keys and values are stored as: `fp32`, `bf16`, `fp16` or `int8`."""
        return _NAMES[self.keys[0].dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(document.num_bytes for document in self.documents())

    def __len__(self) -> int:
        return self.tokens.numel() + self.rest.numel()

    def __repr__(self) -> str:
        return f"Memory({len(self):,} tokens of {len(self.sources)} documents, {self.dtype}, {self.num_bytes:,} bytes)"

    def documents(self) -> list[Remembered]:
        """What is remembered of each document, in order."""
        counts = torch.bincount(self.of_document, minlength=len(self.sources)).tolist()
        size, unit = self.kind.chunk_size, self.chunk_bytes()
        pairs = zip(self.sources, counts, strict=True)
        found = [Remembered(source.name, count * size, count * unit) for source, count in pairs]
        if found:  # whose tokens the rest is
            name, num_tokens, num_bytes = found[-1]
            found[-1] = Remembered(name, num_tokens + self.rest.numel(), num_bytes + self.rest.nbytes)
        return found

    def check(self, kind: MemoryKind) -> None:
        """Makes sure that a model can read this memory.

        Args:
            kind: What the model makes.

        Raises:
            LongMemMemoryError: It is of another backbone, or of other layers, heads or chunks.
        """
        self.kind.check(kind)

    def append(self, other: Memory, *, align: int | None = None) -> None:
        """Adds another memory's documents behind these. Of this one's last document, `rest` is forgotten.

        All keys and values are copied once: to join many memories, `merge` them.

        Args:
            other: It stays as it is; here its keys and values are stored as this memory's are.
            align: Tokens: its documents begin at the next multiple; None: `c`.

        Raises:
            LongMemMemoryError: It is foreign, or has a document that is called like one of these; nothing has changed.
        """
        self._become(self.merge([self, other], align=align))

    @classmethod
    def merge(cls, memories: Sequence[Memory], *, align: int | None = None) -> Memory:
        """Joins memories into a new one, stored as the first is.

        Args:
            memories: At least one; they stay as they are.
            align: Tokens: the documents of each begin at the next multiple; None: `c`.

        Returns:
            The first with the documents of the others behind its own.

        Raises:
            LongMemMemoryError: There is none, one is foreign, or two documents are called alike.
        """
        if not memories:
            raise LongMemMemoryError("there is nothing to merge", got="no memory", do="give at least one")
        return joined([memory.to(memories[0].dtype) for memory in memories], align=align)

    def forget(self, name: str) -> None:
        """Forgets a document. Places of others stay, so that it leaves a gap, but where it was the last.

        Args:
            name: Which.

        Raises:
            LongMemMemoryError: No document is called so.
        """
        names = [source.name for source in self.sources]
        if name not in names:
            near = difflib.get_close_matches(short(name), names, n=1) or names[:1]
            raise LongMemMemoryError(
                "no document of this memory is called so",
                got=short(name),
                expected=f"one of its {len(names)} name(s)" + "".join(f", such as {short(each)}" for each in near),
                do="documents() lists them",
            )
        self._become(without(self, names.index(name)))

    def to(self, dtype: str) -> Memory:
        """The same memory, stored otherwise; what need not change is not copied.

        Args:
            dtype: `fp32`, `bf16`, `fp16` (what is beyond 65,504 becomes that) or `int8`: each token of each head in
                units of a 127th of its largest number.

        Returns:
            A new memory.

        Raises:
            LongMemMemoryError: There is no such dtype, or int8 is asked of numbers that are not finite.
        """
        return stored_as(self, dtype)

    def bank(self, dtype: torch.dtype, device: torch.device | str) -> MemoryBank:
        """The memory as a bank of one lane that is read and never written.

        Keys and values are this memory's own where dtype and device are alike, still on the disk if it was loaded. The
        bank is kept until the memory changes.

        Args:
            dtype: Of the bank's keys and values, floating.
            device: Where they are.

        Returns:
            The bank; the document of a chunk is its index in `sources`.
        """
        place = (dtype, torch.device(device))
        if place not in self._banks:
            pairs = [floats(self, layer, dtype) for layer in range(len(self.keys))]
            layers = [(keys.to(device)[:, None], values.to(device)[:, None]) for keys, values in pairs]
            self._banks[place] = MemoryBank.over(
                layers, positions=self.positions, documents=self.of_document[None].to(device)
            )
        return self._banks[place]

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all; whoever has the old one open goes on reading that.

        Args:
            path: `NAME.safetensors`.

        Raises:
            LongMemMemoryError: It cannot be written there; what was there is untouched.
        """
        stored.save(self, Path(path), num_bytes=self.num_bytes)

    @classmethod
    def load(cls, path: str | Path, *, kind: MemoryKind | None = None) -> Memory:
        """Opens a saved memory. Keys and values stay on the disk until they are read; many may read one file at once.

        Args:
            path: The file.
            kind: What the model makes that is to read it; None: nothing is compared.

        Returns:
            The memory.

        Raises:
            LongMemMemoryError: It is missing, damaged, foreign, or of a newer version.
        """
        return stored.load(cls, Path(path), kind=kind)

    def _become(self, other: Memory) -> None:
        vars(self).update(vars(other))  # all of it at once, no bank of the old one among it
