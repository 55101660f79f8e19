"""Kills ranks of a real training, again and again, and starts it again each time.

A job is two processes that train as ranks do; they are forked from a server that has imported everything, so that a
start costs a second. A kill is SIGKILL of one rank: at one of its file operations below `checkpoints/` (Python's audit
events), at a random moment while a checkpoint is being written, or at a random moment of whatever it does. The other
rank lives on for a random while, as under a launcher that has not noticed yet.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.checkpoint.manifest import MANIFEST, check_names_and_sizes, damaged, read_manifest
from pipeline.config.schema import Config
from pipeline.files import write_text
from pipeline.metrics.record import read_metrics
from tests.ranks import forks, free_port, rank_environment

WORLD_SIZE = 2
LIMIT_S = 60.0  # of one life; a job that needs longer hangs
FINISH_S = 1800.0  # of the last one, which nobody ends
EXACT = ("step", "loss", "grad_norm", "learning_rate", "memory_fill", "gate_mean", "memory_share", "tokens")
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
_MODES = ("operation", "operation", "saving", "moment")


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        mode: `operation`, `saving` or `moment`.
        victim: The rank.
        operation: Number of its file operation below `checkpoints/` at which it dies, for mode `operation`.
        steps: Steps that are recorded before it, for the other modes; -1: it is killed while it starts, or in the first
            save.
        delay_s: Seconds from those steps, or from the start, or, for mode `saving`, from when a checkpoint has begun to
            be written.
        survivor_s: How long the other rank lives on.
    """

    mode: str
    victim: int
    operation: int
    steps: int
    delay_s: float
    survivor_s: float

    @classmethod
    def draw(cls, numbers: random.Random) -> Kill:
        """Draws a kill."""
        mode, victim = numbers.choice(_MODES), numbers.randrange(WORLD_SIZE)
        # Rank 0 makes folders and publishes, so that it touches many more files.
        operation = numbers.randrange(1, 130 if victim == 0 else 40)
        steps = numbers.randrange(-1, 5)
        longest = 1.5 if mode == "moment" and steps < 0 else 0.1
        return cls(mode, victim, operation, steps, numbers.uniform(0, longest), numbers.uniform(0, 0.2))


@dataclass(frozen=True)
class Life:
    """What became of a job that was killed.

    Attributes:
        kill: How it was killed.
        resumed: The step that it went on from; None if it did not come that far.
        done: The last step that it recorded.
        published: The newest checkpoint that was seen before the kill, as a step.
        whole: The newest whole one after it.
        place: What the victim was doing: `saving`, `publishing`, `training`, `starting`.
        touched: The file operation at which it was killed, if that was chosen.
    """

    kill: Kill
    resumed: int | None
    done: int
    published: int
    whole: int
    place: str
    touched: str

    @property
    def lost(self) -> int:
        """Steps of this life that have to be done again."""
        return 0 if self.resumed is None else max(0, self.done - self.whole)


class Job:
    """A training that is killed and started again, in one run folder.

    Args:
        config: Its settings; `run.resume` is `auto`.
        notes: A folder for what the ranks say of themselves.
    """

    def __init__(self, config: Config, notes: Path) -> None:
        self.config, self.notes, self.run = config, notes, Path(config.run.output_dir)
        notes.mkdir(parents=True, exist_ok=True)
        self._context = forks()

    def finish(self) -> None:
        """Lets it train to the end.

        Raises:
            AssertionError: It failed, or did not end in time.
        """
        ranks = self._start(None)
        _wait(ranks, FINISH_S)
        codes = [process.exitcode for process in ranks]
        _end(ranks)
        assert codes == [0] * WORLD_SIZE, f"exit codes {codes}\n{self._said()}"

    def live_and_die(self, kill: Kill) -> Life | None:
        """Starts it and kills it.

        Args:
            kill: When and whom.

        Returns:
            What became of it; None if it had ended before the kill.

        Raises:
            AssertionError: It failed by itself or hangs, or a checkpoint is there that is not whole.
        """
        before = self._unfinished()
        ranks = self._start(kill)
        victim = ranks[kill.victim]
        try:
            published = self._await_moment(kill, victim, before)
            if kill.mode == "operation":
                victim.join(LIMIT_S)
            elif victim.exitcode is None:
                os.kill(victim.pid or 0, signal.SIGKILL)
                victim.join(LIMIT_S)
            if victim.exitcode == 0:
                _wait(ranks, LIMIT_S)
                return None
            assert victim.exitcode == -signal.SIGKILL, f"exit code {victim.exitcode}\n{self._said()}"
            time.sleep(kill.survivor_s)
        finally:
            _end(ranks)
        steps = whole_checkpoints(self.run / "checkpoints")
        touched = self.notes / "touched"
        return Life(
            kill,
            resumed=self._resumed(),
            done=self._recorded(),
            published=published,
            whole=max(steps, default=0),
            place=self._place(steps, before),
            touched=touched.read_text().replace(str(self.run), "") if touched.is_file() else "",
        )

    def _start(self, kill: Kill | None) -> list[BaseProcess]:
        for note in self.notes.iterdir():
            note.unlink()
        port = free_port()
        ranks: list[BaseProcess] = []
        for rank in range(WORLD_SIZE):
            at = kill.operation if kill is not None and kill.mode == "operation" and kill.victim == rank else None
            limit_s = FINISH_S if kill is None else LIMIT_S
            arguments = (rank, port, self.config, str(self.notes), at, limit_s)
            ranks.append(self._context.Process(target=_train, args=arguments))
            ranks[-1].start()
        return ranks

    def _await_moment(self, kill: Kill, victim: BaseProcess, before: set[tuple[str, int]]) -> int:
        """Waits for the moment of the kill; the newest checkpoint seen before it."""
        deadline = time.monotonic() + LIMIT_S
        folder, moment, published = self.run / "checkpoints", None, 0
        while victim.exitcode is None:
            assert time.monotonic() < deadline, f"hangs\n{self._said()}"
            published = max(published, *(int(path.parent.name[5:]) for path in folder.glob(f"step_*/{MANIFEST}")), 0)
            if moment is None and kill.mode != "operation" and self._has_come(kill, before):
                moment = time.monotonic() + kill.delay_s
            if moment is not None and time.monotonic() >= moment:
                break
            time.sleep(0.001)
        return published

    def _has_come(self, kill: Kill, before: set[tuple[str, int]]) -> bool:
        """Whether that has happened from which the moment of the kill is counted."""
        if kill.mode == "moment" and kill.steps < 0:
            return True
        resumed = self._resumed()
        if resumed is None or self._recorded() < resumed + kill.steps:
            return False
        return kill.mode == "moment" or bool(self._unfinished() - before)

    def _place(self, steps: list[int], before: set[tuple[str, int]]) -> str:
        if self._resumed() is None:
            return "starting"
        if self._unfinished() - before:
            return "saving"
        latest = self.run / "checkpoints" / "latest"
        behind = bool(steps) and (not latest.is_file() or latest.read_text() != f"step_{max(steps):08d}")
        return "publishing" if behind else "training"

    def _unfinished(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written or removed: name and inode."""
        folder = self.run / "checkpoints"
        found = set()
        for path in (*folder.glob("writing_*"), *folder.glob("removing_*")):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def _resumed(self) -> int | None:
        """The step that the newest life went on from, if it came that far."""
        note = self.notes / "resumed"
        return int(note.read_text()) if note.is_file() else None

    def _recorded(self) -> int:
        return max((int(record["step"]) for record in read_metrics(self.run)), default=0)

    def _said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.notes.glob("log_*")))


def _train(rank: int, port: int, config: Config, notes: str, operation: int | None, limit_s: float) -> None:
    """One rank, as a launcher starts it."""
    os.environ |= rank_environment(rank, WORLD_SIZE, port)
    log = os.open(Path(notes, f"log_{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(0.8 * limit_s)  # says where it hangs
    import torch

    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    torch.set_num_threads(1)
    if operation is not None:
        die_at(operation, str(Path(config.run.output_dir, "checkpoints")), Path(notes, "touched"))
    run = build_run(config)
    if rank == 0:
        begin = run.checkpoints.truncate_after

        def begin_and_note(step: int) -> None:
            begin(step)
            write_text(Path(notes, "resumed"), str(step))

        run.checkpoints.truncate_after = begin_and_note  # type: ignore[method-assign]
    train(run)
    os._exit(0)


def die_at(number: int, folder: str, note: Path) -> None:
    """Has this process kill itself right before one of its file operations at or below a folder.

    Args:
        number: Which of them, from 1.
        folder: The folder.
        note: A file, elsewhere, that says which it was.
    """
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in _OPERATIONS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(folder):
            return
        left -= 1
        if left == 0:
            note.write_text(f"{event} {os.fspath(arguments[0])}")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def whole_checkpoints(folder: Path) -> list[int]:
    """Reads every checkpoint of a run.

    Args:
        folder: `checkpoints/`.

    Returns:
        Their steps.

    Raises:
        CheckpointError: One is not whole.
    """
    steps = []
    for checkpoint in sorted(folder.glob("step_*")):
        files = read_manifest(checkpoint).files
        check_names_and_sizes(checkpoint, files)
        assert damaged(checkpoint, files, sorted(files)) == []
        steps.append(int(checkpoint.name.removeprefix("step_")))
    return steps


def exact_record(run: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the last bit, step by step."""
    return [tuple(record[key] for key in EXACT) for record in read_metrics(run)]


def _wait(ranks: list[BaseProcess], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _end(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        process.kill()
        process.join()
