"""The whole command line on a tiny model: real launcher, real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.scorer import CONDITIONS
from pipeline.config.load import load_config
from pipeline.metrics.record import read_metrics
from tests.ranks import free_port
from tests.tiny_run import TinyRun

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
TIMEOUT_S = 240  # the first start on a machine compiles an extension of DeepSpeed


def command_line(arguments: list[str], *, ranks: int) -> tuple[list[str], dict[str, str]]:
    """How a user starts launch/train.py: command and environment."""
    command = [sys.executable]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        command = [sys.executable, deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # The launcher starts `python`: the one beside it.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return [*command, str(ROOT / "launch" / "train.py"), *arguments], environment


def launch(arguments: list[str], *, ranks: int) -> subprocess.CompletedProcess[str]:
    """Starts launch/train.py and waits for its end."""
    command, environment = command_line(arguments, ranks=ranks)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, env=environment, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def yaml_file(tiny_run: TinyRun, folder: Path) -> Path:
    return tiny_run.write_config(folder / "run.yaml", folder / "run", train={"steps": STEPS})


@pytest.fixture(scope="module")
def finished(yaml_file: Path, folder: Path) -> Path:
    """The folder of a run on two ranks, which leave no shared memory behind."""
    shared = set(Path("/dev/shm").glob("deepspeed_*"))
    done = launch(["--config", str(yaml_file)], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    port = done.args[done.args.index("--master_port") + 1]
    of_others = rf"deepspeed_allreduce_buffer_\d+_.+_(?!{port}_)\d+_\d+"  # of jobs that are starting meanwhile
    left = {path.name for path in {*Path("/dev/shm").glob("deepspeed_*")} - shared}
    assert not [name for name in left if not re.fullmatch(of_others, name)]
    table = (folder / "run" / "evaluation.txt").read_text()
    assert table in done.stdout and f"--logdir {folder}/run/tensorboard" in done.stdout
    return folder / "run"


def test_a_run_folder_holds_what_was_asked_what_ran_and_what_came_out(finished, yaml_file):
    assert load_config(finished / "config.yaml") == load_config(yaml_file)
    assert {"python", "torch", "deepspeed", "transformers"} <= json.loads(
        (finished / "versions.json").read_text()
    ).keys()
    assert [record["step"] for record in read_metrics(finished)] == [1, 2, 3, 4]
    report = json.loads((finished / "evaluation.json").read_text())
    assert report["step"] == STEPS
    assert set(report["conditions"]) == {name for name in CONDITIONS if name != "window_only"}
    assert (finished / "checkpoints" / "latest").read_text() == "step_00000004"
    known = {"config.yaml", "versions.json", "metrics.jsonl", "tensorboard", "checkpoints", "status.json", "lock"}
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("finished", STEPS, None)
    assert {path.name for path in finished.iterdir()} == known | {"evaluation.json", "evaluation.txt"}


def test_tensorboard_reads_scalars_and_histograms(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    losses = [record["loss"] for record in read_metrics(finished)]
    assert [event.value for event in events.Scalars("loss/train_nats")] == pytest.approx(losses)
    assert {"optimizer/grad_norm", "memory/fill_fraction", "memory/gate_mean", "phase/backbone_s"} <= set(
        tags["scalars"]
    )
    for layer in (1, 2, 3, 4):
        for tag in (f"gate/layer_{layer}", f"age/layer_{layer}_tokens", f"memory_share/layer_{layer}_fraction"):
            assert [event.step for event in events.Histograms(tag)] == [2, 4], tag
        ages = events.Histograms(f"age/layer_{layer}_tokens")[0].histogram_value
        # Remembered are 64 tokens before a segment of 16; a chunk's first token lies at least one chunk back.
        assert 4 <= ages.min <= ages.max <= 64 + 15
        gates = events.Histograms(f"gate/layer_{layer}")[0].histogram_value
        assert gates.num == 4


def when_written(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (*run.glob("checkpoints/**/*"), run / "evaluation.json")}


def test_one_rank_without_launcher_stops_goes_on_and_once_finished_does_nothing(yaml_file, folder):
    arguments = ["--config", str(yaml_file), "--run.output_dir", str(folder / "alone")]
    stopped = launch([*arguments, "--train.stop_after_steps", "2"], ranks=1)
    assert stopped.returncode == 0, stopped.stderr[-4000:]
    assert [record["step"] for record in read_metrics(folder / "alone")] == [1, 2]
    assert not (folder / "alone" / "evaluation.json").exists()
    status = json.loads((folder / "alone" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "train.stop_after_steps")
    again = launch(arguments, ranks=1)
    assert again.returncode == 0, again.stderr[-4000:]
    assert [record["step"] for record in read_metrics(folder / "alone")] == [1, 2, 3, 4]
    assert json.loads((folder / "alone" / "evaluation.json").read_text())["step"] == STEPS
    assert yaml.safe_load((folder / "alone" / "config.yaml").read_text())["train"]["stop_after_steps"] is None
    written, metrics = when_written(folder / "alone"), (folder / "alone" / "metrics.jsonl").read_text()
    third = launch(arguments, ranks=1)
    assert third.returncode == 0, third.stderr[-4000:]
    assert when_written(folder / "alone") == written
    assert (folder / "alone" / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize(
    ("ranks", "arguments", "words"),
    [
        (2, ["--memory.chunk_sizes", "4"], "unknown key memory.chunk_sizes; nearest known: memory.chunk_size"),
        (2, ["--data.lanes", "3"], "data.lanes is not a multiple of the number of memory groups; got: 3 lanes and 2"),
        (1, ["--evaluation.scored_tokens", "20"], "evaluation.scored_tokens is not a multiple of train.segment_tokens"),
        (
            1,
            ["--memory.top_k_tokens", "18"],
            "memory.top_k_tokens is not a multiple of memory.chunk_size; got: 18 and 4",
        ),
        (1, ["--train.segment_tokens", "18"], "train.segment_tokens is not a multiple of memory.chunk_size; got: 18"),
        (1, ["--memory.group_size", "2"], "memory.group_size does not divide the world size; got: 2 and 1 ranks; do:"),
    ],
)
def test_bad_settings_are_refused_in_words_and_nothing_is_written(yaml_file, folder, ranks, arguments, words):
    output = folder / "never"
    done = launch(["--config", str(yaml_file), "--run.output_dir", str(output), *arguments], ranks=ranks)
    assert done.returncode != 0
    assert "\nerror: " in done.stderr
    assert done.stderr.count(words) == 1  # one rank speaks
    assert "failed:\nTraceback" not in done.stderr
    assert not output.exists()


def test_two_ranks_refuse_a_named_corrupt_checkpoint_and_the_run_stays_as_it_was(finished, yaml_file):
    newest = finished / "checkpoints" / "step_00000004"
    damaged = newest / "memory" / "rank_00001.safetensors"
    whole = damaged.read_bytes()
    before = (finished / "config.yaml").stat().st_mtime_ns
    damaged.write_bytes(whole[:-1])
    arguments = ["--config", str(yaml_file), "--run.resume", str(newest), "--train.stop_after_steps", "4"]
    try:
        done = launch(arguments, ranks=2)
    finally:
        damaged.write_bytes(whole)
    assert done.returncode != 0
    assert done.stderr.count("is corrupt; got: memory/rank_00001.safetensors has") == 1
    assert "do: resume from another one with --run.resume DIR" in done.stderr
    assert (finished / "config.yaml").stat().st_mtime_ns == before
