"""Stopping and going on, in another process: the same losses bit for bit, on one and two ranks."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.metrics.record import read_metrics
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny_run import PROFILES, TinyRun

STEPS, STOP = 8, 5  # two segments a step: memory overflows in step 3
EXACT = ("step", "loss", "grad_norm", "learning_rate", "memory_fill", "gate_mean", "memory_share", "tokens")


def train_all(configs: list[Config]) -> None:
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    for config in configs:
        train(build_run(config))


def train_and_die(config: Config, *, in_step: int) -> None:
    """Killed while the checkpoint after a step is being written: the step is recorded, its checkpoint is not whole."""
    from pipeline.training.build import build_run
    from pipeline.training.engine_owner import EngineOwner
    from pipeline.training.loop import train

    def save_and_die(owner: Any, folder: Path) -> Any:
        rest = save(owner, folder)
        if folder.parent.name == f"writing_{in_step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        return rest

    save: Callable[[Any, Path], Any] = EngineOwner.save
    EngineOwner.save = save_and_die  # type: ignore[method-assign,assignment]
    train(build_run(config))


def train_and_die_in_step_six(config: Config) -> None:
    train_and_die(config, in_step=6)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def world(request: pytest.FixtureRequest, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of both profiles: one unbroken, one stopped and gone on with, one killed and gone on with."""
    folder = tmp_path_factory.mktemp("resume")
    world_size: int = request.param

    def configs(name: str, **train: Any) -> list[Config]:
        return [
            tiny_run.config(folder / f"{name}_{profile}", profile=profile, train={"steps": STEPS, **train})
            for profile in PROFILES
        ]

    first = [*configs("unbroken"), *configs("stopped", stop_after_steps=STOP)]
    run_ranks(train_all, world_size, first, init_process_group=False)
    for profile in PROFILES:
        shutil.copytree(folder / f"stopped_{profile}", folder / f"kept_{profile}")
    with pytest.raises(RanksFailedError, match="rank 0 died without a word, exit code -9"):
        run_ranks(train_and_die_in_step_six, world_size, configs("killed")[0], init_process_group=False)
    shutil.copytree(folder / "killed_paper", folder / "as_killed")
    run_ranks(train_all, world_size, [*configs("stopped"), configs("killed")[0]], init_process_group=False)
    return folder


def exact(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(record[key] for key in EXACT) for record in read_metrics(folder)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_stopped_run_goes_on_bit_for_bit(world, profile):
    unbroken = exact(world / f"unbroken_{profile}")
    assert [record[0] for record in unbroken] == list(range(1, STEPS + 1))
    assert len({record[1] for record in unbroken}) == STEPS
    assert exact(world / f"kept_{profile}") == unbroken[:STOP]
    assert exact(world / f"stopped_{profile}") == unbroken


def test_a_killed_run_goes_on_bit_for_bit_and_no_step_stands_there_twice(world):
    unbroken = exact(world / "unbroken_paper")
    assert exact(world / "as_killed") == unbroken[:6]
    assert checkpoints(world / "as_killed") == ["latest", "step_00000003", "writing_00000006"]
    assert exact(world / "killed_paper") == unbroken


@pytest.mark.parametrize("profile", PROFILES)
def test_the_newest_checkpoints_are_kept_and_latest_names_a_whole_one(world, profile):
    assert checkpoints(world / f"unbroken_{profile}") == ["latest", "step_00000006", "step_00000008"]
    assert checkpoints(world / f"kept_{profile}") == ["latest", "step_00000003", "step_00000005"]
    assert checkpoints(world / f"stopped_{profile}") == ["latest", "step_00000006", "step_00000008"]
    assert checkpoints(world / "killed_paper") == ["latest", "step_00000006", "step_00000008"]
    for name, newest in (("unbroken", 8), ("kept", 5), ("stopped", 8)):
        folder = world / f"{name}_{profile}" / "checkpoints"
        assert (folder / "latest").read_text() == f"step_{newest:08d}"
        assert (folder / f"step_{newest:08d}" / "manifest.json").is_file()
