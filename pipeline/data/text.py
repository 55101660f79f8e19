"""Bytes to text: UTF-8 only, and without NUL characters. What is something else is refused with how to convert it."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from pipeline.errors import DataError

NUL = "\0"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16"),
)
_SHOWN_BYTES = 4
_MANY_NUL = 0.1  # of all characters: Western text in UTF-16 has about half


def readable(path: Path | str) -> str:
    r"""A path as text that can be stored and printed: bytes of its name that are not UTF-8 become `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def home(path: Path | str) -> Path:
    """A path with `~` and `~name` replaced; an error in words where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            "a path names a home folder that is not there", got=readable(path), do="check the path"
        ) from error


def decode(raw: bytes, *, where: str, offset: int = 0) -> str:
    """Bytes of a file as text.

    Args:
        raw: The bytes.
        where: Names them in an error: file, and line or row.
        offset: Where they begin in the file.

    Returns:
        The text.

    Raises:
        DataError: They are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        for mark, name, encoding in _MARKS:
            if raw.startswith(mark):
                raise DataError(
                    f"an input is {name}, not UTF-8",
                    got=f"{where}, which begins with the byte-order mark {mark!r}",
                    do=f"convert it: iconv -f {encoding} -t utf-8",
                ) from error
        raise DataError(
            "an input is not UTF-8",
            got=f"{where}, byte offset {offset + error.start}: {raw[error.start : error.start + _SHOWN_BYTES]!r}",
            do=_advice(raw),
        ) from error


def take_nul(text: str, *, where: str, drop: bool) -> tuple[str, int]:
    """Looks for NUL characters: no text has them, so that they tell of another encoding or of a damaged file.

    Args:
        text: What was read.
        where: Names it in an error.
        drop: Whether to drop them rather than to refuse them.

    Returns:
        The text without them, and how many there were.

    Raises:
        DataError: There are some, and they are not to be dropped.
    """
    count = text.count(NUL)
    if count == 0:
        return text, 0
    if drop:
        return text.replace(NUL, ""), count
    advice = "see whether the file is damaged"
    if count >= _MANY_NUL * len(text):
        advice = _utf16_advice(text.encode("utf-8"))
    raise DataError(
        "an input has NUL characters",
        got=f"{where}: {count} of {len(text)} characters, the first at {text.index(NUL)}",
        do=f"{advice}; else give --drop-nul to drop and count them",
    )


def _advice(raw: bytes) -> str:
    if 0 in raw:
        return f"{_utf16_advice(raw)}; if it is not text, leave it out"
    return "convert it from its encoding, for Latin-1 for example with: iconv -f latin1 -t utf-8"


def _utf16_advice(raw: bytes) -> str:
    """Every second byte of Western text in UTF-16 is zero: which one tells the order of bytes."""
    order = "le" if raw[1::2].count(0) >= raw[::2].count(0) else "be"
    return f"if it is UTF-16 without a byte-order mark, convert it: iconv -f utf-16{order} -t utf-8"
