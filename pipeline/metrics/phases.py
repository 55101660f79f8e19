"""Seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds that each phase took since the last `collect`.

    Phases nest: the seconds of an inner phase count for it alone, so that all phases together never exceed the time
    that passed. A phase that is left by an exception counts as well.

    Args:
        synchronize: Waits for the accelerator, such as `torch.cuda.synchronize`; called at the start and end of every
            phase. None where work is done by the time that a call returns, as on a CPU.
        clock: Seconds since some moment.
    """

    def __init__(
        self, *, synchronize: Callable[[], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within the block for a phase; several blocks of one name add up."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def collect(self) -> dict[str, float]:
        """Seconds of each phase since the last call; a phase still open goes on counting."""
        self._charge()
        collected, self._seconds = self._seconds, {}
        return collected

    def _charge(self) -> None:
        """Charges the time since the last change of phase to the innermost open phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._open:
            innermost = self._open[-1]
            self._seconds[innermost] = self._seconds.get(innermost, 0.0) + now - self._since
        self._since = now
