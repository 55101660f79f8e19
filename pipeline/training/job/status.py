"""`status.json` of a run folder: how the run goes, for people and for the scripts that start it again."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from pipeline.config.untrusted import Typed, parse_json, read_small, what_is_wrong
from pipeline.errors import DataError
from pipeline.files import write_text

logger = logging.getLogger(__name__)
STATUS_NAME = "status.json"
EVERY_S = 10.0
"""Least seconds between two signs of life."""

State = Literal["running", "finished", "preempted", "failed"]


def _moment(text: str) -> str:
    """Checks a time: one without a zone could be anybody's."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone; expected: such as 2026-01-31T12:00:00+00:00")
    return text


Count = Annotated[int, Field(ge=0, lt=2**63)]


class Status(Typed):
    """How a run goes.

    Attributes:
        state: `running`; `finished`: nothing is left to do; `preempted`: start it again to go on; `failed`: see to the
            reason first.
        step: Optimizer steps done.
        steps: Optimizer steps of the whole run.
        time: When this was so, UTC, ISO 8601 with seconds; of a running one its last sign of life.
        reason: Why it is not running, or None.
        host: The machine of rank 0.
        world_size: Number of ranks.
    """

    state: State
    step: Count
    steps: Count
    time: Annotated[str, AfterValidator(_moment)]
    reason: str | None
    host: str
    world_size: Count

    @property
    def age_s(self) -> float:
        """Seconds since `time`."""
        return (datetime.now(timezone.utc) - datetime.fromisoformat(self.time)).total_seconds()


def read_status(folder: Path) -> Status | None:
    """The status of a run; None if it has none. Raises DataError: status.json holds something else."""
    path = folder / STATUS_NAME
    try:
        return Status.model_validate(parse_json(read_small(path)))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        got = what_is_wrong(error)
    except OSError as error:
        got = error.strerror or str(error)
    except ValueError as error:
        got = str(error)
    raise DataError(f"{path} is not the status of a run", got=got, do="see the log of the run")


class StatusFile:
    """Writes the status of a run; the last word is the first that ends it. Calls may come from any thread.

    Writes nothing before `begin`: a run that is refused leaves its folder as it is.

    Args:
        folder: The run folder.
        steps: Optimizer steps of the whole run.
    """

    def __init__(self, folder: Path, *, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._step = 0
        self._world_size = 1
        self._has_begun = self._has_ended = self._has_written = False
        self._written_at = 0.0
        self._lock = threading.RLock()

    def begin(self, step: int, *, world_size: int, write: bool) -> None:
        """The folder is this run's. `write`: this rank writes while the run goes well; every rank may write its end."""
        self._step, self._world_size, self._has_begun = step, world_size, True
        if write:
            self._write("running", None)

    def at(self, step: int, *, write: bool) -> None:
        """Gives a sign of life, if the last one is older than `EVERY_S`."""
        self._step = step
        if write and time.monotonic() - self._written_at >= EVERY_S:
            self._write("running", None)

    def end(self, state: State, reason: str | None) -> None:
        """The run is over; the reason is None if it is finished."""
        with self._lock:
            if not self._has_ended:
                self._write(state, reason)
                self._has_ended = True

    def _write(self, state: State, reason: str | None) -> None:
        with self._lock:
            if not self._has_begun or self._has_ended:
                return
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            status = Status(
                state=state,
                step=self._step,
                steps=self.steps,
                time=now,
                reason=reason,
                host=socket.gethostname(),
                world_size=self._world_size,
            )
            text = json.dumps(status.model_dump(), indent=1) + "\n"
            try:
                # A run may fail before it has its folder; one that was removed is not made again.
                if not self._has_written:
                    self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / STATUS_NAME, text)
                self._has_written = True
                self._written_at = time.monotonic()
            except OSError as error:
                logger.error("%s cannot be written (%s); it would say: %s, %s", STATUS_NAME, error, state, reason)


def _write(path: Path, text: str) -> None:
    """Replaces the file whole or, where the disk has no room for a second one, in its place: a block is its own."""
    try:
        write_text(path, text)
    except OSError:
        if not path.is_file():
            raise
        with path.open("r+b") as file:
            file.write(text.encode())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
