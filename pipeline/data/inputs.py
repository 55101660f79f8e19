"""Raw text: finding the input files and reading documents from them; every error names file and place."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_FIELD = "text"
_PARQUET_BATCH_ROWS = 64
_ZSTD_READ_BYTES = 1 << 20


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """List the input files: those given, and those below the folders given; each file once, in a fixed order.

    Args:
        inputs: Files and folders. Folders are searched to any depth; hidden files and folders in them are skipped.

    Returns:
        The files; in the order of the inputs, those of a folder sorted.

    Raises:
        DataError: An input is missing, is of an unknown kind, or is a folder without readable files.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        for path in _expand(Path(given).expanduser()):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def read_documents(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """Read documents from files, one after another.

    Args:
        files: Paths that ``find_files`` returned.

    Yields:
        ``{"text": ..., "source": ...}`` for each document, empty ones too.

    Raises:
        DataError: A file cannot be read, is not UTF-8, or holds a malformed document.
    """
    for file in files:
        path = Path(file)
        if path.suffix == ".txt":
            documents = _read_text(path)
        elif path.suffix == ".parquet":
            documents = _read_parquet(path)
        else:
            documents = _read_jsonl(path)
        for text, source in documents:
            yield {"text": text, "source": source}


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError("an input file is of an unknown kind", got=path, expected=", ".join(SUFFIXES))
        return [path]
    if not path.is_dir():
        raise DataError("an input does not exist", got=path, do="check the path")
    files = [below for below in sorted(path.rglob("*")) if _is_readable(below, path)]
    if not files:
        raise DataError("an input folder has no readable files", got=path, expected=f"files in {', '.join(SUFFIXES)}")
    return files


def _is_readable(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.name.endswith(SUFFIXES) and file.is_file()


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    text = _decode(path.read_bytes(), where=str(path))
    yield text.removeprefix("\ufeff").replace("\r\n", "\n"), str(path)


def _decode(raw: bytes, *, where: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "an input is not UTF-8",
            got=f"{where}, byte offset {offset + error.start}: {raw[error.start : error.start + 4]!r}",
            do="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    offset = 0
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        line = _decode(raw, where=where, offset=offset)
        offset += len(raw)
        if number == 1:
            line = line.removeprefix("\ufeff")
        if line.strip():
            yield _text_of(line, where), f"{path}:{number}"


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
        if path.suffix == ".zst":
            yield from _zstd_lines(path)
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield from file
        else:
            with open(path, "rb") as file:
                yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError("a compressed input is damaged or cut off", got=f"{path} ({error})") from error


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


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow)
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[TEXT_FIELD]):
                for value in batch.column(0):
                    yield _parquet_text(value, f"{path}, row {row}"), f"{path}:{row}"
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError("a parquet input cannot be read", got=f"{path} ({error})") from error


def _check_column(path: Path, schema: pa.Schema) -> None:
    if TEXT_FIELD not in schema.names:
        raise DataError(f"a parquet input has no column {TEXT_FIELD!r}", got=f"{path}, columns {schema.names}")
    kind = schema.field(TEXT_FIELD).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"the column {TEXT_FIELD!r} of a parquet input does not hold strings", got=f"{path}, {kind}")


def _parquet_text(value: pa.Scalar, where: str) -> str:
    if not value.is_valid:
        raise DataError(f"the column {TEXT_FIELD!r} of a parquet input has a row without text", got=where)
    return _decode(value.as_buffer().to_pybytes(), where=where)
