"""What status.json says, when it is written, and what a full or read-only disk leaves of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from datetime import datetime, timedelta, timezone

import pytest

from pipeline.errors import DataError
from pipeline.files import write_text
from pipeline.training.job import status as module
from pipeline.training.job.status import StatusFile, read_status


@pytest.fixture()
def file(tmp_path):
    status = StatusFile(tmp_path / "run", steps=9)
    status.begin(3, world_size=4, write=True)
    return status


def read(file):
    return json.loads((file.folder / "status.json").read_text())


def test_a_run_says_how_it_goes_and_how_it_ended(file):
    found = read(file)
    now = datetime.now(timezone.utc)
    assert timedelta(0) <= now - datetime.fromisoformat(found.pop("time")) < timedelta(seconds=30)
    assert found.pop("host")
    assert found == {"state": "running", "step": 3, "steps": 9, "reason": None, "world_size": 4}
    file.at(5, write=False)
    file.end("preempted", "SIGTERM")
    assert (read(file)["state"], read(file)["step"], read(file)["reason"]) == ("preempted", 5, "SIGTERM")
    status = read_status(file.folder)
    assert status is not None and status.age_s < 30


def test_the_first_end_counts(file):
    file.end("preempted", "SIGTERM")
    file.end("failed", "the others had gone")
    file.at(9, write=True)
    assert read(file)["reason"] == "SIGTERM"


def test_signs_of_life_come_now_and_then(file, monkeypatch):
    file.at(4, write=True)
    assert read(file)["step"] == 3
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    file.at(5, write=True)
    assert read(file)["step"] == 5


def test_nothing_is_written_before_the_folder_is_the_runs(tmp_path):
    status = StatusFile(tmp_path / "run", steps=9)
    status.end("failed", "refused")
    assert not (tmp_path / "run").exists() and read_status(tmp_path / "run") is None


def test_something_else_is_refused(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running"}')
    with pytest.raises(DataError, match="status.json is not the status of a run; got: .*; do: see the log"):
        read_status(tmp_path)


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "text"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert [found.name for found in tmp_path.iterdir()] == ["text"] and path.read_text() == "old"


@pytest.fixture()
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (that takes root and CAP_SYS_ADMIN)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_still_takes_the_reason(small_disk):
    status = StatusFile(small_disk, steps=9)
    status.begin(0, world_size=1, write=True)
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    status.end("failed", "the disk is full, and here it stands nevertheless")
    assert read(status)["reason"] == "the disk is full, and here it stands nevertheless"


def test_where_nothing_can_be_written_the_log_has_the_reason(small_disk, caplog):
    status = StatusFile(small_disk, steps=9)
    status.begin(0, world_size=1, write=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with caplog.at_level(logging.ERROR):
        status.end("failed", "the disk is ill")
    assert "status.json cannot be written" in caplog.text and "failed, the disk is ill" in caplog.text
    assert read(status)["state"] == "running"


def test_a_folder_that_was_removed_is_not_made_again(file, caplog):
    (file.folder / "status.json").unlink()
    file.folder.rmdir()
    with caplog.at_level(logging.ERROR):
        file.end("failed", "the run folder was removed")
    assert not file.folder.exists()
    assert "status.json cannot be written" in caplog.text and "failed, the run folder was removed" in caplog.text
