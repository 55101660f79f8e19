"""Signals that ask a run to stop: SIGTERM, SIGINT and SIGUSR1 on any rank, or the end of the launcher.

The first one is taken up between two steps, by all ranks together: they save once and exit, or go on after SIGUSR1
where that is asked for. A second one stops at once, as does any before the first step, when there is nothing to save.

A thread acts on signals, not Python's own handlers: those wait until the main thread comes back from what it is in,
which may be a collective that never ends.

What launchers pass on (DeepSpeed 0.19, torch 2.13):

- `deepspeed` on one node ends by SIGTERM without a word to its child `deepspeed.launcher.launch`; that one passes
  SIGTERM and SIGINT on as SIGTERM to one rank after the other, kills each after 30 s, and exits with 1. It ends by
  SIGUSR1, and its ranks go on as orphans.
- `torchrun` passes on what `--signals-to-handle` names, kills after 30 s (`--shutdown-timeout`), and ends by others.
- Ctrl-C and `scancel` reach ranks and launchers alike, so that a rank gets the same wish twice.

Hence a rank watches over its launchers, and what follows within `ECHO_S` of the first signal is its echo.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pipeline.errors import EXIT_PREEMPTED

LAUNCHER_ENDED = "the launcher ended"
ASKS = ("SIGTERM", "SIGINT", LAUNCHER_ENDED, "SIGUSR1")
"""What can ask a run to stop; the first of several counts."""
ECHO_S = 2.0
_POLL_S = 1.0
_LAST_WORDS_S = 3.0
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LAUNCHERS = {"deepspeed", "ds", "torchrun", "deepspeed.launcher.runner", "deepspeed.launcher.launch"} | {
    "torch.distributed.run",
    "torch.distributed.launch",
}


class Signals:
    """Takes the signals of this process; a context manager, entered by the main thread.

    Args:
        usr1_stops: Whether SIGUSR1 stops the run after saving; else any number of them only ask for a checkpoint.
        leave: Ends this process with an exit code; for tests.
    """

    def __init__(self, *, usr1_stops: bool = True, leave: Callable[[int], None] = os._exit) -> None:
        self.usr1_stops, self._leave = usr1_stops, leave
        self._asked: str | None = None
        self._asked_at = 0.0
        self._in_steps = self._is_over = False
        self._before_end: list[Callable[[str], None]] = []
        self._ends_anyway: Callable[[], bool] = lambda: False
        self._launchers = launchers()
        self._old: Mapping[int, Any] = {}
        self._closed = threading.Event()

    @property
    def asked(self) -> str | None:
        """What asks this rank to stop or to save, one of `ASKS`, or None."""
        return self._asked

    def begin_steps(self) -> None:
        """From now on the first signal is taken up between two steps."""
        self._in_steps = True

    def heeded(self, asked: str) -> None:
        """What was asked for has been done, and the run goes on; another wish that came meanwhile stays."""
        if self._asked == asked:
            self._asked = None

    def all_done(self) -> None:
        """The run is over and saved: whoever still asks for its end has it."""
        self._is_over = True

    def before_end(self, tell: Callable[[str], None]) -> None:
        """Has `tell` called, with the reason, before a signal ends this process at once; it may take seconds."""
        self._before_end.append(tell)

    def unless(self, ends_anyway: Callable[[], bool]) -> None:
        """Signals do nothing while `ends_anyway`: a launcher that sees one rank fail sends them to the others."""
        self._ends_anyway = ends_anyway

    def __enter__(self) -> Signals:
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        # Only a signal that has a handler comes through the socket.
        self._old = {number: signal.signal(number, lambda *_: None) for number in _HANDLED}
        for number in _HANDLED:
            signal.siginterrupt(number, False)  # libraries in C need not expect interrupted calls
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._closed.set()
        self._writing.close()
        self._thread.join(_LAST_WORDS_S)

    def _take(self) -> None:
        """The thread: reads the numbers of signals as they come, and looks at the launchers in between."""
        with self._reading:
            while not self._closed.is_set():
                if not select.select([self._reading], [], [], _POLL_S)[0]:
                    self._look_at_launchers()
                    continue
                for number in self._reading.recv(64):
                    self._on(signal.Signals(number).name)

    def _look_at_launchers(self) -> None:
        if not all(map(_lives, self._launchers)):
            self._launchers = []
            self._on(LAUNCHER_ENDED)

    def _on(self, name: str) -> None:
        if self._is_over or self._ends_anyway():
            return
        if not self._in_steps:
            self._end(f"{name} before the first step")
        elif name == "SIGUSR1" and not self.usr1_stops:
            self._asked = self._asked or name
        elif self._asked is None or (self._asked == "SIGUSR1" and not self.usr1_stops):
            self._asked, self._asked_at = name, time.monotonic()
        elif name != LAUNCHER_ENDED and time.monotonic() - self._asked_at > ECHO_S:
            self._end(f"{name} after {self._asked}: stopped at once, without saving")

    def _end(self, words: str) -> None:
        """Ends this process, whatever its main thread is in; nothing that is told may keep it."""

        def tell_all() -> None:
            for tell in self._before_end:
                tell(words)

        telling = threading.Thread(target=tell_all, daemon=True)
        telling.start()
        telling.join(_LAST_WORDS_S)
        self._leave(EXIT_PREEMPTED)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def launchers() -> Sequence[psutil.Process]:
    """The nearest ancestors that are launchers of DeepSpeed or torch: without them this is an orphan nobody stops."""
    found = []
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            break
        # An interpreter, its options, and a script or `-m` and a module.
        if (
            not words
            or "python" not in Path(words[0]).name
            or not _LAUNCHERS & {Path(word).name for word in words[1:5]}
        ):
            break
        found.append(parent)
    return found
