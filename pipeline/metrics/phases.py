"""Seconds of a step by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class PhaseTimer:
    """Adds up the seconds that each phase took since the last `collect`.

    Phases nest: the seconds of an inner phase count for it alone, so that all phases together never exceed the time
    that passed. A phase that is left by an exception counts as well.

    Args:
        clock: Says what moment it is. On an accelerator `events_of`: work is queued there, not done, by the time that a
            call returns, and a wait at each phase would cost more than many a phase.
        between: Seconds from one moment to a later one; asked only in `collect`.
    """

    def __init__(
        self, *, clock: Callable[[], Any] = time.perf_counter, between: Callable[[Any, Any], float] = lambda a, b: b - a
    ) -> None:
        self._clock, self._between = clock, between
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._since: Any = None

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
        """Seconds of each phase since the last call; a phase still open goes on counting. Waits for an accelerator."""
        self._charge()
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = {}
        for name, begun, ended in spans:
            seconds[name] = seconds.get(name, 0.0) + self._between(begun, ended)
        return seconds

    def _charge(self) -> None:
        """Charges the time since the last change of phase to the innermost open phase."""
        now = self._clock()
        if self._open:
            self._spans.append((self._open[-1], self._since, now))
        self._since = now


def events_of(event: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Arguments of a `PhaseTimer` that times what an accelerator does, by events in its queue.

    Args:
        event: Makes one, such as `torch.cuda.Event`.

    Returns:
        `clock` and `between`.
    """

    def clock() -> Any:
        moment = event(enable_timing=True)
        moment.record()
        return moment

    def between(begun: Any, ended: Any) -> float:
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000

    return {"clock": clock, "between": between}
