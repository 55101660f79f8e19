"""Finishes whole runs and counts how their processes end: `python -m tests.finishing NUM_RUNS CONFIG:RANKS...`.

Ranks are forked from this process, which has imported everything, so that a start costs a second. They end as a script
does, through the interpreter's exit: what is still running then may bring it down. Prints a JSON object for each run.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.ranks import PRELOADED, free_port, rank_environment
from tests.tiny_run import TinyRun

_ROOT = Path(__file__).resolve().parents[1]
_LIMIT_S = 120.0  # of one run; one that needs longer hangs


def finishing_configs(inputs: TinyRun, folder: Path) -> list[tuple[Path, int]]:
    """Short runs of one rank, of a group of two, and of two groups of two, for `finish_runs`."""
    found = []
    for num_ranks, group_size in ((1, 1), (2, 2), (4, 2)):
        sections: dict[str, Any] = {"memory": {"group_size": group_size}, "train": {"steps": 3}}
        run = folder / f"run_{num_ranks}"
        found.append((inputs.write_config(folder / f"{num_ranks}.yaml", run, **sections), num_ranks))
    return found


def finish_runs(configs: Sequence[tuple[Path, int]], num_runs: int, *, num_busy: int) -> list[dict[str, Any]]:
    """Starts and finishes runs, one after another, beside other work.

    Args:
        configs: Settings as YAML files, each with its number of ranks; taken in turn.
        num_runs: How many runs.
        num_busy: Processes that keep the machine busy meanwhile.

    Returns:
        For each run its number of `ranks`, their exit `codes`, the `state` in status.json, and the end of what it
        `said` if a code is not 0.
    """
    words = [f"{path}:{num_ranks}" for path, num_ranks in configs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        for _ in range(num_busy):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        ran = subprocess.run(
            [sys.executable, "-m", "tests.finishing", str(num_runs), *words],
            cwd=_ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=_LIMIT_S * num_runs,
        )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def _main(num_runs: int, words: Sequence[str]) -> None:
    for name in (*PRELOADED, "launch.train", "eval.while_training"):
        importlib.import_module(name)
    for number in range(num_runs):
        path, _, num_ranks = words[number % len(words)].rpartition(":")
        _finish(Path(path), int(num_ranks))


def _finish(path: Path, num_ranks: int) -> None:
    """One run, from nothing; a rank leaves this function, and this program, as it would leave launch/train.py."""
    import torch.distributed

    from launch.failing import end_well, explained
    from launch.train import run
    from pipeline.config.load import load_config

    config = load_config(path)
    folder, log, port = Path(config.run.output_dir), path.with_suffix(".log"), free_port()
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    children = []
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(rank_environment(rank, num_ranks, port))
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            with explained():
                run(config)
            # tqdm's monitor waits in Python, where the end of the interpreter does no harm.
            left = [
                name for thread in threading.enumerate() if (name := thread.name) not in ("MainThread", "tqdm_monitor")
            ]
            if left or torch.distributed.is_initialized():
                sys.exit(f"still there at the end: {left}")
            end_well()
        children.append(child)
    codes = [_code(child) for child in children]
    state = json.loads((folder / "status.json").read_text())["state"] if (folder / "status.json").is_file() else None
    said = log.read_text(errors="replace")[-4000:] if any(codes) else ""
    print(json.dumps({"ranks": num_ranks, "codes": codes, "state": state, "said": said}), flush=True)


def _code(child: int) -> int:
    """Its exit code; one that hangs is killed."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
