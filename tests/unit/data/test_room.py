"""Room on the disk: what is refused before the work, what is warned of, and the words when it is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple

import datasets
import multiprocess
import pytest

from pipeline.data.room import check_room, in_units, system_errors_in_words
from pipeline.errors import DataError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Says how many bytes are free."""
    return lambda count, total=10**9: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, 0, count))


def sized(folder, name, size):
    path = folder / name
    path.touch()
    os.truncate(path, size)
    return path


def test_text_that_cannot_fit_is_refused_before_the_work(tmp_path, free):
    files = [sized(tmp_path, "a.txt", 6_000_000), sized(tmp_path, "b.TXT", 4_000_000)]
    free(19_000_000)
    with pytest.raises(DataError) as error:
        check_room(files, tmp_path)
    assert f"too little room; got: 19.0 MB free in {tmp_path}; expected: 30.0 MB, estimated from" in str(error.value)
    free(30_000_000)
    assert check_room(files, tmp_path) == 30_000_000
    free(0, total=0)  # a file system that does not say
    check_room(files, tmp_path)


@pytest.mark.parametrize(
    ("name", "needed"), [("a.jsonl", 30), ("a.jsonl.gz", 90), ("a.jsonl.ZST", 90), ("a.parquet", 60)]
)
def test_what_is_only_guessed_is_warned_of(tmp_path, free, caplog, name, needed):
    files = [sized(tmp_path, name, 10_000_000)]
    free(needed * 10**6)
    assert check_room(files, tmp_path) == needed * 10**6 and caplog.text == ""
    free(1)
    check_room(files, tmp_path)
    assert f"0.0 MB free in {tmp_path}, {needed}.0 MB needed, estimated" in caplog.text


def caught(folder, error, cause=None):
    with pytest.raises(DataError) as found, system_errors_in_words(folder, needed=5 * 10**9):
        raise error from cause
    return str(found.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_wherever_it_stands_in_the_chain(tmp_path, free, number):
    free(2_500_000)
    sized(tmp_path, "written", 0)
    (tmp_path / "written").write_bytes(b"x" * 3_000_000)
    full = OSError(number, os.strerror(number))
    words = f"disk of the output is full; got: {os.strerror(number)}: 2.5 MB free in {tmp_path}, where this preparation"
    for said in (caught(tmp_path, full), caught(tmp_path, ValueError("x"), full)):
        assert words in said and "expected: about 5.0 GB in all, estimated" in said and "3." in said
    remote = type("RemoteTraceback", (Exception,), {})(f'"""\nTraceback\n{type(full).__name__}: {full}\n\nmore\n"""')
    assert words in caught(tmp_path, datasets.exceptions.DatasetGenerationError("x"), remote)


def test_other_refusals_of_the_system(tmp_path):
    assert "no more processes or memory" in caught(tmp_path, MemoryError())
    assert "fewer --workers" in caught(tmp_path, BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
    assert "the system refused" in caught(tmp_path, OSError(errno.EIO, "Input/output error"))
    for lost in (RuntimeError("One of the subprocesses has abruptly died"), EOFError(), multiprocess.TimeoutError()):
        assert "a worker process was ended from outside" in caught(tmp_path, lost)


def test_our_own_errors_keep_their_words_and_bugs_their_traceback(tmp_path):
    assert caught(tmp_path, DataError("mine"), OSError(errno.ENOSPC, "full")) == "mine"
    for bug in (KeyError("x"), RuntimeError("x")):
        with pytest.raises(type(bug)), system_errors_in_words(tmp_path, needed=1):
            try:
                raise OSError(errno.EIO, "in passing")
            except OSError:
                raise bug  # noqa: B904


def test_sizes_for_people():
    assert [in_units(size) for size in (0, 1_234_567, 999_900_000, 12_345_678_901)] == [
        "0.0 MB",
        "1.2 MB",
        "999.9 MB",
        "12.3 GB",
    ]
