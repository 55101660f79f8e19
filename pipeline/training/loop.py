"""The training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.data.store import TokenStore
from pipeline.distributed.ranks import gather_objects, on_rank_zero, rank
from pipeline.distributed.signals import Signals
from pipeline.files import write_text
from pipeline.metrics.folder import EVALUATION_NAME, read_evaluation
from pipeline.metrics.record import MetricsWriter
from pipeline.model.longmem import LongMem
from pipeline.training.build import Run
from pipeline.training.recorder import Recorder
from pipeline.training.saving import Saving


class Report(Protocol):
    """What an evaluation returns."""

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def table(self) -> str: ...  # noqa: D102


Evaluate = Callable[[LongMem, Sequence[TokenStore]], Report]


@dataclass(frozen=True)
class Ended:
    """How training ended.

    Attributes:
        step: Optimizer steps done in all.
        state: `finished`, or `preempted`: start it again to go on.
        reason: Why it is not finished, or None.
        asked: What asked it to stop, one of `ASKS`, or None.
    """

    step: int
    state: Literal["finished", "preempted"]
    reason: str | None
    asked: str | None = None


def train(run: Run, *, evaluate: Evaluate | None = None, signals: Signals | None = None) -> Ended:
    """Trains until `train.steps` or `train.stop_after_steps`, or until a signal asks for the end.

    Collective: every rank must call it together.

    Args:
        run: The run.
        evaluate: Evaluates held-out documents; called on every rank together.
        signals: The signals of this process, or None: they do what they did before.

    Returns:
        How it ended, the same on all ranks.

    Raises:
        LongMemError: Training cannot go on, here or on another rank, which is named; the last checkpoint is whole.
    """
    with run.job.ending_together():
        ended = _train(run, evaluate, signals or Signals())
        run.job.end(ended.state, ended.reason)
    return ended


def _train(run: Run, evaluate: Evaluate | None, signals: Signals) -> Ended:
    config, job, step = run.config, run.job, 0
    if run.resume_from is not None:
        job.watch.at("loading the checkpoint")
        step = run.checkpoints.load(run.resume_from, run.owners, or_older=config.run.resume == "auto")
    job.claim(step)
    run.checkpoints.truncate_after(step)
    last = max(step, min(config.train.steps, config.train.stop_after_steps or config.train.steps))
    stop: str | None = None
    with MetricsWriter(run.folder, enabled=rank() == 0) as writer:
        writer.truncate_after(step)
        recorder = Recorder(config, run.model, writer, first_step=step)
        saving = Saving(run)
        signals.begin_steps()
        while step < last and stop is None:
            step += 1
            job.watch.at(f"step {step}")
            result = run.trainer.step(step, observe_ages=recorder.ages_observer(step), asked=lambda: signals.asked)
            job.check_folder()
            recorder.record(step, result, memory_fill=run.trainer.memory_fill)
            run.stores.check_unchanged()
            stop = _stops(result.asked, signals)
            job.watch.at(f"step {step}, saving")
            saving.after_step(step, last=step == last or stop is not None, asked=result.asked is not None)
            job.after_step(step)
            if stop is None and _due(step, config.evaluation.every_steps):
                job.watch.at(f"the evaluation after step {step}")
                _evaluate(run, evaluate, step)
        recorder.close()
    if stop is not None:
        signals.all_done()
        return Ended(step, "preempted", stop, stop)
    if step < config.train.steps:
        return Ended(step, "preempted", "train.stop_after_steps")
    if not _is_evaluated(run, step):
        job.watch.at(f"the evaluation after step {step}")
        _evaluate(run, evaluate, step)
    signals.all_done()
    return Ended(step, "finished", None)


def _stops(asked: str | None, signals: Signals) -> str | None:
    """What ends the run once it is saved, of what was asked for; the same on all ranks."""
    if asked == "SIGUSR1" and not signals.usr1_stops:
        signals.heeded(asked)
        return None
    return asked


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_evaluated(run: Run, step: int) -> bool:
    """Whether the newest evaluation is of this step and of these settings: the same on all ranks."""
    found = read_evaluation(run.folder) if rank() == 0 else {}
    wanted = (step, run.config.evaluation.model_dump())
    return bool(gather_objects((found.get("step"), found.get("settings")) == wanted)[0])


def _evaluate(run: Run, evaluate: Evaluate | None, step: int) -> None:
    """Writes what the evaluation said, as JSON and as a table."""
    if evaluate is None or not run.stores.validation:
        return
    report = evaluate(run.model, run.stores.validation)

    def write() -> None:
        found = {"step": step, "settings": run.config.evaluation.model_dump(), **report.to_dict()}
        write_text(run.folder / f"{EVALUATION_NAME}.json", json.dumps(found, indent=1) + "\n")
        write_text(run.folder / f"{EVALUATION_NAME}.txt", report.table() + "\n")

    on_rank_zero(write)
