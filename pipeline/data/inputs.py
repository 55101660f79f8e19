"""Reading documents from files of text; every error names file and place."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.data.text import decode, readable, take_nul
from pipeline.errors import DataError

TEXT_FIELD = "text"
_PARQUET_BATCH_ROWS = 64
_ZSTD_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A document as it was read.

    Attributes:
        text: Its text; may be empty.
        source: The file, with line or row where there are several in a file.
        num_nul: NUL characters that were dropped from it.
    """

    text: str
    source: str
    num_nul: int = 0


def read_documents(files: Sequence[str], *, drop_nul: bool = False) -> Iterator[Document]:
    """Read documents from files, one after another.

    Args:
        files: Paths that ``find_files`` returned.
        drop_nul: Whether to drop NUL characters rather than to refuse them.

    Yields:
        The documents, empty ones too.

    Raises:
        DataError: A file cannot be read, is not UTF-8, has NUL characters, or holds a malformed document.
    """
    for file in files:
        path = Path(file)
        suffix = path.suffix.lower()
        read = {".txt": _read_text, ".parquet": _read_parquet}.get(suffix, _read_jsonl)
        try:
            yield from read(path, drop_nul=drop_nul)
        except OSError as error:
            raise DataError(
                "an input cannot be read", got=f"{readable(path)} ({error.strerror or error})", do="check the file"
            ) from error


def _read_text(path: Path, *, drop_nul: bool) -> Iterator[Document]:
    name = readable(path)
    text, num_nul = take_nul(decode(path.read_bytes(), where=name), where=name, drop=drop_nul)
    yield Document(text.removeprefix("\ufeff").replace("\r\n", "\n"), name, num_nul)


def _read_jsonl(path: Path, *, drop_nul: bool) -> Iterator[Document]:
    name = readable(path)
    offset = 0
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{name}, line {number}"
        # A file that was cut off by a crash may have a hole of NUL bytes, which no JSON escapes.
        line, num_bare = take_nul(decode(raw, where=where, offset=offset), where=where, drop=drop_nul)
        offset += len(raw)
        if number == 1:
            line = line.removeprefix("\ufeff")
        if line.strip():
            text, num_escaped = take_nul(_text_of(line, where), where=where, drop=drop_nul)
            yield Document(text, f"{name}:{number}", num_bare + num_escaped)
        elif num_bare:
            yield Document("", f"{name}:{number}", num_bare)


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "a jsonl line is malformed", got=f"{where}: {error}", expected="one JSON object a line"
        ) from error
    if not isinstance(record, dict):
        raise DataError("a jsonl line is not an object", got=f"{where}: {type(record).__name__}")
    if TEXT_FIELD not in record:
        raise DataError(f"a jsonl line has no field {TEXT_FIELD!r}", got=f"{where}, fields {sorted(record)}")
    text = record[TEXT_FIELD]
    if not isinstance(text, str):
        raise DataError(f"the field {TEXT_FIELD!r} is not a string", got=f"{where}: {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which is not text
        raise DataError("a jsonl line has text that is not Unicode", got=f"{where}: {error}") from error
    return text


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file, line ends kept."""
    try:
        if path.suffix.lower() == ".zst":
            yield from _zstd_lines(path)
        elif path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as file:
                yield from file
        else:
            with open(path, "rb") as file:
                yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError("a compressed input is damaged or cut off", got=f"{readable(path)} ({error})") from error


def _zstd_lines(path: Path) -> Iterator[bytes]:
    pending: list[bytes] = []
    for block in _zstd_blocks(path):
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield b"".join(pending) + line + b"\n"
            pending = []
        pending.append(rest)
    last = b"".join(pending)
    if last:
        yield last


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    # zstandard's stream reader ends silently where a file is cut off, and stops after the first frame. This does not.
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        while raw := file.read(_ZSTD_READ_BYTES):
            while raw:
                if decompressor.eof:
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
                yield decompressor.decompress(raw)
                raw = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("the file ended before the end of a frame")


def _read_parquet(path: Path, *, drop_nul: bool) -> Iterator[Document]:
    name = readable(path)
    try:
        # Opened by Python: pyarrow opens no file whose name is not UTF-8.
        with open(path, "rb") as raw, pq.ParquetFile(raw) as file:
            _check_column(name, file.schema_arrow)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[TEXT_FIELD]):
                for value in batch.column(0):
                    where = f"{name}, row {row}"
                    text, num_nul = take_nul(_parquet_text(value, where), where=where, drop=drop_nul)
                    yield Document(text, f"{name}:{row}", num_nul)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError("a parquet input cannot be read", got=f"{name} ({error})") from error


def _check_column(name: str, schema: pa.Schema) -> None:
    if TEXT_FIELD not in schema.names:
        raise DataError(f"a parquet input has no column {TEXT_FIELD!r}", got=f"{name}, columns {schema.names}")
    if schema.names.count(TEXT_FIELD) > 1:
        raise DataError(f"a parquet input has several columns {TEXT_FIELD!r}", got=f"{name}, columns {schema.names}")
    kind = schema.field(TEXT_FIELD).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"the column {TEXT_FIELD!r} of a parquet input does not hold strings", got=f"{name}, {kind}")


def _parquet_text(value: pa.Scalar, where: str) -> str:
    if not value.is_valid:
        raise DataError(f"the column {TEXT_FIELD!r} of a parquet input has a row without text", got=where)
    return decode(value.as_buffer().to_pybytes(), where=where)
