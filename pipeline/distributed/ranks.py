"""Ranks: who am I, do we agree, and failing together instead of hanging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import LongMemError, TrainingError

Result = TypeVar("Result")


def rank() -> int:
    """This process's rank in the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for every rank. Collective: every rank must call it."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """One value a rank, in rank order, of anything that pickles. Collective: every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], Result]) -> Result:
    """Runs something on every rank and, if it fails on any, fails on all, naming the ranks.

    Collective: every rank must call it. For checks and file operations; the work itself must hold no collective.

    Args:
        work: What to run.

    Returns:
        This rank's result.

    Raises:
        LongMemError: This rank's own error, if it failed as the others did.
        TrainingError: Some rank failed; says which, with the first message.
    """
    error: Exception | None = None
    result: Result | None = None
    try:
        result = work()
    except (LongMemError, OSError) as caught:
        error = caught
    reports = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    failed = [number for number, report in enumerate(reports) if report is not None]
    if not failed:
        return result  # type: ignore[return-value]
    if isinstance(error, LongMemError) and len(set(reports)) == 1:
        error.on_all_ranks = True
        raise error
    other = TrainingError(f"rank(s) {failed} of {len(reports)} failed; rank {failed[0]}: {reports[failed[0]]}")
    other.on_all_ranks = True
    raise other from error


def on_rank_zero(work: Callable[[], None]) -> None:
    """Runs something on rank 0; if it fails, every rank fails. Collective: all wait until rank 0 is done."""
    together(work if rank() == 0 else lambda: None)


def check_agreement(name: str, value: Any) -> None:
    """Checks that every rank holds the same value.

    Collective: every rank must call it.

    Args:
        name: What the value is, for the message.
        value: A small value that pickles.

    Raises:
        TrainingError: The ranks disagree; names those that differ from rank 0.
    """
    values = gather_objects(value)
    other = [number for number, found in enumerate(values) if found != values[0]]
    if other:
        error = TrainingError(
            f"the ranks disagree on {name}",
            got=f"rank {other[0]} has {values[other[0]]!r} (differing ranks: {other})",
            expected=f"rank 0's {values[0]!r}",
            do="start every rank with the same files and command line",
        )
        error.on_all_ranks = True
        raise error
