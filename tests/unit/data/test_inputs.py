"""Reading documents, with the place named in every error."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data import inputs
from pipeline.data.inputs import Document, read_documents
from pipeline.errors import DataError

TEXTS = ["first line\nsecond", "zweites: äöü €", "", "x" * 5000]
JSONL = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()


def read(*paths):
    return list(read_documents([str(path) for path in paths]))


def texts(*paths):
    return [document.text for document in read(*paths)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_text_file_is_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\n\nthree €".encode())
    assert read(path) == [Document(text="one\ntwo\n\nthree €", source=str(path))]


def test_plain_and_compressed_jsonl_read_alike(tmp_path):
    plain = write(tmp_path / "a.jsonl", JSONL)
    gz = write(tmp_path / "a.jsonl.gz", gzip.compress(JSONL[:20]) + gzip.compress(JSONL[20:]))
    zst = write(tmp_path / "a.jsonl.zst", zstandard.compress(JSONL[:20]) + zstandard.compress(JSONL[20:]))
    assert texts(plain) == texts(gz) == texts(zst) == TEXTS
    assert [document.source for document in read(zst)] == [f"{zst}:{number}" for number in (1, 2, 3, 4)]


def test_zstd_blocks_may_end_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_ZSTD_READ_BYTES", 3)
    assert texts(write(tmp_path / "a.jsonl.zst", zstandard.compress(JSONL.rstrip(b"\n")))) == TEXTS


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [document.source for document in read(path)] == [f"{path}:1", f"{path}:4"]
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"malformed; got: .*a\.jsonl, line 2: .*expected: one JSON object a line"),
        (b"[" * 100_000, r"malformed; got: .*a\.jsonl, line 2"),
        (b'["text"]', r"not an object; got: .*a\.jsonl, line 2: list"),
        (b'{"content": "a", "b": 1}', r"no field 'text'; got: .*a\.jsonl, line 2, fields \['b', 'content'\]"),
        (b'{"text": null}', r"'text' is not a string; got: .*a\.jsonl, line 2: NoneType"),
        (b'{"text": "\\ud800"}', r"not Unicode; got: .*a\.jsonl, line 2"),
        (b'{"text": "abc\xff"}', r"not UTF-8; got: .*a\.jsonl, line 2, byte offset 28: .*iconv"),
    ],
)
def test_bad_jsonl_lines_are_errors_that_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_text_that_is_not_utf8_is_an_error_with_its_offset(tmp_path):
    with pytest.raises(DataError, match=r"not UTF-8; got: .*a\.txt, byte offset 4: b'\\xe9"):
        read(write(tmp_path / "a.txt", "café au lait".encode("latin1").replace(b"caf", b"caf ")))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_compression_is_an_error(tmp_path, kind):
    whole = gzip.compress(JSONL) if kind == "gz" else zstandard.compress(JSONL)
    for data in (whole[:-5], whole[:6], b"no such format, this is"):
        with pytest.raises(DataError, match=rf"damaged or cut off; got: .*a\.jsonl\.{kind}"):
            read(write(tmp_path / f"a.jsonl.{kind}", data))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": pa.array(TEXTS, type=kind)}), path)
    assert texts(path) == TEXTS
    assert read(path)[3].source == f"{path}:3"


def test_bad_parquet_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"]}), path)
    with pytest.raises(DataError, match=r"no column 'text'; got: .*a\.parquet, columns \['content'\]"):
        read(path)
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"several columns 'text'; got: .*a\.parquet"):
        read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"does not hold strings; got: .*a\.parquet, int64"):
        read(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"row without text; got: .*a\.parquet, row 1"):
        read(path)
    with pytest.raises(DataError, match=r"parquet input cannot be read; got: .*a\.parquet"):
        read(write(path, b"this is not parquet"))
