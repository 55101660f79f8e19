"""Starts gloo ranks on this machine, one process each, and brings back results, tracebacks, or where they hang."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_S = 3.0
"""Seconds that the others get after a rank failed: time to fail for the same reason, and to say so."""
_POLL_S = 0.02
_FIRST_PORT, _PORT_BLOCKS, _BLOCK_PORTS = 16384, 8, 2048
# What a training imports; also what DeepSpeed and transformers import only when an engine starts.
PRELOADED = [
    "datasets",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "pipeline.training.loop",
    "torch.utils.tensorboard",
    "transformers.integrations",
    "transformers.models.llama.modeling_llama",
]


class RanksFailedError(AssertionError):
    """At least one rank raised, died or hung. The message holds what each of them last said."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    init_process_group: bool = True,
    grace_s: float = GRACE_S,
) -> list[Any]:
    """Calls a function on every rank of a new world and waits for all of them.

    Each rank is a new process with `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` as a launcher
    sets them, and one thread.

    Args:
        function: Called as `function(*args)`; a function of a module, so that another process can import it. It asks
            `torch.distributed` for its rank.
        world_size: Number of ranks, a literal in the test.
        *args: The same for every rank; anything that pickle can carry.
        timeout_s: Seconds after which the ranks that are still running count as hung.
        init_process_group: False if the function sets up `torch.distributed` by itself.
        grace_s: Seconds that the others get after a rank failed; more where they are to end by themselves.

    Returns:
        What the function returned, by rank; anything that pickle can carry.

    Raises:
        RanksFailedError: A rank raised, died or hung. No rank is left running.
    """
    context = forks()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, port = Path(name), free_port()
        processes: list[BaseProcess] = [
            context.Process(
                target=_run_rank, args=(folder, rank, world_size, port, init_process_group, timeout_s, function, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            hung = _wait(processes, timeout_s=timeout_s, grace_s=grace_s)
            for rank in hung:
                _ask_for_stack(processes[rank], folder / f"{rank}.stack")
        finally:
            started = [process for process in processes if process.pid is not None]
            for process in started:  # all before any is waited for: a rank that outlives another one reports its end
                process.kill()
            for process in started:
                process.join()
        return _collect(folder, processes, hung, timeout_s=timeout_s)


def _run_rank(
    folder: Path,
    rank: int,
    world_size: int,
    port: int,
    init_process_group: bool,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {**rank_environment(rank, world_size, port), "OMP_NUM_THREADS": "1"}
    # Open as long as the process lives: the handler writes when the parent asks, even from within a stuck collective.
    faulthandler.register(signal.SIGUSR1, file=(folder / f"{rank}.stack").open("w"), all_threads=True)
    try:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        if init_process_group:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2 * timeout_s))
        result = pickle.dumps(function(*args))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        (folder / f"{rank}.result").write_bytes(result)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def forks() -> ForkServerContext:
    """Processes that are forked from a server which has imported everything: a start costs moments, not seconds.

    They have the environment that the server was started with, the first time that one is asked for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank of one machine, and that it stays on it."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(processes: list[BaseProcess], *, timeout_s: float, grace_s: float) -> list[int]:
    """Waits until all have ended, the time is over, or the grace after the first failure is; returns who still runs."""
    deadline = time.monotonic() + timeout_s
    has_failed = False
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if None not in codes:
            return []
        if not has_failed and any(codes):
            has_failed = True
            deadline = min(deadline, time.monotonic() + grace_s)
        time.sleep(_POLL_S)
    return [rank for rank, process in enumerate(processes) if process.is_alive()]


def _ask_for_stack(process: BaseProcess, stack_file: Path) -> None:
    # Without the file the rank has not come as far as its handler, and the signal would kill it unheard.
    if process.pid is None or not stack_file.exists():
        return
    os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    while not stack_file.stat().st_size and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    time.sleep(_POLL_S)  # the last lines of the stack


def _collect(folder: Path, processes: list[BaseProcess], hung: list[int], *, timeout_s: float) -> list[Any]:
    problems, waiting = [], []
    for rank, process in enumerate(processes):
        error, stack = folder / f"{rank}.error", folder / f"{rank}.stack"
        if error.exists():
            problems.append(f"rank {rank} raised:\n{error.read_text()}")
        elif rank in hung:
            where = stack.read_text() if stack.exists() else ""
            waiting.append(f"rank {rank} was still running, here:\n{where or '(it had not started yet)'}")
        elif process.exitcode != 0:
            problems.append(f"rank {rank} died without a word, exit code {process.exitcode}")
    if waiting and not problems:
        problems.append(f"hang: no answer after {timeout_s:g} s")
    if problems:
        raise RanksFailedError("\n".join([f"{len(processes)} ranks:", *problems, *waiting]))
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(len(processes))]


def _ports_of_this_worker() -> Iterator[int]:
    """Ports that tests of another pytest-xdist worker do not use, over and over.

    They lie below those that Linux gives to connections: it may be seconds until a launcher's ranks listen at one.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PORT_BLOCKS
    first = _FIRST_PORT + worker * _BLOCK_PORTS
    return itertools.cycle(random.Random().sample(range(first, first + _BLOCK_PORTS), _BLOCK_PORTS))


_ports = _ports_of_this_worker()


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
