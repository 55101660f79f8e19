"""The job scripts without SLURM: what they say and decide. With it: tests/end_to_end/test_slurm.py."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
TASKS = "#SBATCH --ntasks-per-node=8       # one task a GPU\n#SBATCH --gpus-per-node=8\n"


def bash(words: str, **environment: str) -> str:
    """What bash prints after it has read common.sh."""
    defaults = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    script = f"source {ROOT}/launch/slurm/common.sh\n{words}"
    done = subprocess.run(
        ["bash", "-c", script], env=defaults | environment, capture_output=True, text=True, timeout=30
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_sent_as_it_is(path: Path) -> None:
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert TASKS in text and f"sbatch launch/slurm/{path.name}" in text
    for config in re.findall(r"(?m)^CONFIG=(\S+)", text):
        load_config(ROOT / config)
    if path.name != "evaluate.sbatch":
        assert "#SBATCH --requeue\n" in text and "#SBATCH --signal=USR1@600 " in text


def test_there_is_a_script_for_each_kind_of_job() -> None:
    names = [path.name for path in SCRIPTS]
    assert names == ["evaluate.sbatch", "many_nodes.sbatch", "one_node.sbatch", "sweep.sbatch"]


def test_words_of_a_task_without_a_container() -> None:
    assert bash('run_in_container a "b c"; printf "%s|" "${command[@]}"') == ".venv/bin/python|a|b c|"


def test_words_of_a_task_in_apptainer() -> None:
    found = bash('run_in_container a; echo "${command[@]}"', CONTAINER="/images/a.sif", MOUNTS="/data,/scratch")
    assert found == f"apptainer exec --nv --pwd {ROOT} --bind {ROOT},/data,/scratch /images/a.sif python a\n"


def test_words_of_a_task_in_pyxis() -> None:
    more = {"NCCL_DEBUG": "INFO", "HF_HOME": "/scratch/hf", "SECRET": "x"}
    found = bash('run_in_container a; echo "${command[@]}"', CONTAINER="nvcr.io#nvidia/pytorch", **more).split()
    assert found[:3] == [
        "--container-image=nvcr.io#nvidia/pytorch",
        f"--container-mounts={ROOT}:{ROOT}",
        f"--container-workdir={ROOT}",
    ]
    assert set(found[3].removeprefix("--container-env=").split(",")) == {"NCCL_DEBUG", "HF_HOME"}
    assert found[4:] == ["python", "a"]


@pytest.mark.parametrize(
    ("earlier", "checkpoint", "count"),
    [
        ([], "none", 1),
        ([], "step_5", 0),
        (["none requeued"], "none", 2),
        (["none requeued", "none requeued"], "step_5", 0),
        (["step_5 requeued", "step_5 requeued"], "step_5", 2),
        (["step_5 requeued", "step_5 SLURM has taken the job back"], "step_5", 1),
        (["step_5 requeued", "step_9 requeued"], "step_9", 1),
    ],
)
def test_attempts_without_a_newer_checkpoint(
    tmp_path: Path, earlier: Sequence[str], checkpoint: str, count: int
) -> None:
    # Another job's attempts do not count.
    lines = [f"time job=6 nodes=n1 checkpoint={checkpoint} exit code 137: requeued"]
    lines += [f"time job=7 nodes=n1 checkpoint={line}" for line in earlier]
    (tmp_path / "run.attempts").write_text("".join(f"{line}\n" for line in lines))
    assert bash(f"fruitless {tmp_path}/run {checkpoint}") == f"{count}\n"


@pytest.mark.parametrize(
    ("code", "reason", "decision"),
    [
        (0, None, "exit code 0: done"),
        (75, "SIGUSR1", "exit code 75: requeued"),
        (1, "the loss is not finite", "exit code 1: failed, not requeued"),
        (2, None, "exit code 2: failed, not requeued"),
        (1, "rank 0 was stopped by a failure elsewhere; got: rank 1 died or fell silent", "exit code 1: requeued"),
        (137, None, "exit code 137: requeued"),
    ],
)
def test_what_comes_after_an_attempt(tmp_path: Path, code: int, reason: str | None, decision: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 3, "reason": reason}, indent=1))
    is_ours = "is_ours() { true; }; scontrol() { echo scontrol $@; }"
    said = bash(f"{is_ours}; go_on {run} {code}")
    assert (run.parent / "run.attempts").read_text().split(" ", 4)[1:] == [
        "job=7", "nodes=n1", "checkpoint=none", f"{decision}\n",
    ]  # fmt: skip
    assert ("scontrol requeue 7" in said) == decision.endswith(": requeued")


def test_what_an_earlier_attempt_said_does_not_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": "rank 1 died or fell silent"}, indent=1))
    said = bash(f"is_ours() {{ true; }}; started=$(($(date +%s) + 60)); go_on {run} 1")
    assert "exit code 1: failed, not requeued" in said


@pytest.mark.parametrize(("restarts", "has_saved"), [(0, True), (1, False), (1, True)])
def test_only_the_first_attempt_goes_back_to_run_resume(tmp_path: Path, restarts: int, has_saved: bool) -> None:
    run = tmp_path / "run"
    if has_saved:
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "latest").write_text("step_00000004")
    words = f'start() {{ echo "$@"; }}; go_on() {{ :; }}; train a.yaml {run} --run.resume old'
    said = bash(words, SLURM_RESTART_COUNT=str(restarts))
    assert said.strip().endswith("--run.resume old --run.resume auto" if restarts and has_saved else "--run.resume old")


def test_a_task_of_an_array_goes_by_its_number() -> None:
    assert bash("job", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2") == "5_2\n"
    assert bash("job") == "7\n"
