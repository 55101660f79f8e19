"""The helper itself: results by rank, every traceback, and no hang that goes unseen."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RanksFailedError, run_ranks


def sum_of_ranks(offset: int) -> tuple[int, float, str]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.environ["OMP_NUM_THREADS"]


def environment_only() -> tuple[str, str, str, bool]:
    return os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], dist.is_initialized()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()  # never returns: rank 1 does not come


def wait_for_rank_that_sleeps() -> None:
    if dist.get_rank() == 0:
        sleep_for_ever()
    dist.barrier()


def sleep_for_ever() -> None:
    time.sleep(3600)


def die_at_once() -> None:
    os._exit(7)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(sum_of_ranks, 2, 10) == [(0, 21.0, "1"), (1, 21.0, "1")]


def test_a_function_may_set_up_by_itself() -> None:
    assert run_ranks(environment_only, 2, init_process_group=False) == [("0", "0", "2", False), ("1", "1", "2", False)]


def test_a_rank_that_raises_is_quoted_and_nobody_waits_for_the_others() -> None:
    begin = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1 raised:") as caught:
        run_ranks(fail_on_rank_one, 2, timeout_s=100)
    assert time.monotonic() - begin < 60
    assert "ValueError: rank one is unwell" in str(caught.value)
    assert "in fail_on_rank_one" in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_hang_is_reported_with_where_each_rank_stands() -> None:
    with pytest.raises(RanksFailedError, match="hang: no answer after 15 s") as caught:
        run_ranks(wait_for_rank_that_sleeps, 2, timeout_s=15)
    message = str(caught.value)
    assert "rank 0 was still running" in message and "in sleep_for_ever" in message
    assert "rank 1 was still running" in message and "in barrier" in message
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RanksFailedError, match="rank 0 died without a word, exit code 7"):
        run_ranks(die_at_once, 1)


def test_results_that_cannot_travel_are_an_error_of_the_rank() -> None:
    with pytest.raises(RanksFailedError, match="rank 0 raised:[\\s\\S]*pickle"):
        run_ranks(make_generator, 1)


def make_generator() -> object:
    return (number for number in range(3))
