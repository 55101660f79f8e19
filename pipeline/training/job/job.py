"""The job that a run is part of: its watch, its status and its lock, and how it ends when something goes wrong."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from pipeline.checkpoint.room import free_words
from pipeline.config.schema import Config
from pipeline.distributed.ranks import barrier, on_rank_zero, rank, world_size
from pipeline.distributed.signals import Signals
from pipeline.distributed.watch import Watch
from pipeline.errors import LongMemError, TrainingError
from pipeline.training.job.run_folder import claim, gone, is_claimed, is_gone, unusable
from pipeline.training.job.run_lock import RunLock
from pipeline.training.job.status import StatusFile

logger = logging.getLogger(__name__)
_LAST_WORDS_S = 20.0  # twice the longest grace of a watch
_ILL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)


class Job:
    """The job of this process.

    Collective: every rank must make one, after the process group was started.

    Args:
        config: The run's settings.
        signals: What may ask it to stop, or None.
    """

    def __init__(self, config: Config, signals: Signals | None) -> None:
        self.config, self.folder = config, Path(config.run.output_dir)
        self.status = StatusFile(self.folder, steps=config.train.steps)
        self._lock = RunLock(self.folder)
        self.watch = Watch(config.run.collective_timeout_s, on_end=self._on_end)
        self._failed_at: float | None = None
        self._has_claimed = False
        if signals is not None:
            signals.before_end(self._on_signal)
            signals.unless(self._is_ending)

    def begin(self, step: int) -> None:
        """Takes the folder of a run that goes on; a new one's is taken by `claim`. Raises TrainingError. Collective."""
        if is_claimed(self.folder):
            on_rank_zero(self._lock.acquire)
        self.status.begin(step, world_size=world_size(), write=rank() == 0 and is_claimed(self.folder))

    def claim(self, step: int) -> None:
        """Takes the run folder: nothing but training is left to do.

        Collective: every rank must call it.

        Args:
            step: Optimizer steps done.

        Raises:
            TrainingError: It holds something else, or another job writes into it.
        """

        def take() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
            except OSError as error:
                raise unusable(self.folder, error) from error
            claim(self.folder, self.config)

        on_rank_zero(take)
        self._has_claimed = True
        self.status.begin(step, world_size=world_size(), write=rank() == 0)

    def check_folder(self) -> None:
        """Raises TrainingError on rank 0 if the run folder is gone: open files stay writable, steps would be lost."""
        if rank() == 0 and is_gone(self.folder):
            raise gone(self.folder)

    def after_step(self, step: int) -> None:
        """Gives a sign of life after an optimizer step."""
        self.status.at(step, write=rank() == 0)

    def end(self, state: Literal["finished", "preempted"], reason: str | None) -> None:
        """The job has done its work; `reason`: why it is not finished, or None. Collective: every rank must call it."""
        if rank() == 0:
            self.status.end(state, reason)
        with suppress(RuntimeError):  # all is done: a rank that is lost now is lost to nobody
            barrier()  # no watch is to see rank 0's process, which holds the store, end before its own rank is done
        self.watch.close()
        self._lock.release()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Whatever fails inside ends the job on every rank in time, with the reason in its status.

        Yields:
            Nothing.

        Raises:
            LongMemError: This rank's own error in words, or one that names the rank whose failure stopped it.
        """
        try:
            yield
        except Exception as error:
            self._failed_at = time.monotonic()
            known = self._in_words(error)
            explained = self.watch.explained(known)
            # A run that is refused before it began leaves no folder behind.
            is_refusal = explained is error and isinstance(error, LongMemError) and not self.folder.exists()
            if (rank() == 0 or 0 in self.watch.lost) and not is_refusal:
                own_bug = "" if isinstance(explained, LongMemError) else f"{type(explained).__name__}: "
                self.status.end("failed", f"{own_bug}{explained}")
            self._lock.release()
            if explained is error:
                raise
            raise explained from error

    def _is_ending(self) -> bool:
        """Whether a failure is about to end this process; one that does not come to its end is no reason to wait."""
        has_time = self._failed_at is not None and time.monotonic() - self._failed_at < _LAST_WORDS_S
        return has_time or self.watch.is_ending

    def _on_end(self, state: Literal["failed", "preempted"], reason: str, lost: Collection[int]) -> None:
        """This process is ended while its training is stuck."""
        if rank() == 0 or 0 in lost:
            self.status.end(state, reason)

    def _on_signal(self, words: str) -> None:
        """This process is ended by a signal."""
        logger.error("%s", words)
        if rank() == 0:
            self.status.end("preempted", words)
        self.watch.end_all(f"{words} (rank {rank()})")

    def _in_words(self, error: Exception) -> Exception:
        """Says what to do about a run folder that is gone, an ill disk, a want of memory; leaves other errors."""
        told: LongMemError | None = None
        if self._has_claimed and is_gone(self.folder):
            told = gone(self.folder)
        elif isinstance(error, OSError) and (error.errno in _ILL_DISK or self._is_own(error)):
            told = TrainingError(
                f"rank {rank()} could not write; the newest whole checkpoint is untouched",
                got=f"{type(error).__name__}: {error}; {free_words(self.folder)}",
                do="see to the disk (room, quota, mounted read-only), then start again to go on from there",
            )
        elif _is_out_of_memory(error):
            told = TrainingError(
                f"rank {rank()} has not enough memory",
                got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
                do="see what fits with launch/plan.py, which names for each part the settings that make it smaller",
            )
        if told is None:
            return error
        told.on_all_ranks = isinstance(error, LongMemError) and error.on_all_ranks
        told.__cause__ = error
        return told

    def _is_own(self, error: OSError) -> bool:
        """Whether an error is about a file of the run folder: such as TensorBoard's, which somebody removed."""
        return error.filename is not None and os.fsdecode(error.filename).startswith(f"{self.folder}{os.sep}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
