"""What a job says of errors that are not its own."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.metrics.folder import read_evaluation
from pipeline.training.job.job import Job
from pipeline.training.summary import summary
from tests.tiny_config import tiny_config


@pytest.fixture()
def job(tmp_path):
    job = Job(tiny_config(run={"output_dir": str(tmp_path / "run")}), None)
    job.begin(0)
    job.claim(0)
    yield job
    job.end("finished", None)


def allocate():
    torch.empty(2**62, dtype=torch.uint8)


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device")


def no_tensorboard(folder):
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder / "tensorboard" / "events").encode())


def no_memory():
    raise MemoryError("Unable to allocate 7 TiB")


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (allocate, "rank 0 has not enough memory; got: RuntimeError: .*DefaultCPUAllocator.*do: see .*launch/plan.py"),
        (no_memory, "rank 0 has not enough memory; got: MemoryError: Unable .*launch/plan.py"),
        (
            no_room,
            r"rank 0 could not write; .*No space left on device; free: [\d,]+ bytes in /.*/run; do: see to the disk",
        ),
    ],
)
def test_what_a_user_can_mend_is_said_in_words(job, work, words):
    with pytest.raises(TrainingError, match=words), job.ending_together():
        work()
    assert json.loads((job.folder / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("work", [no_room, no_memory])
def test_a_folder_that_is_gone_is_the_reason(job, work):
    job.check_folder()
    shutil.rmtree(job.folder)
    with pytest.raises(
        TrainingError, match="the run folder was removed while the run trained, .*do: put the folder back"
    ):
        job.check_folder()
    with pytest.raises(TrainingError, match="the run folder was removed while the run trained"), job.ending_together():
        work()
    assert not job.folder.exists()


def test_a_file_of_the_run_folder_that_is_gone_is_named(job):
    with (
        pytest.raises(TrainingError, match="rank 0 could not write; .*tensorboard/events.*do: see"),
        job.ending_together(),
    ):
        no_tensorboard(job.folder)


def test_our_own_bugs_stay_what_they_are(job):
    with pytest.raises(KeyError), job.ending_together():
        raise KeyError("bug")


def test_a_foreign_file_that_is_missing_is_our_bug(job):
    with pytest.raises(FileNotFoundError), job.ending_together():
        Path("/nowhere").read_text()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"step": 10'])
def test_a_damaged_evaluation_is_made_anew(tmp_path, content, caplog):
    (tmp_path / "evaluation.json").write_bytes(content)
    (tmp_path / "evaluation.txt").write_bytes(b"table \xff")
    assert read_evaluation(tmp_path) == {}
    assert "evaluation.json is damaged and does not count" in caplog.text
    assert "run folder: " in summary(tmp_path)
