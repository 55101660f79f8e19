"""Ending together: when a rank fails, dies or falls silent, every rank ends in time and says which it was.

A collective that fails says that some peer is gone, not which nor why. So each rank leaves signs in the job's store of
keys and values (a server on rank 0): the step it is in, and, if it fails, with what. Whoever fails looks at the signs
of the others. A thread of each rank watches for failures too: a rank that is stuck where no exception reaches it is
ended by it.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from pipeline.distributed.ranks import rank, world_size
from pipeline.errors import LongMemError, TrainingError

_POLL_S = 1.0
_GRACE_S = 10.0  # others find out about a broken connection at different times
_BY_OTHERS = "stopped by another rank"


class Watch:
    """The signs of life of a job.

    Collective: every rank must make one, after the process group was started from `MASTER_ADDR` and `MASTER_PORT`.

    Args:
        end: Ends this process when another rank has failed and this one is stuck; for tests.
    """

    def __init__(self, *, end: Callable[[str], None] | None = None) -> None:
        self._end = end or _end
        self._stores: list[dist.Store] = []
        self._stopped = threading.Event()
        if world_size() > 1:
            self._stores = [_connect(), _connect()]  # one for each thread: a connection serves one request at a time
            threading.Thread(target=self._watch, args=(self._stores[1],), daemon=True).start()

    def at(self, place: str) -> None:
        """Leaves a sign.

        Args:
            place: Where this rank is, such as `step 12`.
        """
        for store in self._stores[:1]:
            store.set(f"watch/at/{rank()}", place)

    def stop(self) -> None:
        """Stops watching: this rank has done its work."""
        self._stopped.set()

    def explained(self, error: Exception) -> Exception:
        """Says what really happened, once this rank has failed; others learn of it.

        Args:
            error: What this rank failed with.

        Returns:
            The error to end with: this rank's own, or one that names the rank whose failure stopped it.
        """
        self.stop()
        if not self._stores:
            return error
        own_fault = not _is_collective(error)
        try:
            others = self._signs(f"{type(error).__name__}: {error}" if own_fault else _BY_OTHERS)
        except (RuntimeError, OSError):  # the store is gone, and with it rank 0
            others = {0: "rank 0 died or was stopped; it held the job's key-value store"} if rank() else {}
        if own_fault or not others:
            return error
        return TrainingError(
            f"rank {rank()} was stopped by a failure elsewhere",
            got="; ".join(others.values()),
            do="mend what that rank says (its own message comes first in the log), then start again: run.resume 'auto'",
        )

    def _signs(self, mine: str) -> dict[int, str]:
        """Tells the others, waits until they have told or the grace is over; who is to blame, in words."""
        store = self._stores[0]
        # At once: a launcher that sees a rank die leaves the others a second or so.
        print(f"rank {rank()} failed in {self._last(rank())}: {mine}", file=sys.stderr, flush=True)
        store.set(f"watch/failed/{rank()}", mine)
        store.set("watch/failed", "yes")
        told: dict[int, str] = {}
        deadline = time.monotonic() + _GRACE_S
        missing = [number for number in range(world_size()) if number != rank()]
        while missing and time.monotonic() < deadline:
            for number in missing:
                if store.check([f"watch/failed/{number}"]):
                    told[number] = store.get(f"watch/failed/{number}").decode()
            missing = [number for number in missing if number not in told]
            time.sleep(_POLL_S / 4)
        blamed = {
            number: f"rank {number} failed in {self._last(number)}: {words}"
            for number, words in told.items()
            if words != _BY_OTHERS
        }
        if blamed:
            return blamed
        return {number: f"rank {number} died or fell silent; its last sign: {self._last(number)}" for number in missing}

    def _last(self, number: int) -> str:
        store, key = self._stores[0], f"watch/at/{number}"
        return store.get(key).decode() if store.check([key]) else "before the first step"

    def _watch(self, store: dist.Store) -> None:
        """Ends this process if another rank has failed and this one has not noticed within the grace."""
        failed_at: float | None = None
        while not self._stopped.wait(_POLL_S):
            try:
                failed = store.check(["watch/failed"])
            except (RuntimeError, OSError):
                failed = True
            failed_at = failed_at or (time.monotonic() if failed else None)
            if failed_at is not None and time.monotonic() - failed_at > 2 * _GRACE_S:
                self._end(f"rank {rank()} was stuck while other ranks had failed; ended")


def _connect() -> dist.Store:
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=60),
    )
    # A store that outlives a restart by torchrun holds the signs of the attempt that failed.
    return dist.PrefixStore(f"longmem_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)


def _is_collective(error: Exception) -> bool:
    """Whether an error is a collective's complaint about a peer rather than a fault of this rank."""
    if isinstance(error, LongMemError) or not isinstance(error, RuntimeError):
        return False
    words = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        mark in words for mark in ("gloo", "nccl", "connection", "timed out", "timeout")
    )


def _end(words: str) -> None:
    print(f"\n{words}", file=sys.stderr, flush=True)
    os._exit(1)
