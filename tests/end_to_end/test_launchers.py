"""Signals to `deepspeed` and to what it started: the run is saved, says why it ended, and goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.status import main as show_status
from tests.end_to_end.running import Running, has_ended, running
from tests.tiny_run import TinyRun

ENDING_S = 60


def to_all(job: Running) -> None:
    """As Ctrl-C does; DeepSpeed's launcher then sends SIGTERM to its ranks, too."""
    os.killpg(job.process.pid, signal.SIGINT)


def to_launcher(job: Running) -> None:
    job.process.send_signal(signal.SIGTERM)


def to_one_rank(job: Running) -> None:
    job.rank(1).terminate()


PARTS: list[tuple[Callable[[Running], None], set[str], int | None]] = [  # how, the reason, the launcher's exit code
    (to_all, {"SIGINT", "SIGTERM"}, None),  # whichever comes first; DeepSpeed's two launchers end each in its way
    (to_launcher, {"the launcher ended"}, -signal.SIGTERM),
    (to_one_rank, {"SIGTERM"}, 75),
]


def test_a_run_is_saved_whoever_gets_the_signal(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny_run.write_config(tmp_path / "run.yaml", run, train={"steps": 5000}, checkpoint={"every_steps": 0})
    for ask, reasons, code in PARTS:
        with running(config, run) as job:
            job.wait_for_steps(2)
            ranks = [job.rank(0), job.rank(1)]
            show_status([str(run)])
            assert "  running  " in capsys.readouterr().out
            ask(job)
            ended = job.process.wait(ENDING_S)
            job.wait_for(lambda ranks=ranks: all(map(has_ended, ranks)), ENDING_S)  # type: ignore[misc]
        assert ended == code or (code is None and ended != 0)
        assert job.status["state"] == "preempted" and job.status["reason"] in reasons, job.log.read_text()[-4000:]
        assert job.status["step"] == job.steps > job.begins_after
        assert (run / "checkpoints" / "latest").read_text() == f"step_{job.steps:08d}"
    show_status([str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["run", "state", "step", "last", "sign", "ranks", "host", "reason"]
    assert shown[1].split()[:3] == [str(run), "preempted", f"{job.steps}/5000"] and shown[1].endswith("SIGTERM")
