"""Work on a thread beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pipeline.distributed.ranks import gather_objects

Result = TypeVar("Result")
_POLL_S = 0.5


class Background(Generic[Result]):
    """Runs something on a thread of its own, begun at once. The thread does not outlive the process's main thread.

    Args:
        work: What to run; it must hold no collective, which the training is using at the same time.

    Attributes:
        result: What it returned, once it is done.
        error: What it raised, once it is done; None if it went well.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self.result: Result | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self, *, wait_s: float = 0.0) -> bool:
        """Whether it has ended, well or not, after at most `wait_s` seconds: `result` or `error` can be read."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # whatever it is, the main thread says it on every rank
            self.error = error


def wait_for_all(task: Background[Any] | None) -> None:
    """Waits until the work of every rank has ended; no single collective waits long. Collective: every rank."""
    while not all(gather_objects(task is None or task.is_done(wait_s=_POLL_S))):
        pass
