"""What the files of a token store are, and what its tokens are: so that a store altered in place is found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import DataError
from pipeline.files import hash_file

_WRITTEN_ANEW = "put the store back as it was, or prepare the data again with launch/prepare_data.py"


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileHash:
    """One file of a store.

    Attributes:
        size: Bytes.
        sha256: 64 hexadecimal digits.
    """

    size: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @classmethod
    def of(cls, path: Path, *, progress: Callable[[int], object] = lambda _: None) -> FileHash:
        """Reads a file; `progress` is told the bytes of each block."""
        return cls(*hash_file(path, progress=progress))


def hash_folder(folder: Path) -> dict[str, FileHash]:
    """The files of a split's folder, by name."""
    return {path.name: FileHash.of(path) for path in sorted(folder.iterdir())}


def hash_tokens(column: pa.ChunkedArray) -> str:
    """SHA-256 of all lengths, then all tokens of documents (`list<int32>`), however their files are cut."""
    found = hashlib.sha256()
    for chunk in column.chunks:
        found.update(np.diff(chunk.offsets.to_numpy()).astype("<i8").tobytes())
    for chunk in column.chunks:
        found.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype="<i4").data)
    return found.hexdigest()


def check_sizes(folder: Path, files: Mapping[str, FileHash]) -> None:
    """Checks what can be seen without reading. Raises DataError: a file of a split is missing or has another size."""
    _raise_if(
        folder, [name for name, file in files.items() if _size(folder / name) != file.size], "size, or is missing"
    )


def check_hashes(folder: Path, files: Mapping[str, FileHash], *, progress: Callable[[int], object]) -> None:
    """Reads all files of a split; `progress` is told the bytes. Raises DataError: one is altered, or cannot be read."""
    altered = []
    for name, file in files.items():
        try:
            if FileHash.of(folder / name, progress=progress) != file:
                altered.append(name)
        except OSError as error:
            raise DataError(
                "the token store cannot be read", got=f"{folder / name} ({error.strerror})", do=_WRITTEN_ANEW
            ) from error
    _raise_if(folder, altered, "content than when it was written")


def _raise_if(folder: Path, names: Iterable[str], other: str) -> None:
    found = sorted(names)
    if found:
        raise DataError(
            "the token store is damaged, or was altered",
            got=f"{folder}: {', '.join(found)} has another {other}",
            do=_WRITTEN_ANEW,
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
