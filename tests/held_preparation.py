"""A preparation in a process of its own that stops at a place in the middle until the test lets it go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 120

# A place is a function that says that it is there, and waits for the end of a pipe.
_SCRIPT = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup
place, reached, go_on = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from launch.prepare_data import main
from pipeline.data import place as places, prepare

def hold():
    os.write(reached, b"x")
    os.read(go_on, 1)

def holding(function):
    def held(*arguments, **settings):
        hold()
        return function(*arguments, **settings)
    return held

if place == "reading":
    prepare.read_documents = holding(prepare.read_documents)
elif place == "written":
    prepare.write_store = (lambda write: lambda *a, **k: (write(*a, **k), hold())[0])(prepare.write_store)
elif place == "exchanging":
    places._put = holding(places._put)
sys.exit(main(sys.argv[4:]))
"""


class Held:
    """A running `launch/prepare_data.py`.

    Args:
        process: The process.
        go_on: What all wait at, until it is closed.
    """

    def __init__(self, process: subprocess.Popen[str], go_on: int) -> None:
        self.process = process
        self._go_on: int | None = go_on

    @property
    def workers(self) -> list[psutil.Process]:
        """All processes below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def let_go(self) -> None:
        """Lets all that wait go on, and all that come to the place later."""
        if self._go_on is not None:
            os.close(self._go_on)
        self._go_on = None

    def end(self) -> tuple[int, str, str]:
        """Waits for its end: exit status, standard output and error."""
        output, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, output, errors


@contextmanager
def held(place: str, words: Sequence[str], *, waiting: int = 1) -> Iterator[Held]:
    """Starts one, waits until so many of its processes have come to the place, and leaves none behind.

    Args:
        place: `reading`, `written` (the store is, in the work folder), or `exchanging` (the old store
            is put aside).
        words: The command line.
        waiting: How many are waited for.

    Yields:
        What has come to the place.
    """
    reached, say = os.pipe()
    wait, go_on = os.pipe()
    command = [sys.executable, "-c", _SCRIPT, place, str(say), str(wait), *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        pass_fds=[say, wait],
        start_new_session=True,
    )
    os.close(say)
    os.close(wait)
    run = Held(process, go_on)
    try:
        for _ in range(waiting):
            assert os.read(reached, 1) == b"x", process.communicate()[1][-4000:]  # nothing: all of them ended
        yield run
    finally:
        run.let_go()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        os.close(reached)


def all_end(processes: Sequence[psutil.Process]) -> bool:
    """Whether they all end within the time limit; one that nobody waits for counts as ended."""
    _, living = psutil.wait_procs(list(processes), timeout=TIMEOUT_S / 4)
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in living)
