"""The Python library's sources as text: collected into a folder that nobody had."""

from __future__ import annotations

import pytest

from pipeline.data.stdlib import collect
from pipeline.errors import DataError


def test_library_sources_are_collected(tmp_path):
    count = collect(tmp_path / "deep" / "library", min_bytes=100_000)
    assert count == len(list((tmp_path / "deep" / "library").glob("*.txt"))) > 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["library"]


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="the output exists already; got: .*; do: name a folder"):
        collect(tmp_path, min_bytes=100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
