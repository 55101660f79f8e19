"""Stopping and going on, in another process: the same losses bit for bit, on one and two ranks.

The runs of profile `deep` read a mixture. Also from a checkpoint of format 2, which stored the memory in the order of
its slots.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.manifest import digest, files_below, manifest_text
from pipeline.config.schema import Config
from pipeline.metrics.record import read_metrics
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny_run import PROFILES, TinyRun

STEPS, STOP = 8, 5  # two segments a step: memory overflows in step 3
CHUNK, RING = 4, 20  # tokens, and slots of a rank's ring
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


def rewrite_in_format_two(run: Path) -> None:
    """Leaves a checkpoint of format 2 after step 3: a ring of (64 + 16) / 4 slots for every rank, and no JSON."""
    shutil.rmtree(run / "checkpoints" / f"step_{STOP:08d}")  # its ring would begin with the oldest chunk
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.with_name("latest").write_text(checkpoint.name)
    for path in sorted((checkpoint / "memory").glob("*.safetensors")):
        memory = load_file(path)
        positions = memory.pop("positions")
        assert len(positions) == RING and int(positions[0]) > 0, "the ring has gone round"
        slots, order = (positions // CHUNK % RING).sort()
        assert order.tolist() != list(range(RING))
        old = {
            "slots": slots,
            "num_chunks": torch.tensor(RING),
            "next_slot": torch.tensor((int(positions[-1]) // CHUNK + 1) % RING),
            "positions": positions[order],
            "documents": memory.pop("documents")[:, order],
        }
        save_file({**old, **{name: tensor[:, :, order].contiguous() for name, tensor in memory.items()}}, path)
        path.with_suffix(".json").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["manifest_sha256"], manifest["identity"]["memory tokens"]
    files = {name: digest(checkpoint / name) for name in files_below(checkpoint)}
    (checkpoint / "manifest.json").write_text(manifest_text({**manifest, "format": 2, "files": files}))


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def world(request: pytest.FixtureRequest, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of both profiles: one unbroken, one stopped and gone on with, one killed and gone on with."""
    folder = tmp_path_factory.mktemp("resume")
    world_size: int = request.param

    def configs(name: str, **train: Any) -> list[Config]:
        return [
            tiny_run.config(
                folder / f"{name}_{profile}",
                profile=profile,
                data=tiny_run.mixture if profile == "deep" else {},
                train={"steps": STEPS, **train},
            )
            for profile in PROFILES
        ]

    first = [*configs("unbroken"), *configs("stopped", stop_after_steps=STOP)]
    run_ranks(train_all, world_size, first, init_process_group=False)
    for profile in PROFILES:
        for copy in ("kept", "old"):
            shutil.copytree(folder / f"stopped_{profile}", folder / f"{copy}_{profile}")
        rewrite_in_format_two(folder / f"old_{profile}")
    with pytest.raises(RanksFailedError, match="rank 0 died without a word, exit code -9"):
        run_ranks(train_and_die_in_step_six, world_size, configs("killed")[0], init_process_group=False)
    shutil.copytree(folder / "killed_paper", folder / "as_killed")
    more = [*configs("stopped"), *configs("old"), configs("killed")[0]]
    run_ranks(train_all, world_size, more, init_process_group=False)
    return folder


def exact(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(record[key] for key in EXACT) for record in read_metrics(folder)]


def test_the_shares_that_were_read_go_on_too(world):
    keys = ("source_data_fraction", "source_more_fraction")
    unbroken, stopped = (
        [[record[key] for key in keys] for record in read_metrics(world / f"{name}_deep")]
        for name in ("unbroken", "stopped")
    )
    assert stopped == unbroken and all(sum(shares) == pytest.approx(1) for shares in unbroken)
    # 256 tokens of each of four lanes, 0.6 of them of the first source to less than a document of each lane.
    assert unbroken[0] != unbroken[-1] and unbroken[-1][0] == pytest.approx(0.6, abs=0.25)
    assert not any(key in record for record in read_metrics(world / "unbroken_paper") for key in keys)


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
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_of_format_two(world, profile):
    checkpoint = world / f"old_{profile}" / "checkpoints"
    formats = [json.loads(path.read_text())["format"] for path in sorted(checkpoint.glob("step_*/manifest.json"))]
    assert formats == [3, 3]  # it has saved since
    gone_on, stopped = (read_metrics(world / f"{name}_{profile}") for name in ("old", "kept"))
    assert gone_on[:3] == stopped[:3] and gone_on[3] != stopped[3], "times and all: it did not begin anew"
    assert exact(world / f"old_{profile}") == exact(world / f"unbroken_{profile}")


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
