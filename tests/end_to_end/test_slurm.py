"""The shipped job scripts on a SLURM cluster of two nodes: to the end, whatever happens to the job meanwhile."""

from __future__ import annotations

import json
import re
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
STEPS = 40
LIMIT_S = 240.0  # the first start on a machine compiles an extension of DeepSpeed
# Two tasks are two ranks, wherever they run; the order of summation is the same.
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.environment["PYTHON"] = sys.executable
        yield running


@pytest.fixture(autouse=True)
def nothing_left(cluster: SlurmCluster) -> Iterator[None]:
    """A test that fails takes its jobs with it."""
    yield
    cluster.cancel_all()


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
        path = Path(f"{self.run}.attempts")
        return [line.split(" ", 4)[4] for line in path.read_text().splitlines()] if path.is_file() else []

    def tasks(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for process in psutil.process_iter(["cmdline", "name"]):
            words = process.info["cmdline"] or []
            if {str(self.run), "launch/train.py"} <= {*words} and process.info["name"] != "srun":
                found.append(process)
        return found


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
    cluster: SlurmCluster,
    tmp_path: Path,
    name: str,
    config: Path,
    *arguments: str,
    options: tuple[str, ...],
    **top: str,
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


def test_a_run_is_evaluated(unbroken: Job, cluster: SlurmCluster, tmp_path: Path) -> None:
    script = edited("evaluate.sbatch", tmp_path / "evaluate.sbatch", MODEL=unbroken.run)
    options = (*TWO_NODES, "--cpus-per-task=1", f"--output={tmp_path / 'log'}")
    documents = ("--perplexity.documents", "2", "--perplexity.context_tokens", "32", "--perplexity.scored_tokens", "32")
    output = tmp_path / "evaluation"
    arguments = ("--task", "perplexity", "--output", str(output), *documents)
    job = Job(cluster, cluster.submit(script, *arguments, options=options, cwd=ROOT), unbroken.run, tmp_path / "log")
    assert job.wait_for_end()["JobState"] == "COMPLETED", job.log.read_text()
    # The run's own evaluation read the same tokens.
    trained = json.loads((unbroken.run / "evaluation.json").read_text())["conditions"]
    found = json.loads((output / "report.json").read_text())["tasks"]["perplexity"]["figures"]["means"]
    assert found.keys() == trained.keys()
    for name, mean in found.items():
        assert mean["mean"] == pytest.approx(trained[name]["loss_nats"], abs=1e-4)


def test_what_is_no_model_is_not_evaluated(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = edited("evaluate.sbatch", tmp_path / "evaluate.sbatch", MODEL=tmp_path / "nothing")
    options = (*TWO_TASKS, "--cpus-per-task=1", f"--output={tmp_path / 'log'}")
    job = Job(cluster, cluster.submit(script, options=options, cwd=ROOT), tmp_path / "nothing", tmp_path / "log")
    assert job.wait_for_end()["JobState"] == "FAILED"
    assert "error: " in job.log.read_text() and "nothing" in job.log.read_text()


def test_the_signal_before_the_time_limit(cluster, config, expected, tmp_path: Path) -> None:
    # SLURM looks every 30 s and signals up to 60 s early: in the second of these minutes. The first is for starting.
    options = (*TWO_NODES, "--time=2", "--signal=USR1@1")
    patience = ("--run.collective_timeout_s", "600")  # the tasks are suspended within a collective
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, *patience, options=options)
    job.wait_for_step(5)
    # As if this step took until the time limit. With the signal, SLURM sends SIGCONT.
    tasks = job.tasks()
    assert len(tasks) == 2
    for task in tasks:
        task.suspend()
    wait_until(lambda: bool(job.decisions()), "the first attempt's end", 150.0, job.log)
    assert 5 <= job.steps_done() < STEPS
    check_finished(job, expected)
    assert job.decisions() == ["exit code 75: requeued", "exit code 0: done"]
    assert "stopped after step" in job.log.read_text() and "by SIGUSR1" in job.log.read_text()


def test_requeued_by_the_administrator(cluster, config, expected, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "one_node.sbatch", config, options=TWO_TASKS)
    job.wait_for_step(5)
    cluster.command("scontrol", "requeue", job.number)
    check_finished(job, expected)
    assert job.decisions() == ["exit code 75: SLURM has taken the job back", "exit code 0: done"]
    assert cluster.job(job.number)["Restarts"] == "1"


def test_preempted_by_a_job_of_higher_priority(cluster, config, expected, tmp_path: Path) -> None:
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, options=TWO_NODES)
    job.wait_for_step(5)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path / 'urgent'}")
    script = tmp_path / "urgent.sbatch"
    script.write_text("#!/bin/bash\necho urgent\n")
    number = cluster.submit(script, options=urgent, cwd=tmp_path)
    check_finished(job, expected)
    assert job.decisions() == ["exit code 75: SLURM has taken the job back", "exit code 0: done"]
    assert cluster.job(number)["JobState"] == "COMPLETED"


def test_a_lost_node(cluster, config, expected, tmp_path: Path) -> None:
    arguments = ("--checkpoint.every_steps", "5")
    options = (*TWO_NODES, "--export=ALL,LAST_S=5")
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, *arguments, options=options)
    job.wait_for_step(7)
    cluster.kill_node("n2")
    # Long before SLURM finds out: it waits for five minutes.
    wait_until(lambda: bool(job.decisions()), "the first attempt's end", LIMIT_S, job.log)
    assert 5 <= job.steps_done() < STEPS
    cluster.start_node("n2")
    check_finished(job, expected)
    # SLURM counts a requeued job's steps from 0 again: what it still wanted to kill on n2 may hit the second attempt.
    first, *others, _ = job.decisions()
    assert first == "exit code 1: requeued" and set(others) <= {"exit code 137: requeued"}
    assert "rank 1 died or fell silent" in job.log.read_text()


def test_a_node_that_slurm_gives_up_and_a_cancelled_run(cluster, config, expected, tmp_path: Path) -> None:
    arguments = ("--checkpoint.every_steps", "5")
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, *arguments, options=TWO_NODES)
    job.wait_for_step(7)
    cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    wait_until(lambda: bool(job.decisions()), "the first attempt's end", LIMIT_S, job.log)
    before = job.steps_done()
    assert "SLURM has taken the job back" in job.decisions()[0] and before < STEPS
    # The node answers, so SLURM takes it into service again.
    job.wait_for_step(before + 1)
    cluster.command("scancel", job.number)
    about = job.wait_for_end()
    assert (about["JobState"], about["Restarts"]) == ("CANCELLED", "1")
    status = json.loads((job.run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM")
    assert (job.run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08}"
    assert losses(job.run) == expected[: status["step"]]


def test_an_array_trains_with_each_setting(cluster, config, expected, tmp_path: Path) -> None:
    sweep = '("--train.learning_rate 0.003" "--train.learning_rate 0.006")'
    options = ("--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    both = start(
        cluster, tmp_path, "sweep.sbatch", config, "--train.stop_after_steps", "8", options=options, SWEEP=sweep
    )
    jobs = [Job(cluster, f"{both.number}_{number}", both.run / str(number), both.log) for number in (0, 1)]
    for job in jobs:
        assert job.wait_for_end()["JobState"] == "COMPLETED", job.log.read_text()[-6000:]
        assert job.decisions() == ["exit code 0: done"]
    first, second = (losses(job.run) for job in jobs)
    # One rank instead of two.
    assert first == pytest.approx(expected[:8], rel=1e-4)
    assert second[0] == pytest.approx(first[0]) and second[7] != pytest.approx(first[7], rel=1e-3)


def test_a_number_that_the_sweep_lacks(cluster, config, tmp_path: Path) -> None:
    options = ("--array=3", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
    job = start(cluster, tmp_path, "sweep.sbatch", config, options=options)
    assert job.wait_for_end()["JobState"] == "FAILED"
    assert "SWEEP has no entry 3, only 0 to 2" in job.log.read_text()


def test_a_run_that_fails_is_not_requeued(cluster, config, tmp_path: Path) -> None:
    arguments = ("--data.path", str(tmp_path / "nothing"))
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, *arguments, options=TWO_NODES)
    about = job.wait_for_end()
    assert (about["JobState"], about["Restarts"], about["ExitCode"]) == ("FAILED", "0", "1:0")
    assert job.decisions() == ["exit code 1: failed, not requeued"]


def test_a_run_that_is_killed_again_and_again_is_given_up(cluster, config, tmp_path: Path) -> None:
    deadly = tmp_path / "python"
    deadly.write_text("#!/bin/bash\nkill -KILL $$\n")
    deadly.chmod(0o755)
    options = (*TWO_NODES, f"--export=ALL,PYTHON={deadly},MAX_ATTEMPTS=2")
    job = start(cluster, tmp_path, "many_nodes.sbatch", config, options=options)
    assert job.wait_for_end()["JobState"] == "FAILED", job.log.read_text()
    given_up = "exit code 137: given up, 2 attempts without a newer checkpoint"
    assert job.decisions() == ["exit code 137: requeued", given_up]


def test_the_first_host_is_slurm_s(cluster: SlurmCluster) -> None:
    for nodes in ("n[01-16,20]", "r[1-2]n[10-12]", "a,b[3-4]", "n[3,5-6]"):
        assert first_host(nodes) == cluster.command("scontrol", "show", "hostnames", nodes).split()[0]
