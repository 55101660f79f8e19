"""A training whose ranks are killed again and again ends with the losses of one that was left alone."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.fault_injection import Job, Kill, Life, exact_record
from tests.tiny_run import TinyRun

KILLS, STEPS, EVERY_STEPS, SEED = 24, 60, 2, 20


@pytest.fixture(scope="module")
def lives(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Life], Path, Path]:
    """Every life of a run that was killed, its folder, and the folder of one that was not."""
    folder = tmp_path_factory.mktemp("faults")

    def job(name: str) -> Job:
        config = tiny_run.config(
            folder / name,
            memory={"group_size": 2},
            train={"steps": STEPS, "histogram_every_steps": 0},
            checkpoint={"every_steps": EVERY_STEPS, "keep": 3},
        )
        return Job(config, folder / f"notes of {name}")

    job("unbroken").finish()
    killed, numbers, found = job("killed"), random.Random(SEED), []
    for _ in range(KILLS):
        life = killed.live_and_die(Kill.draw(numbers))
        assert life is not None, "it ended before it was killed often enough: give it more steps"
        found.append(life)
    killed.finish()
    return found, folder / "killed", folder / "unbroken"


def test_the_losses_are_those_of_an_unbroken_run_to_the_last_bit(lives):
    _, killed, unbroken = lives
    expected = exact_record(unbroken)
    assert [record[0] for record in expected] == list(range(1, STEPS + 1))
    assert exact_record(killed) == expected


def test_no_checkpoint_that_was_whole_is_lost_and_every_life_goes_on_from_the_newest(lives):
    found, *_ = lives
    for life, after in itertools.pairwise(found):
        assert life.whole >= life.published, life
        assert after.resumed in (None, life.whole), (life, after)


def test_a_kill_costs_no_more_than_the_steps_since_the_last_whole_checkpoint(lives):
    found, *_ = lives
    # While a checkpoint is being written training goes on, up to the next one, which waits.
    assert max(life.lost for life in found) <= 2 * EVERY_STEPS


def test_kills_fell_everywhere(lives):
    found, *_ = lives
    assert len(found) == KILLS >= 20
    assert {life.kill.victim for life in found} == {0, 1}
    places = Counter(life.place for life in found)
    assert places["saving"] + places["publishing"] >= KILLS // 3, places
    assert places["training"] + places["starting"] >= 2, places
