"""Phases add up to the time that passed, on a clock that the test moves."""

from __future__ import annotations

from functools import partial

import pytest

from pipeline.metrics.phases import PhaseTimer, events_of


class Clock:
    """Stands still between calls of `pass_time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_blocks_of_one_name_add_up(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    for _ in range(2):
        with timer.phase("backbone"):
            clock.pass_time(3)
        clock.pass_time(5)  # outside every phase
    assert timer.collect() == {"backbone": 6}


def test_an_inner_phase_is_taken_from_the_outer_one(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer.phase("sidenet"):
        clock.pass_time(1)
        with timer.phase("read"):
            clock.pass_time(10)
            with timer.phase("search"):
                clock.pass_time(100)
        clock.pass_time(1000)
    assert timer.collect() == {"sidenet": 1001, "read": 10, "search": 100}


def test_a_phase_within_itself_counts_once(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer.phase("backward"):
        clock.pass_time(1)
        with timer.phase("backward"):
            clock.pass_time(2)
    assert timer.collect() == {"backward": 3}


def test_collect_starts_anew_even_in_an_open_phase(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer.phase("data"):
        clock.pass_time(4)
        assert timer.collect() == {"data": 4}
        clock.pass_time(2)
    assert timer.collect() == {"data": 2}
    assert timer.collect() == {}


def test_an_exception_closes_its_phases(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with pytest.raises(ValueError, match="stop"), timer.phase("loss"), timer.phase("inner"):
        clock.pass_time(7)
        raise ValueError("stop")
    clock.pass_time(50)
    assert timer.collect() == {"loss": 0, "inner": 7}


class Event:
    """As an accelerator's: its time is known once what was queued before it is done."""

    waited = 0

    def __init__(self, clock: Clock, *, enable_timing: bool) -> None:
        assert enable_timing
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at - self.at)


def test_an_accelerator_is_waited_for_only_when_phases_are_collected(clock: Clock) -> None:
    timer = PhaseTimer(**events_of(partial(Event, clock)))
    for _ in range(3):
        with timer.phase("backbone"):
            clock.pass_time(9)
    assert Event.waited == 0
    assert timer.collect() == {"backbone": 27}
    assert Event.waited > 0
