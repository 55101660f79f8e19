"""A rank that is killed in training ends the whole job, in time, and costs no whole checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from pipeline.metrics.record import read_metrics
from tests.end_to_end.test_train import ROOT, TIMEOUT_S, command_line
from tests.tiny_run import TinyRun

COLLECTIVE_TIMEOUT_S = 15
LIMIT_S = 90  # for the time-out, the grace after it, and the launcher's own


def rank_one(launcher: psutil.Process) -> psutil.Process | None:
    """The process of rank 1."""
    ranks = [child for child in launcher.children(recursive=True) if "--local_rank=1" in child.cmdline()]
    return ranks[0] if ranks else None


def test_a_killed_rank_ends_the_job(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sections = {"run": {"collective_timeout_s": COLLECTIVE_TIMEOUT_S}, "train": {"steps": 5000}}
    config = tiny_run.write_config(tmp_path / "run.yaml", run, memory={"group_size": 2}, **sections)
    command, environment = command_line(["--config", str(config), "--checkpoint.every_steps", "2"], ranks=2)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 5:
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()
                time.sleep(0.2)
            lost = rank_one(psutil.Process(process.pid))
            assert lost is not None
            os.kill(lost.pid, signal.SIGKILL)
            assert process.wait(LIMIT_S) != 0
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()
    assert "exits with return code = -9" in log.read_text()
    assert (run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "manifest.json").is_file()
