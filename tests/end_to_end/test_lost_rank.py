"""A rank that is killed or stopped in training ends the whole job in time, and costs no whole checkpoint."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.running import has_ended, running
from tests.tiny_run import TinyRun

TIMEOUT_S = 15
SLACK_S = 10  # its last step before it waits, and the end of its process, on a machine with other work
LAUNCHER_S = 40  # it gives the other ranks up to 30 s


@pytest.mark.parametrize(
    ("lost", "by"),
    [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)],
    ids=["killed", "stopped", "stopped 0"],
)
def test_a_lost_rank_ends_the_job(lost: int, by: signal.Signals, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_run.write_config(
        tmp_path / "run.yaml",
        run,
        run={"collective_timeout_s": TIMEOUT_S},
        memory={"group_size": 2},
        train={"steps": 5000},
        checkpoint={"every_steps": 2},
    )
    with running(config, run) as job:
        job.wait_for_steps(5)
        victim, other = job.rank(lost), job.rank(1 - lost)
        os.kill(victim.pid, by)
        begun = time.monotonic()
        job.wait_for(lambda: has_ended(other), TIMEOUT_S + SLACK_S)
        took = time.monotonic() - begun
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        assert job.process.wait(LAUNCHER_S) != 0
    assert took < TIMEOUT_S + SLACK_S
    words = f"rank {lost} died or fell silent; its last sign: {'step' if lost else ''}"
    assert words in job.log.read_text()
    assert job.status["state"] == "failed" and words in job.status["reason"]
    assert (run / "checkpoints" / (run / "checkpoints" / "latest").read_text() / "manifest.json").is_file()
