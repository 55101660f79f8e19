"""Agreeing and failing together, on two ranks and on none."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.distributed.ranks import (
    barrier,
    check_agreement,
    gather_objects,
    on_rank_zero,
    rank,
    together,
    world_size,
)
from pipeline.errors import DataError, LongMemError, TrainingError
from tests.ranks import run_ranks


def caught(work: Any) -> str:
    try:
        return f"returned {work()!r}"
    except LongMemError as error:
        return f"{type(error).__name__}: {error}"


def fail_on(*ranks: int, error: Exception) -> Any:
    def work() -> int:
        if rank() in ranks:
            raise error
        return 10 + rank()

    return work


def two_ranks() -> dict[str, Any]:
    written: list[int] = []
    barrier()
    return {
        "rank": (rank(), world_size()),
        "gather": gather_objects({"rank": rank()}),
        "fine": caught(lambda: together(fail_on(error=DataError("no")))),
        "all fail alike": caught(lambda: together(fail_on(0, 1, error=DataError("no such store")))),
        "one fails": caught(lambda: together(fail_on(1, error=DataError("no such store")))),
        "one file fails": caught(lambda: together(fail_on(1, error=FileNotFoundError(2, "gone", "x.json")))),
        "all fail differently": caught(lambda: together(fail_on(0, 1, error=DataError(f"words of {rank()}")))),
        "rank zero works": caught(lambda: on_rank_zero(lambda: written.append(rank()))),
        "rank zero fails": caught(lambda: on_rank_zero(fail_on(0, error=DataError("folder in use")))),
        "written": written,
        "agree": caught(lambda: check_agreement("the settings", {"steps": 3})),
        "disagree": caught(lambda: check_agreement("the settings", {"steps": 3 + rank()})),
    }


def test_two_ranks_agree_and_fail_together():
    found = run_ranks(two_ranks, 2)
    for number in (0, 1):
        of_rank = found[number]
        assert of_rank["rank"] == (number, 2)
        assert of_rank["gather"] == [{"rank": 0}, {"rank": 1}]
        assert of_rank["fine"] == f"returned {10 + number}"
        assert of_rank["all fail alike"] == "DataError: no such store"
        for name, words in {
            "one fails": "rank(s) [1] of 2 failed; rank 1: DataError: no such store",
            "one file fails": "rank(s) [1] of 2 failed; rank 1: FileNotFoundError: [Errno 2] gone: 'x.json'",
            "all fail differently": "rank(s) [0, 1] of 2 failed; rank 0: DataError: words of 0",
            "rank zero fails": "rank(s) [0] of 2 failed; rank 0: DataError: folder in use",
        }.items():
            assert of_rank[name] == f"TrainingError: {words}"
        assert of_rank["rank zero works"] == of_rank["agree"] == "returned None"
        assert of_rank["written"] == ([0] if number == 0 else [])
        assert of_rank["disagree"] == (
            "TrainingError: the ranks disagree on the settings; got: rank 1 has {'steps': 4} (differing ranks: [1]); "
            "expected: rank 0's {'steps': 3}; do: start every rank with the same files and command line"
        )


def test_without_process_group_there_is_one_rank():
    assert (rank(), world_size(), gather_objects(5)) == (0, 1, [5])
    barrier()
    assert together(lambda: 7) == 7
    with pytest.raises(DataError, match="no such store"):
        together(fail_on(0, error=DataError("no such store")))
    with pytest.raises(TrainingError, match=r"rank\(s\) \[0\] of 1 failed; rank 0: FileNotFoundError"):
        together(fail_on(0, error=FileNotFoundError("gone")))
    check_agreement("anything", 3)
