"""The shipped job scripts on a SLURM cluster of two nodes: to the end, whatever happens to the job meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.distributed.launchers import first_host
from pipeline.metrics.record import read_metrics
from tests.slurm_cluster import SlurmCluster, missing, slurm_cluster, wait_until
from tests.tiny_run import TinyRun

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
STEPS = 60
LIMIT_S = 150.0
# Two tasks are two ranks, wherever they run; the order of summation is the same.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@dataclass
class Job:
    """A job of a shipped script, edited at its top as a user would."""

    cluster: SlurmCluster
    number: str
    run: Path
    log: Path

    def wait_for_end(self) -> Mapping[str, str]:
        """Waits until the job is over for good, and returns what SLURM says of it."""
        wait_until(lambda: self.cluster.job(self.number)["JobState"] in OVER, f"job {self.number}", LIMIT_S, self.log)
        return self.cluster.job(self.number)

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is done."""
        wait_until(lambda: self.steps_done() >= step, f"step {step}", LIMIT_S, self.log)

    def steps_done(self) -> int:
        """The number of records in metrics.jsonl."""
        return len(read_metrics(self.run)) if (self.run / "metrics.jsonl").is_file() else 0

    def decisions(self) -> list[str]:
        """What was decided after each attempt, with its exit code."""
        lines = Path(f"{self.run}.attempts").read_text().splitlines()
        return [line.split(" ", 4)[4] for line in lines]


@pytest.fixture(scope="module")
def config(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return tiny_run.write_config(folder / "run.yaml", folder / "never", train={"steps": STEPS})


def edited(name: str, path: Path, **variables: object) -> Path:
    """A copy of a shipped script with other values at its top."""
    text = (SCRIPTS / name).read_text()
    for variable, value in variables.items():
        text, count = re.subn(rf"(?m)^{variable}=(\([^)]*\)|\S*)", f"{variable}={value}", text)
        assert count == 1, f"{name} has no line {variable}="
    path.write_text(text)
    return path


def start(
    cluster: SlurmCluster, tmp_path: Path, name: str, config: Path, *arguments: str, options: tuple[str, ...], **top: str
) -> Job:
    """Sends a script for a run in `tmp_path`."""
    script = edited(name, tmp_path / name, CONFIG=config, RUN=tmp_path / "run", **top)
    log = tmp_path / "log"
    options = ("--cpus-per-task=1", f"--output={log}", *options)
    return Job(cluster, cluster.submit(script, *arguments, options=options, cwd=ROOT), tmp_path / "run", log)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def check_finished(job: Job, expected: list[float]) -> None:
    """The run has gone through to the end, with the losses of an unbroken one."""
    about = job.wait_for_end()
    assert about["JobState"] == "COMPLETED", job.log.read_text()[-6000:]
    assert json.loads((job.run / "status.json").read_text())["state"] == "finished"
    assert losses(job.run) == expected
    assert job.decisions()[-1] == "exit code 0: done"


@pytest.fixture(scope="module")
def unbroken(cluster: SlurmCluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = start(cluster, tmp_path_factory.mktemp("unbroken"), "many_nodes.sbatch", config, options=TWO_NODES)
    about = job.wait_for_end()
    assert about["JobState"] == "COMPLETED", job.log.read_text()[-6000:]
    return job


@pytest.fixture(scope="module")
def expected(unbroken: Job) -> list[float]:
    found = losses(unbroken.run)
    assert len(found) == STEPS
    return found


def test_two_nodes_train_together(unbroken: Job, expected: list[float]) -> None:
    check_finished(unbroken, expected)
    assert "attempt 1 on n[1-2]" in unbroken.log.read_text()
    assert json.loads((unbroken.run / "status.json").read_text())["world_size"] == 2
    assert unbroken.cluster.job(unbroken.number)["Restarts"] == "0"


def test_a_finished_run_is_evaluated_anew(unbroken: Job, cluster: SlurmCluster, tmp_path: Path) -> None:
    before = json.loads((unbroken.run / "evaluation.json").read_text())
    script = edited("evaluate.sbatch", tmp_path / "evaluate.sbatch", RUN=unbroken.run)
    options = (*TWO_NODES, "--cpus-per-task=1", f"--output={tmp_path / 'log'}")
    number = cluster.submit(script, "--evaluation.scored_tokens", "16", options=options, cwd=ROOT)
    job = Job(cluster, number, unbroken.run, tmp_path / "log")
    assert job.wait_for_end()["JobState"] == "COMPLETED", job.log.read_text()
    after = json.loads((unbroken.run / "evaluation.json").read_text())
    assert (before["settings"]["scored_tokens"], after["settings"]["scored_tokens"]) == (32, 16)
    assert losses(unbroken.run) == losses(job.run) and after["step"] == STEPS


def test_an_unfinished_run_is_not_evaluated(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = edited("evaluate.sbatch", tmp_path / "evaluate.sbatch", RUN=tmp_path / "nothing")
    options = (*TWO_TASKS, "--cpus-per-task=1", f"--output={tmp_path / 'log'}")
    job = Job(cluster, cluster.submit(script, options=options, cwd=ROOT), tmp_path / "nothing", tmp_path / "log")
    assert job.wait_for_end()["JobState"] == "FAILED"
    assert "is not a finished run (status.json: unknown)" in job.log.read_text()


def test_the_signal_before_the_time_limit(cluster, config, expected, tmp_path: Path) -> None:
    # SLURM looks every 30 s and signals up to 60 s early: in the second half of this minute.
    options = (*TWO_NODES, "--time=1", "--signal=USR1@1")
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, options=options)
    job.wait_for_step(5)
    tasks = [process for process in psutil.process_iter(["cmdline"]) if str(job.run) in (process.info["cmdline"] or ())]
    tasks = [process for process in tasks if "launch/train.py" in process.info["cmdline"] and "srun" not in process.name()]
    assert len(tasks) == 2
    # Steps as long as the time limit: the signal finds the run in the middle of one.
    for task in tasks:
        task.suspend()
    wait_until(lambda: all(is_pending(task, signal.SIGUSR1) for task in tasks), "SIGUSR1", 70.0, job.log)
    for task in tasks:
        task.resume()
    wait_until(lambda: "requeued" in "".join(job.decisions_so_far()), "the requeue", 60.0, job.log)
    done = job.steps_done()
    assert 5 <= done < STEPS
    check_finished(job, expected)
    assert job.decisions() == ["exit code 75: requeued", "exit code 0: done"]
