"""Ending together: when a rank fails, dies or falls silent, every rank ends in time and says which it was.

A collective that fails says that some peer is gone, not which nor why. So each rank leaves signs (`signs.py`). Two
threads of each rank stand beside training: one reads and leaves signs; the other, which never waits for the store,
ends the process when training does not, for it may be stuck where no exception reaches it.

All of it may take `run.collective_timeout_s` = T. Its last two graces are kept for finding out who it was:

    T - 2 graces   a collective that waits for a rank fails
    T / 2          a process that gives no sign of life (killed, stopped, its machine gone) is reported
    grace          min(10 s, T / 4): from the first report until every rank has told what it knows, and ended
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from pipeline.distributed.ranks import barrier, rank, world_size
from pipeline.distributed.signs import DONE, Report, Signs
from pipeline.errors import EXIT_FAILED, EXIT_PREEMPTED, LongMemError, TrainingError

_MENDED = "mend what that rank says (its own message comes first in the log), then start again: run.resume 'auto'"
_watches = itertools.count()


@dataclass(frozen=True)
class TimeLimits:
    """How a job's time-out is divided; all in seconds.

    Attributes:
        collective_s: A collective fails after it.
        silent_s: A process without a sign of life is reported after it.
        grace_s: For all ranks to end after the first report.
        poll_s: Between two looks.
    """

    collective_s: float
    silent_s: float
    grace_s: float
    poll_s: float

    @classmethod
    def of(cls, timeout_s: float) -> TimeLimits:
        """Divides `run.collective_timeout_s`."""
        grace = min(10.0, timeout_s / 4)
        return cls(timeout_s - 2 * grace, timeout_s / 2, grace, min(0.5, timeout_s / 40))


class Watch:
    """The watch of a job.

    Collective: every rank must make one, after the process group was started from `MASTER_ADDR` and `MASTER_PORT`.

    Args:
        timeout_s: `run.collective_timeout_s`.
        on_end: Told state and reason before this process is ended from outside its training.
        leave: Ends this process with an exit code; for tests.

    Attributes:
        lost: Ranks that were found dead or silent, once something went wrong.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        on_end: Callable[[Literal["failed", "preempted"], str, Collection[int]], None] = lambda *_: None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.limits, self.lost = TimeLimits.of(timeout_s), set[int]()
        self._on_end, self._leave = on_end, leave
        self._training = threading.get_ident()
        self._stopped, self._is_leaving, self._store_is_lost = threading.Event(), False, False
        self._place, self._looks, self._num_heard = "the beginning", 0, 0
        self._reports: list[Report] = []
        self._places: dict[int, str] = {}
        self._signs: Signs | None = None
        self._threads: list[threading.Thread] = []
        number = next(_watches)
        if world_size() > 1:
            self._signs, asking = Signs(rank(), number), Signs(rank(), number)
            self._signs.at(self._place)
            self._signs.beat("0")
            barrier()  # from here on every rank has given its signs
            for work, arguments in ((self._look, (asking,)), (self._guard, ())):
                self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
                self._threads[-1].start()

    @property
    def is_ending(self) -> bool:
        """Whether something went wrong, so that this process is ended in time, by itself or by this watch."""
        return bool(self._reports) and not self._stopped.is_set()

    def at(self, place: str) -> None:
        """Leaves a sign of where this rank is, such as `step 12`."""
        self._place = place
        if self._signs is not None:
            self._tell(lambda signs: signs.at(place))

    def stop(self) -> None:
        """Stops watching: this rank has done its work, or ends by itself."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._tell(lambda signs: signs.beat(DONE.decode()))

    def close(self) -> None:
        """Stops watching, and waits for its threads."""
        self.stop()
        # One that is in the store's C++ code when the interpreter ends brings the process down ("terminate called
        # without an active exception"), after a good end as after any other.
        for thread in self._threads:
            thread.join(self.limits.grace_s)

    def end_all(self, words: str) -> None:
        """Has every rank stopped at once, without saving; the caller then ends this one."""
        if self._signs is None:
            return
        self._tell(lambda signs: signs.report(Report(rank(), "stopped", self._place, words)))
        # Rank 0's process holds the store: it stays until the others have read why.
        self._wait(lambda: rank() != 0 or self._num_heard >= world_size(), 2 * self.limits.poll_s)

    def explained(self, error: Exception) -> Exception:
        """Says what really happened, once this rank has failed; others learn of it.

        Args:
            error: What this rank failed with.

        Returns:
            The error to end with: this rank's own, or one that names the rank whose failure stopped it.
        """
        if self._signs is None or (isinstance(error, LongMemError) and error.on_all_ranks):
            self.stop()
            return error
        self._is_leaving = True
        own, looks = not _is_collective(error), self._looks
        words = f"{type(error).__name__}: {error}"
        report = Report(rank(), "own" if own else "peer", self._place, words)
        self._tell(lambda signs: signs.report(report))
        self._wait(self._all_have_heard if own else self._is_clear, self.limits.grace_s)
        self._store_is_lost |= self._looks == looks  # no answer in all that time
        blamed = self._blamed()
        self._share(blamed)
        self.stop()
        if own or not blamed:
            return error
        return TrainingError(
            f"rank {rank()} was stopped by a failure elsewhere", got="; ".join(map(str, blamed)), do=_MENDED
        )

    def _tell(self, tell: Callable[[Signs], None]) -> None:
        """Leaves a sign, if there is still somebody to leave it for."""
        if self._signs is not None and not self._store_is_lost:
            try:
                tell(self._signs)
            except (RuntimeError, OSError):
                self._store_is_lost = True

    def _share(self, blamed: list[Report]) -> None:
        """Rank 0's process takes the store with it: the others read first whom it found to blame."""
        if rank() == 0:
            for report in blamed:
                if report not in self._reports:
                    self._tell(lambda signs, found=report: signs.report(found))  # type: ignore[misc]
            time.sleep(2 * self.limits.poll_s)

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and not self._store_is_lost and time.monotonic() < deadline:
            time.sleep(self.limits.poll_s / 10)

    def _all_have_heard(self) -> bool:
        return self._num_heard >= world_size()

    def _is_clear(self) -> bool:
        """Whether it is known who is to blame: somebody says so, or all have said that they are not."""
        told = {report.rank for report in self._reports}
        return any(report.why in ("own", "silent") for report in self._reports) or len(told) == world_size()

    def _blamed(self) -> list[Report]:
        """Who is to blame: those that failed by themselves, else the dead and silent, else those that stand still."""
        by_why = {why: [found for found in self._reports if found.why == why] for why in ("own", "silent", "stuck")}
        told = {report.rank for report in self._reports} | {rank()}
        missing = [
            Report(number, "silent", self._places.get(number, "the beginning"), "it told nothing when others failed")
            for number in range(world_size())
            if number not in told
        ]
        if self._store_is_lost:
            known = any(by_why.values()) or rank() == 0
            words = f"its process held the job's store of signs; rank {rank()} was in {self._place}"
            missing = [] if known else [Report(0, "silent", self._places.get(0, "unknown"), words)]
        chosen = by_why["own"] or by_why["silent"] or [*by_why["stuck"], *missing]
        blamed = {found.rank: found for found in chosen if found.rank != rank()}
        self.lost = {number for number, found in blamed.items() if found.why == "silent"}
        return list(blamed.values())

    def _look(self, signs: Signs) -> None:
        """Gives signs of life and reads those of others."""
        quiet = _Quiet([0] if rank() else list(range(1, world_size())))
        alarmed = _Clock()
        try:
            for beat in itertools.count(1):
                if self._stopped.wait(self.limits.poll_s):
                    return
                signs.beat(str(beat))
                self._report_silent(signs, quiet)
                reports = signs.reports()
                if reports and not self._reports:
                    signs.hear(1)
                    self._places = signs.places(range(world_size()))
                self._reports = reports
                if reports:
                    self._num_heard = signs.hear(0)
                    if alarmed.seconds(self.limits.poll_s) > self.limits.grace_s / 2 and not self._is_leaving:
                        self._report_stuck(signs)
                self._looks = beat
        except (RuntimeError, OSError):
            self._store_is_lost = True

    def _report_silent(self, signs: Signs, quiet: _Quiet) -> None:
        """Rank 0 watches over all the others, and they over rank 0; sharply once something went wrong."""
        limit_s = 5 * self.limits.poll_s if self._reports else self.limits.silent_s
        for number in quiet.longer_than(limit_s, signs.beats(quiet.ranks), self.limits.poll_s):
            words = f"no sign of life for {limit_s:g} s"
            signs.report(Report(number, "silent", signs.places([number])[number], words))

    def _report_stuck(self, signs: Signs) -> None:
        """Says where training is, after others have failed and it has not: once."""
        if any(report.rank == rank() for report in self._reports):
            return
        stack = traceback.extract_stack(sys._current_frames().get(self._training))
        words = f"it is in {stack[-1].filename}:{stack[-1].lineno}, {stack[-1].name}" if stack else "it has ended"
        waits = bool(stack) and f"torch{os.sep}distributed" in stack[-1].filename
        if not waits:
            print(f"\nrank {rank()} has not moved since {self._place}; it is here:", file=sys.stderr)
            print("".join(traceback.format_list(stack)), file=sys.stderr, flush=True)
        signs.report(Report(rank(), "peer" if waits else "stuck", self._place, words))

    def _guard(self) -> None:
        """Ends this process where training cannot: others have failed, or rank 0's process does not answer."""
        unanswered, alarmed, looks = _Clock(), _Clock(), -1
        while not self._stopped.wait(self.limits.poll_s):
            if looks != self._looks:
                unanswered, looks = _Clock(), self._looks
            self._store_is_lost |= unanswered.seconds(self.limits.poll_s) > self.limits.silent_s
            stopped = [report for report in self._reports if report.why == "stopped"]
            if stopped:
                self._end("preempted", stopped[0].words, EXIT_PREEMPTED)
            elif self._reports or self._store_is_lost:
                # Training that has failed by itself is about to end, and takes its own grace for it.
                grace = self.limits.grace_s * (1.5 if self._is_leaving else 1.0)
                if alarmed.seconds(self.limits.poll_s) > grace:
                    blamed = self._blamed()
                    self._share(blamed)
                    words = "; ".join(map(str, blamed)) or f"it has not moved since {self._place}"
                    self._end("failed", f"rank {rank()} was ended: {words}", EXIT_FAILED)

    def _end(self, state: Literal["failed", "preempted"], words: str, code: int) -> None:
        if self._stopped.is_set():
            return
        print(f"\nerror: {words}", file=sys.stderr, flush=True)
        # A file system that hangs must not keep the process alive.
        telling = threading.Thread(target=self._on_end, args=(state, words, self.lost), daemon=True)
        telling.start()
        telling.join(self.limits.grace_s / 4)
        self._leave(code)


class _Clock:
    """Adds up short times. A whole job that is suspended for hours and goes on has not been silent for hours."""

    def __init__(self) -> None:
        self._last, self._total = time.monotonic(), 0.0

    def seconds(self, usual_s: float) -> float:
        now = time.monotonic()
        self._total += min(now - self._last, 2 * usual_s + 0.5)
        self._last = now
        return self._total


class _Quiet:
    """How long ranks have given no sign of life."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self._beats: dict[int, bytes] = {}
        self._clocks = {number: _Clock() for number in ranks}

    def longer_than(self, seconds: float, beats: dict[int, bytes], poll_s: float) -> list[int]:
        """Those that have now been quiet too long; each is named once."""
        for number, beat in beats.items():
            if beat == DONE:
                self._forget(number)
            elif beat != self._beats.get(number):
                self._beats[number], self._clocks[number] = beat, _Clock()
        found = [number for number in self.ranks if self._clocks[number].seconds(poll_s) > seconds]
        for number in found:
            self._forget(number)
        return found

    def _forget(self, number: int) -> None:
        self.ranks = [other for other in self.ranks if other != number]


def _is_collective(error: BaseException) -> bool:
    """Whether an error is a collective's complaint about a peer rather than a fault of this rank."""
    if isinstance(error, LongMemError):  # such as a backbone that could not be loaded, because a peer was gone
        return error.__cause__ is not None and _is_collective(error.__cause__)
    if not isinstance(error, RuntimeError):
        return False
    words = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        mark in words for mark in ("gloo", "nccl", "connection", "timed out", "timeout")
    )
