"""Pickles that would run code, below a manifest that was written to fit: refused on every rank, and nothing is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.export import main as export
from pipeline.checkpoint.manifest import digest, manifest_text
from pipeline.config.schema import Config
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun
from tests.unit.training.test_pickles import Evil

STEPS = 2
NEWEST = Path("checkpoints") / f"step_{STEPS:08d}"
FILES = {
    "model": "mp_rank_00_model_states.pt",
    "optimizer of rank 0": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "optimizer of rank 1": "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "planted": "layer_0_expert_0_mp_rank_00_model_states.pt",
}
UNCHECKED = "model, optimizers: unchecked"  # as if our own check had missed it: DeepSpeed itself is told to refuse


def marker_of(run: Path) -> Path:
    return run.with_name(f"marker of {run.name}")


def poison(run: Path, name: str) -> None:
    """Adds code to a file of DeepSpeed's, and has the manifest vouch for it."""
    checkpoint = run / NEWEST
    for key in ("model", "optimizer of rank 0") if name == UNCHECKED else (name,):
        path = checkpoint / "sidenet" / "engine" / FILES[key]
        content = torch.load(path, weights_only=False) if path.exists() else {}
        torch.save({**content, "more": Evil(marker_of(run))}, path)
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["manifest_sha256"]
        manifest["files"][f"sidenet/engine/{path.name}"] = digest(path)
        (checkpoint / "manifest.json").write_text(manifest_text(manifest))


def attempts(good: Config | None, hostile: dict[str, Config]) -> dict[str, str]:
    """Makes a run, if there is one to make, and goes on with others: what is said."""
    from pipeline.distributed.ranks import barrier
    from pipeline.errors import LongMemError
    from pipeline.training.build import build_run
    from pipeline.training.engine_owner import EngineOwner
    from pipeline.training.loop import train

    if good is not None:
        train(build_run(good))
        if torch.distributed.get_rank() == 0:
            for name, config in hostile.items():
                shutil.copytree(good.run.output_dir, config.run.output_dir)
                poison(Path(config.run.output_dir), name)
    found, check = {}, EngineOwner.check
    for name, config in hostile.items():
        barrier()
        if name == UNCHECKED:
            EngineOwner.check = lambda *_: None  # type: ignore[method-assign]
        try:
            train(build_run(config))
            found[name] = "nothing was said"
        except LongMemError as error:
            found[name] = str(error)
        EngineOwner.check = check  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def refused(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """What each of two ranks said, which had written the checkpoint, and what one rank said, which converts it."""
    folder = tmp_path_factory.mktemp("hostile")

    def config(name: str, **run: Any) -> Config:
        return tiny_run.config(folder / name, run=run, train={"steps": STEPS + 1, "stop_after_steps": STEPS})

    names = (*FILES, UNCHECKED)
    hostile = {name: config(name, resume=str(folder / name / NEWEST)) for name in names}
    two = run_ranks(attempts, 2, config("good"), hostile, init_process_group=False)
    one = run_ranks(attempts, 1, None, hostile, init_process_group=False)
    return folder, [*two, *one]


@pytest.mark.parametrize("name", FILES)
def test_code_in_a_file_of_deepspeeds_is_refused_and_not_run(refused, name):
    folder, found = refused
    words = rf"step_00000002 is corrupt; got: sidenet: {FILES[name]} is not a file of DeepSpeed's that can be loaded "
    for said in found:
        with pytest.raises(
            AssertionError, match=words + r"without running code .*posix.mkdir.*do: resume from another"
        ):
            raise AssertionError(said[name])
    assert not marker_of(folder / name).exists()
    export([str(folder / name), "--output", str(folder / f"exported {name}")])  # needs none of these files
    assert not marker_of(folder / name).exists()


def test_deepspeed_itself_is_kept_from_running_code(refused):
    folder, (first, second, alone) = refused
    for said in (first, second):
        assert "could not load the SideNet's state from" in said[UNCHECKED] and "unsupported GLOBAL" in said[UNCHECKED]
    assert "could not be converted for another number of ranks" in alone[UNCHECKED]
    assert "unsupported GLOBAL posix.mkdir" in alone[UNCHECKED]
    assert not marker_of(folder / UNCHECKED).exists()


def test_the_poison_is_one(refused):
    folder, _ = refused
    torch.load(folder / "model" / NEWEST / "sidenet" / "engine" / FILES["model"], weights_only=False)
    marker = marker_of(folder / "model")
    assert marker.exists()
    marker.rmdir()
