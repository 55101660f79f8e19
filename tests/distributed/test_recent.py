"""Left context, sink and window with both engines: stopped, or in a group of any size, the same losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.metrics.record import read_metrics
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

STEPS, STOP = 6, 4  # memory overflows in step 2; context reaches over two segments and over documents
TOLERANCE = 1e-5  # float32; partial results are added in another order
EXACT = ("step", "loss", "grad_norm", "gate_mean", "memory_share", "memory_fill")
MEMORY: Mapping[str, Any] = {"sink": True, "window_tokens": 24, "retrieve_for": "kv_head"}


def train_all(configs: list[Config]) -> None:
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    for config in configs:
        train(build_run(config))


@pytest.fixture(scope="module")
def trained(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in groups of 1, 2 and 4, unbroken; of 2 also stopped and gone on with a memory stored or read again."""
    folder = tmp_path_factory.mktemp("recent")

    def config(name: str, size: int, memory: str = "save", **train: int) -> Config:
        return tiny_run.config(
            folder / name,
            backbone={"context_tokens": 21},
            memory={**MEMORY, "group_size": size},
            train={"steps": STEPS, "segments_per_step": 4, **train},
            checkpoint={"memory": memory},
        )

    broken = [
        config(memory, 2, memory, **stop) for memory in ("save", "replay") for stop in ({"stop_after_steps": STOP}, {})
    ]
    for size in (1, 2, 4):
        runs = [config(f"group_{size}", size), *(broken if size == 2 else [])]
        run_ranks(train_all, size, runs, init_process_group=False, timeout_s=240)
    return folder


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)]


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_of_any_size_trains_alike(trained: Path, size: int) -> None:
    expected = losses(trained / "group_1")
    assert len(set(expected)) == STEPS
    assert losses(trained / f"group_{size}") == pytest.approx(expected, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("memory", ["save", "replay"])
def test_a_stopped_run_goes_on_bit_for_bit(trained: Path, memory: str) -> None:
    unbroken, gone_on = (read_metrics(trained / name) for name in ("group_2", memory))
    assert [[record[key] for key in EXACT] for record in gone_on] == [
        [record[key] for key in EXACT] for record in unbroken
    ]
