"""One job at a time in a run folder, and no lock that outlives its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.errors import TrainingError
from pipeline.training.job.run_lock import RunLock, is_held

HOLD = (
    "import sys; from pathlib import Path; from pipeline.training.job.run_lock import RunLock;"
    "lock = RunLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture()
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    assert is_held(tmp_path) is True
    words = (
        rf'another job writes into the run folder; got: .*lock is held by .*"host": .*"pid": {holder.pid}.*; do: wait'
    )
    with pytest.raises(TrainingError, match=words):
        RunLock(tmp_path).acquire()


def test_a_killed_job_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert is_held(tmp_path) is False
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.acquire()
    lock.release()
    assert is_held(tmp_path) is False


def test_without_a_lock_file_nothing_is_known(tmp_path):
    assert is_held(tmp_path) is None
