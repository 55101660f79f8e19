"""The training loop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

from pipeline.data.store import TokenStore
from pipeline.distributed.ranks import gather, on_rank_zero, rank
from pipeline.distributed.watch import Watch
from pipeline.metrics.atomic import write_text
from pipeline.metrics.record import MetricsWriter
from pipeline.model.longmem import LongMem
from pipeline.training.build import Run
from pipeline.training.recorder import Recorder
from pipeline.training.run_folder import claim
from pipeline.training.saving import Saving
from pipeline.training.summary import EVALUATION_NAME

logger = logging.getLogger(__name__)


class Report(Protocol):
    """What an evaluation returns."""

    def to_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def table(self) -> str: ...  # noqa: D102


Evaluate = Callable[[LongMem, TokenStore], Report]


def train(run: Run, *, evaluate: Evaluate | None = None) -> int:
    """Trains until `train.steps` or `train.stop_after_steps`.

    Collective: every rank must call it together.

    Args:
        run: The run.
        evaluate: Evaluates held-out documents; called on every rank together.

    Returns:
        Optimizer steps done in all.

    Raises:
        LongMemError: Training cannot go on, here or on another rank, which is named; the last checkpoint is whole.
    """
    watch = Watch()
    try:
        return _train(run, evaluate, watch)
    except Exception as error:
        explained = watch.explained(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        watch.stop()


def _train(run: Run, evaluate: Evaluate | None, watch: Watch) -> int:
    config = run.config
    step = 0
    if run.resume_from is not None:
        step = run.checkpoints.load(run.resume_from, run.owners, or_older=config.run.resume == "auto")
    on_rank_zero(lambda: claim(run.folder, config))
    run.checkpoints.truncate_after(step)
    last = max(step, min(config.train.steps, config.train.stop_after_steps or config.train.steps))
    with MetricsWriter(run.folder, enabled=rank() == 0) as writer:
        writer.truncate_after(step)
        recorder = Recorder(config, run.model, writer, first_step=step)
        saving = Saving(run)
        while step < last:
            step += 1
            watch.at(f"step {step}")
            result = run.trainer.step(step, observe_ages=recorder.ages_observer(step))
            recorder.record(step, result, memory_fill=run.trainer.memory_fill)
            saving.after_step(step, last=step == last, asked=False)
            if _due(step, config.evaluation.every_steps):
                _evaluate(run, evaluate, step)
        recorder.close()
    if step == config.train.steps and not _is_evaluated(run, step):
        _evaluate(run, evaluate, step)
    return step


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_evaluated(run: Run, step: int) -> bool:
    """Whether the newest evaluation is of this step and of these settings: the same on all ranks."""
    path = run.folder / f"{EVALUATION_NAME}.json"
    found = json.loads(path.read_text()) if rank() == 0 and path.is_file() else {}
    wanted = (step, run.config.evaluation.model_dump())
    return bool(gather((found.get("step"), found.get("settings")) == wanted)[0])


def _evaluate(run: Run, evaluate: Evaluate | None, step: int) -> None:
    """Writes what the evaluation said, as JSON and as a table."""
    if evaluate is None or run.stores.validation is None:
        return
    report = evaluate(run.model, run.stores.validation)

    def write() -> None:
        found = {"step": step, "settings": run.config.evaluation.model_dump(), **report.to_dict()}
        write_text(run.folder / f"{EVALUATION_NAME}.json", json.dumps(found, indent=1) + "\n")
        write_text(run.folder / f"{EVALUATION_NAME}.txt", report.table() + "\n")

    on_rank_zero(write)
