"""Invariant 1 with both engines, ZeRO-2 and ZeRO-3, over 20 steps: a group of any size trains as one rank does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.config.schema import Config
from tests.distributed.engine_runs import assert_same_training, of, with_gradients
from tests.distributed.sharded_training import CLEAR_CHOICE, measured_choices
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

pytestmark = pytest.mark.timeout(600)  # one fixture trains everything: two minutes of one core's work
STEPS, SEGMENTS = 20, 4  # memory of 64 tokens is full after the first step
# Adam makes a whole step out of the sign of a gradient that is nearly zero, which is rounding, unless epsilon is large.
TRAIN = {"steps": STEPS, "segments_per_step": SEGMENTS, "adam_epsilon": 0.01, "learning_rate": 0.001}
LATER_TOLERANCE = 2e-3  # gradients, once weights differ in their last bits
# The seeds are those of orders of documents in which every choice of chunks is clear.
CASES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "lane": {"run": {"seed": 11}},
    "document": {
        "run": {"seed": 5},
        "memory": {"scope": "document", "position": "true"},
        "sidenet": {"activation_checkpointing": True},
    },
    "group": {"run": {"seed": 4}, "memory": {"scope": "group", "tokens": 32}},
    "paper": {
        "run": {"seed": 14},
        "memory": {"position": "none"},
        "sidenet": {"layout": "uniform", "memory_layers": None, "fusion": "gate"},
    },
}
# World and group size. Two groups each remember their own lanes, so that scope `group` would not be one bank.
WORLDS: Mapping[str, tuple[int, int]] = {"2": (2, 2), "4": (4, 4), "two of 2": (4, 2)}
RUNS = [(world, case) for world in WORLDS for case in CASES if world != "two of 2" or case != "group"]


def train_all(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """Trains with one configuration after another."""
    return {name: with_gradients(config) for name, config in configs.items()}


def train_all_and_measure(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """The same on one rank, which also finds out how narrow its choices were."""
    found = {}
    for name, config in configs.items():
        with measured_choices() as gaps:
            found[name] = {**with_gradients(config), "narrowest": min(gaps)}
    return found


@pytest.fixture(scope="module")
def found(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """World and case -> what each rank saw."""
    folder = tmp_path_factory.mktemp("sharded engines")

    def config(world: str, case: str, group_size: int) -> Config:
        sections: dict[str, Mapping[str, Any]] = {**CASES[case], "train": TRAIN, "checkpoint": {"every_steps": 0}}
        sections |= {"data": {"lanes": 2}, "sidenet": {"memory_layers": [3], **sections.get("sidenet", {})}}
        sections["memory"] = {**sections.get("memory", {}), "group_size": group_size}
        return tiny_run.config(folder / f"{world} {case}", profile="deep", **sections)

    ran: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for size in (1, 2, 4):
        worlds = {"1": 1} if size == 1 else {name: group for name, (world, group) in WORLDS.items() if world == size}
        cases = [(world, case) for world in worlds for case in CASES if (world, case) in RUNS or world == "1"]
        configs = {f"{world}/{case}": config(world, case, worlds[world]) for world, case in cases}
        work = train_all_and_measure if size == 1 else train_all
        ranks = run_ranks(work, size, configs, init_process_group=False, timeout_s=280)
        ran |= {(world, case): [rank[f"{world}/{case}"] for rank in ranks] for world, case in cases}
    return ran


@pytest.mark.parametrize(("world", "case"), RUNS)
def test_a_group_of_any_size_trains_as_one_rank_does(
    found: dict[tuple[str, str], list[dict[str, Any]]], world: str, case: str
) -> None:
    (alone,) = found["1", case]
    assert len(set(of(alone["metrics"], "loss"))) == STEPS
    assert alone["metrics"][-1]["memory_share"] > 0
    assert alone["narrowest"] > CLEAR_CHOICE, "a choice hangs on rounding: take another seed"
    for rank in found[world, case]:
        assert rank["metrics"][-1]["traffic_partials_bytes"] > 0, "memory must be read in another rank's shard"
        assert_same_training(rank, alone, later=LATER_TOLERANCE)
