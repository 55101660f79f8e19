"""What a token store says of itself, in store.json: counts, tokenizer and hashes, believed only as far as types go."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.config.untrusted import parse_json, read_small, shown, what_is_wrong
from pipeline.data.hashes import FileHash, Sha256
from pipeline.data.tokenizer import TokenizerInfo
from pipeline.errors import DataError

FORMAT_VERSION = 1
INFO_FILE = "store.json"
PREPARE = "make one with launch/prepare_data.py"
Count = Annotated[int, Field(ge=0, lt=2**63)]
FileName = Annotated[str, Field(pattern=r"^[^/\x00]+$")]


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split; lengths are in tokens.

    Attributes:
        num_documents: Number of documents.
        num_tokens: Tokens of all documents together.
        min_document_tokens: Length of the shortest document.
        max_document_tokens: Length of the longest document.
        length_histogram: Number of documents by length: key ``2**n`` counts lengths from there to ``2**(n+1) - 1``.
        tokens_sha256: What ``hash_tokens`` says of the documents; None in a store that was made without hashes.
        files: What each file was when it was written, by name; empty likewise.
    """

    num_documents: Count
    num_tokens: Count
    min_document_tokens: Count
    max_document_tokens: Count
    length_histogram: dict[str, Count]
    tokens_sha256: Sha256 | None = None
    files: dict[FileName, FileHash] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreInfo:
    """What store.json says.

    Attributes:
        format_version: Version of the layout on disk.
        tokenizer: The tokenizer that made the tokens.
        splits: Counts by name of the split.
    """

    format_version: int
    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]


_INFO = TypeAdapter(StoreInfo)


def is_store(folder: Path) -> bool:
    """Whether the folder holds a whole token store of any version."""
    return (folder / INFO_FILE).is_file()


def write_info(folder: Path, info: StoreInfo) -> None:
    """Write or replace store.json; a reader sees the old one or the new one."""
    partial = folder / f".{INFO_FILE}.partial"
    partial.write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / INFO_FILE)


def read_info(path: Path) -> StoreInfo:
    """Read what a token store says of itself.

    Args:
        path: The folder of the store.

    Returns:
        What its store.json says.

    Raises:
        DataError: There is no store, or store.json is damaged or of another version.
    """
    if not path.is_dir():
        raise DataError("the token store does not exist", got=path, do=PREPARE)
    if not is_store(path):
        raise DataError("the folder is not a token store: it has no store.json", got=path, do=PREPARE)
    try:
        whole = parse_json(read_small(path / INFO_FILE))
        version = whole["format_version"]
        if type(version) is int and version == FORMAT_VERSION:
            info = _INFO.validate_json(json.dumps(whole), strict=True)
            _check_hashed(path, info)
            return info
    except ValidationError as error:
        raise _damaged(path, what_is_wrong(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from error
    raise DataError(
        "the token store has another format version", got=shown(version), expected=FORMAT_VERSION, do=PREPARE
    )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        "the token store is damaged: store.json cannot be read", got=f"{path / INFO_FILE} ({why})", do=PREPARE
    )


def _check_hashed(path: Path, info: StoreInfo) -> None:
    """All splits have hashes of all their files, or none has any."""
    bare = [name for name, split in info.splits.items() if not split.files and split.tokens_sha256 is None]
    if len(bare) == len(info.splits):
        return
    for name, split in info.splits.items():
        there = {entry.name for entry in (path / name).iterdir()} if (path / name).is_dir() else set(split.files)
        unknown = sorted(there - split.files.keys() - {entry for entry in there if entry.startswith("cache-")})
        if split.tokens_sha256 is None or unknown:
            what = f"without a hash of {unknown[0]!r}" if unknown else "without tokens_sha256"
            raise DataError(
                "the token store is damaged: it has hashes of some of its parts only",
                got=f"{path / name} {what}",
                do=PREPARE,
            )
