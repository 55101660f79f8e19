"""A memory's file, written whole or not at all, opened with every check; `pipeline/memory/file.py` has its form."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pipeline.checkpoint.room import is_want_of_room, room_words
from pipeline.config.untrusted import short
from pipeline.errors import LongMemMemoryError, in_a_line
from pipeline.face.changes import Held
from pipeline.face.contents import OF_LAYERS, Contents, Document, MemoryKind
from pipeline.files import flush_folder, replacing, the_only_writer
from pipeline.memory.file import AboutWhole, StoredDocument, StoredMemory, open_memory, write_whole


def save(memory: Contents, path: Path, *, num_bytes: int) -> None:
    """Writes a memory beside the old file, has the disk hold it, and puts it in the old one's place.

    Args:
        memory: The memory.
        path: The file.
        num_bytes: That it will have at least.

    Raises:
        LongMemMemoryError: It cannot be written; what was there is untouched.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with the_only_writer(path), replacing(path) as temporary:
            write_whole(temporary, _about(memory), _tensors(memory))
        flush_folder(path.parent)
    except BlockingIOError as error:
        raise LongMemMemoryError(
            "another process is writing this memory", got=path, do="wait for it, or save under another name"
        ) from error
    except (OSError, ValueError) as error:
        room = f"; {room_words(path.parent, num_bytes)}" if is_want_of_room(error) else ""
        raise LongMemMemoryError(
            "the memory cannot be written; what was there before is untouched",
            got=f"{path} ({in_a_line(error)}){room}",
            expected="a file in a folder where one may be made, with room for it",
            do="name another path, make its folder, or make room there",
        ) from error


def load(make: Callable[..., Held], path: Path, *, kind: MemoryKind | None) -> Held:
    """Opens a memory's file.

    Args:
        make: Makes the memory of the fields of `Contents`.
        path: The file.
        kind: What it must be; None: anything.

    Returns:
        The memory; keys and values are read from the disk when they are used.

    Raises:
        LongMemMemoryError: It is missing, damaged, foreign, or of a newer version.
    """
    with _errors_in_words(path), open_memory(path) as stored:
        about = stored.about
        if not isinstance(about, AboutWhole):
            raise LongMemMemoryError(
                "this is a rank's part of a training's memory",
                got=path,
                expected="a memory that save() wrote",
                do="memorize the texts with the trained model, and save that",
            )
        layers = tuple(about.layers)
        found = MemoryKind(about.backbone, layers, about.num_kv_heads, about.head_dim, about.chunk_size)
        if kind is not None:
            found.check(kind)
        return make(kind=found, **_parts(about, stored))


@contextmanager
def _errors_in_words(path: Path) -> Iterator[None]:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for somebody who writes into it
            raise LongMemMemoryError("this is no file", got=path, expected="a memory that save() wrote", do="name one")
        yield
    except OSError as error:
        raise LongMemMemoryError(
            "the memory cannot be read",
            got=f"{short(str(path))} ({in_a_line(error)})",
            do="name a file that save() wrote",
        ) from error
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError, SafetensorError) as error:
        raise LongMemMemoryError(
            "the file is damaged, or no memory",
            got=f"{path} ({in_a_line(error)})",
            expected="a whole file that save() wrote",
            do="copy it again from where it was made, or memorize the texts again",
        ) from error


def _about(memory: Contents) -> AboutWhole:
    kind = memory.kind
    return AboutWhole(
        chunk_size=kind.chunk_size,
        num_layers=len(kind.layers),
        num_kv_heads=kind.num_kv_heads,
        head_dim=kind.head_dim,
        dtype=str(memory.keys[0].dtype).removeprefix("torch."),  # type: ignore[arg-type]
        backbone=kind.backbone,
        layers=list(kind.layers),
        documents=[
            StoredDocument(name=document.name, start=document.start, num_tokens=document.num_tokens)
            for document in memory.sources
        ],
        end=memory.end,
    )


def _tensors(memory: Contents) -> dict[str, Tensor]:
    """As the file names and shapes them: of one lane."""
    found = {"positions": memory.positions, "documents": memory.of_document[None]}
    found |= {"tokens": memory.tokens, "rest": memory.rest}
    for kind in OF_LAYERS:
        found |= {f"{kind}.{layer}": chunks[:, None] for layer, chunks in enumerate(getattr(memory, kind))}
    return found


def _parts(about: AboutWhole, stored: StoredMemory) -> Mapping[str, Any]:
    if stored.documents.shape[0] != 1:
        raise ValueError(f"it has {stored.documents.shape[0]} lanes, not one")
    tensors = stored.whole()
    numbers = range(about.num_layers)
    return {
        "sources": [Document(each.name, each.start, each.num_tokens) for each in about.documents],
        "positions": stored.positions,
        "of_document": stored.documents[0],
        "tokens": tensors["tokens"],
        "rest": tensors["rest"],
        "end": about.end,
        **{
            kind: [tensors[f"{kind}.{layer}"][:, 0] for layer in numbers if f"{kind}.0" in tensors]
            for kind in OF_LAYERS
        },
    }
