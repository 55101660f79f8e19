"""A damaged file of the newest checkpoint, of whatever kind: the run says so and goes on from the one before it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.checkpoint.folder import Checkpoints
from pipeline.config.schema import Config
from tests.fault_injection import exact_record
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

STEPS = 4  # a checkpoint every two
NEWEST = Path("checkpoints") / f"step_{STEPS:08d}"
KINDS = {
    "weights": "sidenet/engine/mp_rank_00_model_states.pt",
    "exported weights": "sidenet/model.safetensors",
    "optimizer": "sidenet/engine/*rank_1_mp_rank_00_optim_states.pt",
    "memory": "memory/rank_00001.safetensors",
    "lanes": "lanes/rank_00001.json",
    "random": "random/rank_00000.safetensors",
    "manifest": "manifest.json",
}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def plant_a_pickle(run: Path) -> None:
    states = run / NEWEST / KINDS["weights"]
    shutil.copy(states, states.with_name("mp_rank_01_model_states.pt"))  # DeepSpeed goes by the names in its folder


def in_file(kind: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        (path,) = (run / NEWEST).glob(KINDS[kind])
        damage(path)

    return apply


BACK = "nothing, but the run goes back to step 2"
# What is done to a copy of a run, which step it goes on from, and what is said.
CASES: Mapping[str, tuple[Callable[[Path], object], int, str]] = {
    **{f"{kind}: bit": (in_file(kind, flip_a_bit), 2, "has another hash") for kind in KINDS if kind != "manifest"},
    **{f"{kind}: cut": (in_file(kind, cut_in_half), 2, "bytes instead of") for kind in KINDS if kind != "manifest"},
    "manifest: bit": (in_file("manifest", flip_a_bit), 2, "is not a whole checkpoint"),
    "manifest: cut": (in_file("manifest", cut_in_half), 2, "is not a whole checkpoint"),
    "memory: gone": (in_file("memory", Path.unlink), 2, "memory/rank_00001.safetensors is missing"),
    "a foreign pickle": (plant_a_pickle, 2, "mp_rank_01_model_states.pt is not in the manifest"),
    "checkpoint: gone": (lambda run: shutil.rmtree(run / NEWEST), 2, "latest names 'step_00000004', which is not"),
    BACK: (lambda run: None, 2, ""),
    "latest: gone": (lambda run: (run / "checkpoints" / "latest").unlink(), 4, ""),
    "latest: cut": (lambda run: cut_in_half(run / "checkpoints" / "latest"), 4, "which is not there"),
    "latest: bit": (lambda run: flip_a_bit(run / "checkpoints" / "latest"), 4, "which is not there"),
}


def noted(checkpoints: Checkpoints) -> list[int]:
    """Where the step will stand that a run goes on from."""
    steps, go_on_from = [], checkpoints.truncate_after

    def note(step: int) -> None:
        steps.append(step)
        go_on_from(step)

    checkpoints.truncate_after = note  # type: ignore[method-assign]
    return steps


def go_on(good: Config, unbroken: Config, back: Config, damaged: dict[str, Config]) -> dict[str, tuple[int, str]]:
    """Makes a good run, damages copies of it and goes on with each: the step it went on from, and what was logged."""
    from pipeline.distributed.ranks import barrier, rank
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    lines: list[str] = []
    logging.getLogger("pipeline.checkpoint").addHandler(Heard(logging.ERROR))
    train(build_run(good))
    train(build_run(unbroken))
    found = {}
    for name, config in damaged.items():
        if rank() == 0:
            shutil.copytree(good.run.output_dir, config.run.output_dir)
            CASES[name][0](Path(config.run.output_dir))
        barrier()
        if name == BACK:
            train(build_run(back))  # ends before it has saved anything, as if it had crashed
        lines.clear()
        run = build_run(config)
        steps = noted(run.checkpoints)
        train(run)
        found[name] = (steps[0], "\n".join(lines))
    return found


@pytest.fixture(scope="module")
def gone_on(
    tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, tuple[int, str]]]]:
    folder = tmp_path_factory.mktemp("damaged")

    def config(name: str, *, stop: int | None) -> Config:
        train = {"steps": STEPS + 1, "stop_after_steps": stop}
        return tiny_run.config(folder / name, train=train, checkpoint={"every_steps": 2})

    damaged = {name: config(f"copy, {name}", stop=None) for name in CASES}
    good, unbroken = config("good", stop=STEPS), config("unbroken", stop=None)
    back = config(f"copy, {BACK}", stop=2)
    older = folder / f"copy, {BACK}" / "checkpoints" / "step_00000002"
    back = back.model_copy(update={"run": back.run.model_copy(update={"resume": str(older)})})
    return folder, run_ranks(go_on, 2, good, unbroken, back, damaged, init_process_group=False)


@pytest.mark.parametrize("name", CASES)
def test_damage_is_said_loudly_and_the_newest_whole_one_taken(gone_on, name):
    folder, (first, second) = gone_on
    _, step, words = CASES[name]
    assert first[name][0] == second[name][0] == step
    assert words in first[name][1]
    assert second[name][1] == "", "one rank speaks"
    assert exact_record(folder / f"copy, {name}") == exact_record(folder / "unbroken")
    assert len(exact_record(folder / "unbroken")) == STEPS + 1
