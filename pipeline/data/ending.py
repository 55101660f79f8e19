"""How a preparation ends before its time: its workers end with it, and a signal leaves nothing of it behind.

A thread acts on signals, not Python's own handlers: those wait until the main thread comes back from what it is in,
which may be the tokenizing of a whole book, and what they raise is lost where Python ignores exceptions.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ECHO_S = 2.0
"""What follows sooner after a signal is its echo: a terminal and a launcher both send one."""
_POLL_S = 1.0
_KILLING_S = 10.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
_are_stillborn = False
_parent: tuple[int, int] | None = None  # process and thread whose forked children end with it, while it has workers


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP end this process with 128 + their number, after undoing what was begun.

    A context manager, entered by the main thread; in another thread signals do what they did before. A signal that
    was ignored before (`nohup`) stays so. A second one, some seconds later, does not wait for the undoing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._deciding = threading.Lock()
        self._stopping = self._too_late = False
        self._old: Mapping[int, Any] = {}
        self._closed = threading.Event()

    @contextlib.contextmanager
    def undoing(self, undo: Callable[[], None]) -> Iterator[None]:
        """Has something undone at the end of the block or, by another thread, when a signal ends the process in it."""
        self._undo.append(undo)
        try:
            yield
        finally:
            undo()
            self._undo.remove(undo)

    def on_signal(self, undo: Callable[[], None]) -> None:
        """Has something undone when a signal ends the process, and only then."""
        self._undo.append(undo)

    def too_late(self) -> None:
        """From here on signals are not heeded: what follows takes a moment, and must not be cut in two."""
        with self._deciding:
            self._too_late = not self._stopping
        if self._stopping:
            self._wait_for_the_end()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        # Only a signal that has a handler comes through the socket.
        self._old = {number: signal.signal(number, lambda *_: None) for number in heeded}
        for number in heeded:
            signal.siginterrupt(number, False)
        threading.Thread(target=self._take, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stopping:  # what failed may have failed because its workers were ended
            self._wait_for_the_end()
        if not self._old:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._closed.set()
        self._writing.close()

    def _take(self) -> None:
        """The thread: reads the numbers of signals as they come."""
        since: float | None = None
        with self._reading:
            while not self._closed.is_set():
                if not select.select([self._reading], [], [], _POLL_S)[0]:
                    continue
                for number in self._reading.recv(64):
                    if number not in self._old:
                        continue
                    if since is None:
                        since = time.monotonic()
                        threading.Thread(target=self._stop, args=[number], daemon=True).start()
                    elif self._stopping and time.monotonic() - since > _ECHO_S:
                        os._exit(128 + number)

    def _stop(self, number: int) -> None:
        with self._deciding:
            if self._too_late:
                return
            self._stopping = True
        try:
            _end_children()
            for undo in reversed(self._undo):
                with contextlib.suppress(Exception):  # the main thread undoes the same meanwhile
                    undo()
            print(f"\nstopped by {signal.Signals(number).name}: no store was written", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + number)  # the main thread waits for this

    def _wait_for_the_end(self) -> None:
        threading.Event().wait()


def ignore_signals() -> None:
    """For a process that has done all: an interpreter takes a moment to end, in which a signal would make it fail."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_children() -> None:
    """Kills all processes below this one. A pool goes on making new ones, which end by themselves from here on."""
    global _are_stillborn
    _are_stillborn = True
    with contextlib.suppress(psutil.Error):
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=_KILLING_S)


@contextlib.contextmanager
def workers_end_with_this_process() -> Iterator[None]:
    """Processes that this thread forks inside are killed when this one ends, however it ends, SIGKILL included."""
    global _parent
    before, _parent = _parent, (os.getpid(), threading.get_ident())
    try:
        yield
    finally:
        _parent = before


def _end_with_parent() -> None:
    """Runs in every forked child, before anything else does."""
    global _parent
    parent, _parent = _parent, None
    if _are_stillborn:
        os._exit(1)
    if parent is None:
        return
    signal.set_wakeup_fd(-1)  # or a signal to a worker would be taken for one to the process that started it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent ends its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which is how a pool ends its workers
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process, thread = parent
    if threading.get_ident() != thread:
        return  # a pool's thread replaces a worker that died; the kernel would kill it with that thread, locks held
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


os.register_at_fork(after_in_child=_end_with_parent)
