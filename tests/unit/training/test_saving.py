"""When a run is saved: by steps, by rank 0's clock, when asked, at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.training.saving import Saving
from tests.tiny_config import tiny_config


class Recording:
    """Checkpoints that only say what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def save(self, step: int, owners: object) -> None:
        self.calls.append(step)

    def publish_if_written(self, *, wait: bool = False) -> None:
        self.calls += ["all written"] if wait else []


def saved(*, steps, seconds=1.0, asked=(), **wanted):
    """What is asked of the checkpoints of a run whose steps take some seconds each."""
    checkpoints, now = Recording(), [100.0]
    run: Any = SimpleNamespace(config=tiny_config(checkpoint=wanted), checkpoints=checkpoints, owners=[])
    saving = Saving(run, clock=lambda: now[0])
    for step in range(1, steps + 1):
        now[0] += seconds
        saving.after_step(step, last=step == steps, asked=step in asked)
    return checkpoints.calls


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [7]),
        ({"every_steps": 3}, [3, 6, 7]),
        ({"every_minutes": 0.5}, [3, 6, 7]),  # a step takes 11 seconds: 33 is the first multiple past 30
        ({"every_minutes": 0.5, "every_steps": 4}, [3, 4, 7]),  # the minutes count from the newest save
        ({"asked": (2, 5)}, [2, 5, 7]),
        ({"asked": (2,), "every_minutes": 0.5}, [2, 5, 7]),
    ],
)
def test_a_run_is_saved_when_it_is_time_and_ends_with_everything_written(wanted, expected):
    assert saved(steps=7, seconds=11.0, **wanted) == [*expected, "all written"]
