"""A rank that fails, dies or falls silent in the middle of a read ends every rank in time, in words that name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.watch import TimeLimits, Watch
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.exchange import RankGroup
from pipeline.memory.layer import Geometry
from pipeline.memory.reader import BankReader
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.positions import PositionEncoding
from tests.ranks import forks, free_port

TIMEOUT_S = 8.0  # run.collective_timeout_s
SLACK_S = 4.0  # a rank's last read before it waits, and the end of its process, on a machine with other work
LIMIT_S = 60.0  # for the start of the processes as well


def fail(how: str) -> None:
    """What the lost rank does in its second read."""
    if how == "raises":
        raise ValueError("a fault of its own")
    if how == "dies":
        os._exit(9)
    if how == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(10 * LIMIT_S)


def read_and_fail(rank: int, world_size: int, port: int, how: str, culprit: int, folder: str) -> None:
    """Reads a sharded memory three times; one rank fails in the second read."""
    os.environ |= {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    limit = timedelta(seconds=TimeLimits.of(TIMEOUT_S).collective_s)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=limit)
    said, log = Path(folder, f"rank_{rank}.txt"), Path(folder, f"rank_{rank}.log")
    sys.stderr = log.open("w")

    def note(state: str, words: str, lost: Collection[int]) -> None:
        said.write_text(f"{state}: got: {words}, lost {lost or set()}")

    watch = Watch(TIMEOUT_S, on_end=note)
    assert dist.group.WORLD is not None
    bank = MemoryBank(BankShape(1, 1, 2, 8, 8, 4), dtype=torch.float32, device=torch.device("cpu"))
    documents = torch.zeros(1, 8, dtype=torch.int64)
    geometry = Geometry(PositionEncoding(), 1.0)
    try:
        for step in (1, 2, 3):
            watch.at(f"step {step}")
            settings = ReadSettings(num_tokens=32, top_k_chunks=2, query_block_tokens=4)
            start = 8 * (world_size * step + rank)
            exchange = RankGroup(dist.group.WORLD)
            reader = BankReader(bank, settings, [geometry], Reading(start, documents), exchange=exchange)
            if step == 2 and rank == culprit:
                Path(folder, "begun").write_text(str(time.time()))
                fail(how)
            reader.read(0, torch.randn(1, 2, 8, 8))
    except Exception as error:
        said.write_text(f"{watch.explained(error)}, lost {watch.lost}")
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "rank {} failed in step 2: ValueError: a fault of its own"),
        ("dies", "rank {} died or fell silent; its last sign: "),
        ("is stopped", "rank {} died or fell silent; its last sign: "),
        ("stands still", "rank {} has not moved; its last sign: step 2; it is in "),
    ],
)
def test_every_rank_ends_and_names_the_culprit(how: str, words: str, culprit: int, tmp_path: Path) -> None:
    arguments = (free_port(), how, culprit, str(tmp_path))
    ranks = [forks().Process(target=read_and_fail, args=(number, 3, *arguments)) for number in range(3)]
    others = [process for number, process in enumerate(ranks) if number != culprit]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    for process in others:
        process.join(max(0.0, deadline - time.monotonic()))
    ended = time.time()
    if how == "is stopped":
        assert ranks[culprit].exitcode is None
        os.kill(ranks[culprit].pid, signal.SIGKILL)  # type: ignore[arg-type]
    ranks[culprit].join(SLACK_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes, "a rank did not end"
    assert all(codes), "a rank that was stopped must not exit with 0"
    assert ended - float((tmp_path / "begun").read_text()) < TIMEOUT_S + SLACK_S
    for number in {0, 1, 2} - {culprit}:
        said = (tmp_path / f"rank_{number}.txt").read_text()
        assert words.format(culprit) in said and "step 2" in said
        assert f"rank {({1, 2} - {culprit, number} or {0}).pop()} " not in said.partition("got: ")[2], (
            "only the culprit"
        )
        assert said.endswith(f"lost {{{culprit}}}" if how in ("dies", "is stopped") else "lost set()")
    if how == "stands still":
        log = (tmp_path / f"rank_{culprit}.log").read_text()
        assert f"rank {culprit} has not moved since step 2; it is here:" in log and "time.sleep(10 * LIMIT_S)" in log


def test_ranks_that_disagree_on_configuration(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.ranks import run_ranks; from tests.distributed.test_faults import disagree;"
        "run_ranks(disagree, 2)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ran.returncode != 0
    assert "the ranks disagree on the configuration" in ran.stderr
    assert "differing ranks: [1]" in ran.stderr


def disagree() -> None:
    """Checks a setting that differs on rank 1."""
    from pipeline.distributed.ranks import check_agreement, rank

    check_agreement("the configuration", {"memory.tokens": 64 + rank()})
