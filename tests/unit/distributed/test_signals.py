"""Signals of one process: what asks, what is an echo, what stops at once, and which launchers are watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline.distributed import signals as module
from pipeline.distributed.signals import LAUNCHER_ENDED, Signals
from pipeline.errors import EXIT_PREEMPTED


class Left:
    """Takes the exit code that the process would have ended with."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self._has_left = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self._has_left.set()

    def wait(self, seconds: float) -> list[int] | None:
        return self.codes if self._has_left.wait(seconds) else None


@pytest.fixture()
def left() -> Left:
    return Left()


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.05)


def asked(signals, name):
    deadline = time.monotonic() + 5
    while signals.asked != name and time.monotonic() < deadline:
        time.sleep(0.01)
    return signals.asked == name


def test_a_first_signal_asks_its_echo_is_ignored_and_a_second_one_ends(left, monkeypatch):
    told: list[str] = []
    with Signals(leave=left) as signals:
        signals.before_end(told.append)
        signals.begin_steps()
        send(signal.SIGINT, signal.SIGTERM)
        assert asked(signals, "SIGINT") and left.wait(0.3) is None
        monkeypatch.setattr(module, "ECHO_S", 0.0)
        send(signal.SIGTERM)
        assert left.wait(5) == [EXIT_PREEMPTED]
    assert told == ["SIGTERM after SIGINT: stopped at once, without saving"]


def test_before_the_first_step_every_signal_ends(left):
    with Signals(leave=left):
        send(signal.SIGUSR1)
        assert left.wait(5) == [EXIT_PREEMPTED]


def test_whoever_is_told_cannot_keep_the_process(left, monkeypatch):
    monkeypatch.setattr(module, "_LAST_WORDS_S", 0.1)
    with Signals(leave=left) as signals:
        signals.before_end(lambda _: time.sleep(60))
        send(signal.SIGTERM)
        assert left.wait(5) == [EXIT_PREEMPTED]


def test_where_usr1_goes_on_it_may_come_often_and_gives_way_to_others(left, monkeypatch):
    monkeypatch.setattr(module, "ECHO_S", 0.0)
    with Signals(usr1_stops=False, leave=left) as signals:
        signals.begin_steps()
        send(signal.SIGUSR1, signal.SIGUSR1)
        assert asked(signals, "SIGUSR1")
        send(signal.SIGTERM)
        assert asked(signals, "SIGTERM")
        signals.heeded("SIGUSR1")
        assert signals.asked == "SIGTERM" and left.wait(0.2) is None
        signals.heeded("SIGTERM")
        assert signals.asked is None


def test_when_all_is_done_signals_are_ignored(left):
    with Signals(leave=left) as signals:
        signals.begin_steps()
        signals.all_done()
        send(signal.SIGTERM, signal.SIGTERM)
        assert left.wait(0.3) is None and signals.asked is None


def test_a_process_that_is_about_to_end_says_why_first(left):
    with Signals(leave=left) as signals:
        signals.unless(lambda: True)
        send(signal.SIGTERM)
        assert left.wait(0.3) is None
        signals.unless(lambda: False)
        send(signal.SIGTERM)
        assert left.wait(5) == [EXIT_PREEMPTED]


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_the_end_of_a_launcher_asks(left, monkeypatch):
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(module, "launchers", lambda: [psutil.Process(launcher.pid)])
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    with Signals(leave=left) as signals:
        signals.begin_steps()
        assert signals.asked is None
        launcher.kill()  # not waited for: a zombie has ended, too
        assert asked(signals, LAUNCHER_ENDED)
    launcher.wait()


def test_launchers_are_known_by_their_command_line(monkeypatch):
    lines = {
        "launch": ["/usr/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"],
        "runner": ["/usr/bin/python3", "/usr/bin/deepspeed", "launch/train.py"],
        "shell": ["bash", "-c", "python deepspeed launch/train.py"],
    }

    class Parent:
        def __init__(self, name):
            self.name = name

        def cmdline(self):
            return lines[self.name]

    monkeypatch.setattr(psutil.Process, "parents", lambda self: [Parent(name) for name in lines])
    assert [parent.name for parent in module.launchers()] == ["launch", "runner"]
