"""Bytes to text: other encodings and NUL characters are refused with what to do."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.inputs import Document, read_documents
from pipeline.errors import DataError

TEXT = "The harbour was old."
LINE = json.dumps({"text": TEXT}) + "\n"


def read(path, data=None, **settings):
    if data is not None:
        path.write_bytes(data)
    return list(read_documents([str(path)], **settings))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_says_what_to_convert_from(tmp_path, encoding, kind):
    raw = ("\ufeff" + (TEXT if kind == "a.txt" else LINE)).encode(encoding)
    name = encoding[:6]
    with pytest.raises(DataError) as error:
        read(tmp_path / kind, gzip.compress(raw) if kind.endswith("gz") else raw)
    assert f"an input is {name.upper()}, not UTF-8; got: {tmp_path / kind}" in str(error.value)
    assert f"do: convert it: iconv -f {name} -t utf-8" in str(error.value) and "latin1" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [TEXT, "Ein Hafen, Übersee €", LINE])
def test_utf16_without_a_mark_is_guessed(tmp_path, encoding, text):
    with pytest.raises(DataError) as error:
        read(tmp_path / ("a.jsonl" if text == LINE else "a.txt"), text.encode(encoding))
    assert f"iconv -f {encoding.replace('-', '', 2).replace('utf16', 'utf-16')} -t utf-8" in str(error.value)
    assert "latin1" not in str(error.value)


def test_nul_characters_are_refused_with_file_and_place(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(
        DataError, match=r"NUL characters; got: .*a\.txt: 2 of 7 characters, the first at 3;.*--drop-nul"
    ):
        read(path, b"abc\0de\0")
    with pytest.raises(DataError, match="do: see whether the file is damaged; else give --drop-nul"):
        read(path, TEXT.encode() + b"\0")
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"NUL characters; got: .*a\.jsonl, line 2: 1 of 3 characters, the first at 1"):
        read(path, LINE.encode() + b'{"text": "a\\u0000b"}\n')
    with pytest.raises(DataError, match=r"NUL characters; got: .*a\.jsonl, line 2: 9 of 9 characters, the first at 0"):
        read(path, LINE.encode() + b"\0" * 9)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [TEXT, "a\0b"]}), path)
    with pytest.raises(DataError, match=r"NUL characters; got: .*a\.parquet, row 1: 1 of 3 characters, the first at 1"):
        read(path)


def test_nul_characters_are_dropped_and_counted_by_choice(tmp_path):
    path = tmp_path / "a.txt"
    assert read(path, b"abc\0de\0", drop_nul=True) == [Document("abcde", str(path), 2)]
    path = tmp_path / "a.jsonl"
    lines = LINE.encode() + b'\0{"text": "a\\u0000b"}\n\0\0\n'
    assert read(path, lines, drop_nul=True) == [
        Document(TEXT, f"{path}:1", 0),
        Document("ab", f"{path}:2", 2),
        Document("", f"{path}:3", 2),
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [TEXT, "a\0b"]}), path)
    assert [document.num_nul for document in read(path, drop_nul=True)] == [0, 1]


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9.jsonl", b"caf\xe9.parquet"])
def test_a_file_whose_name_is_not_utf8_is_read_and_named_readably(tmp_path, name):
    path = tmp_path / name.decode("utf-8", "surrogateescape")
    if path.suffix == ".parquet":
        with open(path, "wb") as file:
            pq.write_table(pa.table({"text": [TEXT]}), file)
    else:
        path.write_text(TEXT if path.suffix == ".txt" else LINE)
    (document,) = read(path)
    assert document.text == TEXT and rf"/caf\xe9{path.suffix}" in document.source


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_gone_or_forbidden_meanwhile_is_an_error(tmp_path, kind):
    with pytest.raises(DataError, match=f"cannot be read; got: {tmp_path / kind} .*No such file"):
        read(tmp_path / kind)
