"""The signs that ranks leave for each other in the job's store of keys and values (a server in rank 0's process).

Under `longmem_<restart>_<watch>/`, `N` a rank:

at/N       the place that it is in, such as `step 12`
beat/N     a number that a thread of it raises as long as the process lives; `done` when it has done its work
reports    one line of JSON for each thing that went wrong, appended by whoever saw it
alarm      there are reports
heard      how many ranks have read the first report
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist

DONE = b"done"


@dataclass(frozen=True)
class Report:
    """Something that went wrong.

    Attributes:
        rank: Whom it is about.
        why: `own`: it failed by itself; `peer`: a collective of it failed; `stuck`: it has not moved; `silent`: its
            process gives no sign; `stopped`: it was told to stop at once.
        place: Where it was.
        words: What happened.
    """

    rank: int
    why: Literal["own", "peer", "stuck", "silent", "stopped"]
    place: str
    words: str

    def __str__(self) -> str:
        if self.why == "silent":
            return f"rank {self.rank} died or fell silent; its last sign: {self.place}; {self.words}"
        if self.why == "stuck":
            return f"rank {self.rank} has not moved; its last sign: {self.place}; {self.words}"
        return f"rank {self.rank} failed in {self.place}: {self.words}"


class Signs:
    """One connection to the store; its calls come one after another.

    Only calls that are said to ask wait for an answer, which does not come while the server's process is stopped.

    Args:
        rank: This rank.
        number: Which watch of this process it serves; the same on all ranks.
    """

    def __init__(self, rank: int, number: int) -> None:
        server = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=60),
        )
        # A store that outlives a restart by torchrun holds the signs of the attempt that failed.
        prefix = f"longmem_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{number}"
        self._store, self._rank, self._lock = dist.PrefixStore(prefix, server), rank, threading.Lock()

    def at(self, place: str) -> None:
        """Says where this rank is, such as `step 12`."""
        with self._lock:
            self._store.set(f"at/{self._rank}", place)

    def beat(self, beat: str) -> None:
        """Gives a sign of life: another text each time."""
        with self._lock:
            self._store.set(f"beat/{self._rank}", beat)

    def report(self, report: Report) -> None:
        """Tells all ranks of something that went wrong."""
        with self._lock:
            self._store.append("reports", json.dumps(asdict(report)) + "\n")  # type: ignore[attr-defined]
            self._store.set("alarm", "yes")

    def reports(self) -> list[Report]:
        """Asks what went wrong: all reports so far, oldest first."""
        with self._lock:
            lines = self._store.get("reports").decode().splitlines() if self._store.check(["alarm"]) else []
        return [Report(**json.loads(line)) for line in lines]

    def beats(self, ranks: Sequence[int]) -> dict[int, bytes]:
        """Asks for the newest beats of ranks, each of which has given one before."""
        return self._get("beat", ranks)

    def places(self, ranks: Sequence[int]) -> dict[int, str]:
        """Asks where ranks are, each of which has said it before."""
        return {rank: place.decode() for rank, place in self._get("at", ranks).items()}

    def hear(self, times: int) -> int:
        """Asks how many ranks know of a report; `times` is 1 to be counted among them, 0 only to ask."""
        with self._lock:
            return int(self._store.add("heard", times))

    def _get(self, key: str, ranks: Iterable[int]) -> dict[int, bytes]:
        ranks = list(ranks)
        with self._lock:
            values = self._store.multi_get([f"{key}/{rank}" for rank in ranks]) if ranks else []
        return dict(zip(ranks, values, strict=True))
