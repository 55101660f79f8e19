"""A training that a test starts in the background, watches and disturbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.metrics.record import read_metrics
from tests.end_to_end.test_train import ROOT, TIMEOUT_S, command_line


class Running:
    """A running `deepspeed launch/train.py`.

    Args:
        process: The launcher.
        run: The run folder.
        log: Where everything is printed.
    """

    def __init__(self, process: subprocess.Popen[bytes], run: Path, log: Path) -> None:
        self.process, self.run, self.log = process, run, log
        self.begins_after = self.steps

    @property
    def steps(self) -> int:
        """The last step on record."""
        return max((record["step"] for record in read_metrics(self.run)), default=0)

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says."""
        found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # a compiler that has just ended
                if f"--local_rank={number}" in child.cmdline():
                    return child
        raise AssertionError(self.log.read_text()[-4000:])

    def wait_for(self, what: Callable[[], bool], limit_s: float = TIMEOUT_S) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def wait_for_steps(self, number: int) -> None:
        """Waits until it has done some steps."""

        def done() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            return self.steps >= self.begins_after + number

        self.wait_for(done)


def has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@contextmanager
def running(config: Path, run: Path) -> Iterator[Running]:
    """Starts two ranks in a session of their own, and leaves none behind."""
    command, environment = command_line(["--config", str(config)], ranks=2)
    log = config.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment, start_new_session=True)
    try:
        yield Running(process, run, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
