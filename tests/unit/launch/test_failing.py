"""How a launcher ends: words for users, a traceback for our own bugs, one voice a machine, no waiting for others."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.failing import explained
from pipeline.errors import DataError, TrainingError


@pytest.fixture()
def end(monkeypatch, capsys):
    """Ends as a rank of a job; returns exit code, whether it left at once, and what it said."""

    def leave_at_once(code):
        raise SystemExit(("at once", code))

    def ended(error, *, rank, local_rank, world_size):
        monkeypatch.setattr(os, "_exit", leave_at_once)
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", world_size)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as caught, explained():
            raise error
        code = caught.value.code
        return (code[1], True) if isinstance(code, tuple) else (code, False), capsys.readouterr().err

    return ended


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(0, 0, True), (1, 1, False), (8, 0, True)])
def test_one_rank_of_each_machine_says_what_is_wrong(end, rank, local_rank, speaks):
    (code, at_once), said = end(DataError("no data", do="make some"), rank=rank, local_rank=local_rank, world_size=16)
    assert (code, at_once) == (1, True)
    assert said == ("\nerror: no data; do: make some\n" if speaks else "")


def test_a_rank_that_is_named_speaks(end):
    error = TrainingError("rank 3 could not write")
    assert end(error, rank=3, local_rank=3, world_size=8)[1] == "\nerror: rank 3 could not write\n"


def test_a_rank_alone_ends_in_order(end):
    assert end(DataError("no data"), rank=0, local_rank=0, world_size=1) == ((1, False), "\nerror: no data\n")


def test_every_rank_shows_where_our_own_bugs_are(end):
    (code, at_once), said = end(KeyError("bug"), rank=5, local_rank=1, world_size=8)
    assert (code, at_once) == (1, True)
    assert "rank 5 failed:\nTraceback" in said and "KeyError: 'bug'" in said


def test_nothing_happens_without_error(capsys):
    with explained():
        pass
    assert capsys.readouterr().err == ""


class FullLog(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")


def test_a_log_on_a_full_disk_keeps_nobody(end, monkeypatch):
    monkeypatch.setattr(sys, "stderr", FullLog())
    assert end(DataError("no data"), rank=0, local_rank=0, world_size=16)[0] == (1, True)


@pytest.mark.parametrize("status", [0, 75])
def test_a_process_that_is_done_runs_exit_handlers_and_not_the_end_of_the_interpreter(status):
    code = """
import atexit, sys
from launch.failing import end_well
class Held:
    def __del__(self):
        print("the interpreter ends", flush=True)
held = Held()
atexit.register(print, "an exit handler")
print("done")
end_well(int(sys.argv[1]))
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(status)], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "done\nan exit handler\n", "")
