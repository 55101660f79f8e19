"""What a user gives, in the one form that the rest of the room works with: memories of rows, texts as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.text import decode, readable
from pipeline.errors import DataError, LongMemMemoryError
from pipeline.face.memory import Memory

Memories = Memory | Sequence[Memory] | Sequence[Sequence[Memory]] | bool | None
"""What rows read besides their own stream: a memory or several for all rows, or a list of some for each row; False: not
even their own past."""


def memories_of_rows(given: Memories, num_rows: int) -> list[tuple[Memory, ...]]:
    """The memories of each row.

    Args:
        given: As above.
        num_rows: Rows; a multiple of the lists if there is one for each: beams of a prompt read the same.

    Returns:
        Of every row.

    Raises:
        LongMemMemoryError: It is something else, or there are lists for another number of rows.
    """
    if given is None or isinstance(given, (bool, Memory)):
        return [(given,) if isinstance(given, Memory) else ()] * num_rows
    parts = list(given) if isinstance(given, Sequence) else [given]
    if all(isinstance(part, Memory) for part in parts):
        return [tuple(parts)] * num_rows  # type: ignore[arg-type]
    are_lists = all(isinstance(part, Sequence) and all(isinstance(memory, Memory) for memory in part) for part in parts)
    if not are_lists or num_rows % len(parts):
        raise LongMemMemoryError(
            "these are no memories of the rows",
            got=f"{len(parts)} lists for {num_rows} rows" if are_lists else f"{type(parts[0]).__name__}",
            expected="a Memory, a list of them for all rows, or a list of lists, one for each row",
            do="load them with Memory.load, or make them with memorize",
        )
    each = num_rows // len(parts)
    return [tuple(parts[row // each]) for row in range(num_rows)]  # type: ignore[arg-type]


def tokens_of_texts(texts: Any, tokenizer: Any, load: Any) -> list[Tensor]:
    """Texts, or token ids, each as int64 `[n]`.

    Args:
        texts: A text or ids `[n]`, or several.
        tokenizer: Turns texts into ids; None: `load` brings it.
        load: Loads the model's own tokenizer.

    Returns:
        Of each.

    Raises:
        DataError: There is none, or one is empty.
    """
    if not isinstance(texts, (str, Tensor, Iterable)):
        raise DataError("this is no text", got=type(texts).__name__, expected="a text, or token ids [n]", do="give one")
    several = [texts] if isinstance(texts, (str, Tensor)) or _are_ids(texts) else list(texts)
    found = []
    for number, text in enumerate(several):
        if isinstance(text, str):
            tokenizer = load() if tokenizer is None else tokenizer
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        else:
            ids = torch.as_tensor(text)
            ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
        if ids.dim() != 1 or ids.is_floating_point() or not len(ids):
            raise DataError(
                "there is nothing to remember" if not ids.numel() else "this is no text",
                got=f"text {number} of {len(several)}: {list(ids.shape)}, {ids.dtype}",
                expected="a text, or token ids [n]",
                do="leave empty ones out" if not ids.numel() else "give one list of whole numbers for each text",
            )
        found.append(ids.to(torch.int64))
    if not found:
        raise DataError("there is nothing to remember", got="no text", do="give at least one")
    return found


def texts_of_files(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by the names of their files, or by their paths where names are alike.

    Args:
        paths: Files of UTF-8 text.

    Returns:
        The texts, in order.

    Raises:
        DataError: A file cannot be read, is empty, is no UTF-8, or is named twice.
    """
    names = [readable(path.name) for path in paths]
    found: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        where = readable(path)
        name = name if names.count(name) == 1 else where
        if name in found:
            raise DataError("a file is named twice", got=where, do="leave it out once")
        try:
            text = decode(path.read_bytes(), where=where)
        except OSError as error:
            raise DataError(
                "a file cannot be read", got=f"{where} ({error.strerror or error})", do="check its name"
            ) from error
        if not text.removeprefix("\ufeff").strip():
            raise DataError("a file is empty", got=where, expected="text", do="leave it out")
        found[name] = text.removeprefix("\ufeff").replace("\r\n", "\n")
    return found


def names_of(names: str | Sequence[str] | None, count: int) -> list[str]:
    """What documents are called.

    Args:
        names: A name for each; None: numbers.
        count: How many there are.

    Returns:
        The names.

    Raises:
        DataError: There are more or fewer.
    """
    if names is None:
        return [f"document {number}" for number in range(1, count + 1)]
    given = [names] if isinstance(names, str) else list(names)
    if len(given) != count:
        raise DataError("texts and names are not as many", got=f"{len(given)} names", expected=f"{count}")
    return given


def _are_ids(texts: Any) -> bool:
    return isinstance(texts, Sequence) and bool(texts) and all(isinstance(each, int) for each in texts)
