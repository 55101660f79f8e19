"""Going on with other numbers of ranks and other memory groups: the losses are those of the run that never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import Config
from pipeline.metrics.record import read_metrics
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

TOLERANCE = 1e-5  # float32, nats; sums over ranks and shards are taken in another order
SEGMENTS_PER_STEP = 4
# 152 tokens: not a whole number of segments of 16, and forgotten from step 3 on.
MEMORY: Mapping[str, Any] = {"tokens": 152}


@dataclass(frozen=True)
class Leg:
    """A part of a run.

    Attributes:
        world_size: Ranks.
        stop: Last step.
    """

    world_size: int
    stop: int


LEGS = (Leg(1, 3), Leg(2, 5), Leg(4, 7), Leg(2, 8), Leg(2, 10))


@dataclass(frozen=True)
class Case:
    """A run that moves from world to world.

    Attributes:
        profile: Of the tiny run.
        group_sizes: Of each leg.
        memory: `checkpoint.memory` of each leg.
        scope: `memory.scope`.
    """

    profile: str
    group_sizes: tuple[int, ...]
    memory: tuple[str, ...]
    scope: str = "lane"


SAVE, REPLAY = "save", "replay"
CASES: Mapping[str, Case] = {
    # The last two legs have as many ranks, in other groups.
    "paper_save": Case("paper", (1, 2, 2, 1, 2), (SAVE,) * 5),
    "deep_replay": Case("deep", (1, 2, 4, 2, 1), (REPLAY,) * 5),
    "document_both": Case("deep", (1, 1, 4, 1, 2), (REPLAY, SAVE, SAVE, REPLAY, SAVE), scope="document"),
}


def train_all(configs: list[Config]) -> None:
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    for config in configs:
        train(build_run(config))


def config_of(tiny_run: TinyRun, folder: Path, name: str, leg: int | None) -> Config:
    """Settings of a leg, or of the unbroken run."""
    case = CASES[name]
    train = {"steps": LEGS[-1].stop, "segments_per_step": SEGMENTS_PER_STEP}
    if leg is None:
        return tiny_run.config(
            folder / f"{name}_unbroken",
            profile=case.profile,
            memory={**MEMORY, "scope": case.scope},
            train=train,
            checkpoint={"every_steps": 0},
        )
    return tiny_run.config(
        folder / name,
        profile=case.profile,
        memory={**MEMORY, "scope": case.scope, "group_size": case.group_sizes[leg]},
        train={**train, "stop_after_steps": LEGS[leg].stop},
        checkpoint={"every_steps": 0, "memory": case.memory[leg]},
    )


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case, moved from world to world and unbroken."""
    folder = tmp_path_factory.mktemp("elastic")
    unbroken = [config_of(tiny_run, folder, name, None) for name in CASES]
    run_ranks(train_all, 1, [*unbroken, *(config_of(tiny_run, folder, name, 0) for name in CASES)], init_process_group=False)
    run_ranks(train_all, 2, [config_of(tiny_run, folder, name, 1) for name in CASES], init_process_group=False)
    run_ranks(train_all, 4, [config_of(tiny_run, folder, name, 2) for name in CASES], init_process_group=False)
    last = [config_of(tiny_run, folder, name, leg) for leg in (3, 4) for name in CASES]
    run_ranks(train_all, 2, last, init_process_group=False)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_those_of_the_unbroken_run(runs: Path, name: str) -> None:
    unbroken, moved = read_metrics(runs / f"{name}_unbroken"), read_metrics(runs / name)
    for key in ("step", "tokens", "learning_rate", "memory_fill"):
        assert [record[key] for record in moved] == [record[key] for record in unbroken], key
    losses = np.array([record["loss"] for record in unbroken])
    print(np.abs(np.array([record["loss"] for record in moved]) - losses))
    np.testing.assert_allclose([record["loss"] for record in moved], losses, rtol=0, atol=TOLERANCE)
