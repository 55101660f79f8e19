"""A rank that fails, dies or falls silent in the middle of a read ends every rank in time, in words that name it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.watch import Watch
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.exchange import RankGroup
from pipeline.memory.reader import BankReader
from pipeline.memory.view import Geometry, ReadSettings
from pipeline.positions import PositionEncoding

TIMEOUT_S = 4  # of collectives
LIMIT_S = 60  # within which every rank must have ended


def read_and_fail(rank: int, world_size: int, port: int, how: str, folder: str) -> None:
    """Reads a sharded memory three times; rank 1 fails in the second read."""
    os.environ |= {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S))
    watch = Watch()
    assert dist.group.WORLD is not None
    bank = MemoryBank(BankShape(1, 1, 2, 8, 8, 4), dtype=torch.float32, device=torch.device("cpu"))
    documents = torch.zeros(1, 8, dtype=torch.int64)
    geometry = Geometry(PositionEncoding(), 1.0)
    try:
        for step in (1, 2, 3):
            watch.at(f"step {step}")
            settings = ReadSettings(num_tokens=32, top_k_chunks=2, query_block_tokens=4)
            start = 8 * (2 * step + rank)
            reader = BankReader(
                bank, settings, [geometry], start=start, documents=documents, exchange=RankGroup(dist.group.WORLD)
            )
            if step == 2 and rank == 1:
                if how == "raises":
                    raise ValueError("a fault of its own")
                if how == "dies":
                    os._exit(9)
                time.sleep(10 * LIMIT_S)
            reader.read(0, torch.randn(1, 2, 8, 8))
    except Exception as error:
        Path(folder, f"rank_{rank}.txt").write_text(str(watch.explained(error)))
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "rank 1 failed in step 2: ValueError: a fault of its own"),
        ("dies", "rank 1 died or fell silent; its last sign: step 2"),
        ("is_silent", "rank 1 died or fell silent; its last sign: step 2"),
    ],
)
def test_every_rank_ends_and_names_the_culprit(how: str, words: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=read_and_fail, args=(r, 2, port, how, str(tmp_path))) for r in range(2)]
    begun = time.monotonic()
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
    assert None not in codes, "a rank did not end"
    assert all(codes), "a rank that was stopped must not exit with 0"
    assert time.monotonic() - begun < LIMIT_S
    assert words in (tmp_path / "rank_0.txt").read_text()


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
