"""What is known of the training behind a checkpoint, in figures."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.export import Trained
from pipeline.config.schema import Config
from pipeline.config.untrusted import read_small
from pipeline.errors import DataError
from pipeline.metrics.folder import EVALUATION_NAME, read_evaluation
from pipeline.metrics.record import METRICS_NAME, read_metrics

_LAST_STEPS = 10


@dataclass(frozen=True)
class Figures:
    """A training in figures.

    Attributes:
        step: Optimizer steps done.
        of_steps: That it was to have.
        tokens: Read by then, over all lanes.
        lanes: Rows of the stream.
        segment_tokens: Tokens of a segment.
        segments_per_step: Segments of a lane in a step.
        precision: Of the engines.
        loss_nats: Mean of the last steps, at most 10; None: the run folder does not say.
        held_out: What is scored, and perplexity and loss by condition; None: these weights were not evaluated.
        table: The same for people; empty: there is none.
        why_none: Why there is no held-out figure.
    """

    step: int
    of_steps: int
    tokens: int
    lanes: int
    segment_tokens: int
    segments_per_step: int
    precision: str
    loss_nats: float | None
    held_out: dict[str, Any] | None
    table: str
    why_none: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without what is for people only."""
        found = {name: value for name, value in asdict(self).items() if name not in ("table", "why_none")}
        return {name: value for name, value in found.items() if value is not None}


def figures_of(trained: Trained, config: Config) -> Figures:
    """What checkpoint and run folder say of a training; a run folder that is gone or damaged says nothing.

    Args:
        trained: The checkpoint's weights.
        config: The run's settings.

    Returns:
        The figures.
    """
    run, step, train = trained.checkpoint.absolute().parent.parent, int(trained.about["step"]), config.train
    held_out, table, why_none = _held_out(run, step)
    return Figures(
        step=step,
        of_steps=train.steps,
        tokens=step * config.data.lanes * train.segments_per_step * train.segment_tokens,
        lanes=config.data.lanes,
        segment_tokens=train.segment_tokens,
        segments_per_step=train.segments_per_step,
        precision=train.precision,
        loss_nats=_loss(run, step),
        held_out=held_out,
        table=table,
        why_none=why_none,
    )


def _loss(run: Path, step: int) -> float | None:
    try:
        records = read_metrics(run)
    except (DataError, OSError):
        return None
    losses = [record.get("loss") for record in records if step - _LAST_STEPS < record.get("step", 0) <= step]
    finite = [loss for loss in losses if isinstance(loss, int | float) and math.isfinite(loss)]
    return statistics.fmean(finite) if finite else None


def _held_out(run: Path, step: int) -> tuple[dict[str, Any] | None, str, str]:
    found = read_evaluation(run)
    if not found:
        held_out = f"no {EVALUATION_NAME}.json" + ("" if (run / METRICS_NAME).exists() else f" and no {METRICS_NAME}")
        return None, "", f"the folder of the run holds {held_out}"
    if found.get("step") != step:
        return None, "", f"the run's newest evaluation is that of step {found.get('step')}, of other weights"
    try:
        table = read_small(run / f"{EVALUATION_NAME}.txt").rstrip()
        by_condition: dict[str, Any] = {
            name: {key: condition[key] for key in ("loss_nats", "perplexity")}
            for name, condition in found["conditions"].items()
        }
        known: dict[str, Any] = {name: found[name] for name in ("context_tokens", "num_documents", "num_tokens")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, "", f"{EVALUATION_NAME}.json or {EVALUATION_NAME}.txt of the run is damaged"
    return {**known, "conditions": by_condition}, table, ""
