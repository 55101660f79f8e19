"""What a run folder says to a person at the end of a run."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from pipeline.config.untrusted import short
from pipeline.metrics.folder import EVALUATION_NAME, read_evaluation
from pipeline.metrics.record import TENSORBOARD_NAME, read_metrics


def summary(folder: Path) -> str:
    """The held-out table, speed, and where to look, in some lines of text."""
    lines = [""]
    table, step = folder / f"{EVALUATION_NAME}.txt", read_evaluation(folder).get("step")
    if table.is_file() and step is not None:
        text = table.read_text(encoding="utf-8", errors="replace")
        lines += [text.rstrip(), "", f"held-out evaluation: after step {short(step)}"]
    records = [record for record in read_metrics(folder) if isinstance(record.get("tokens_per_second"), int | float)]
    if records:
        speed = statistics.median(record["tokens_per_second"] for record in records)
        lines.append(f"training: {records[-1]['step']} steps, median {speed:,.0f} tokens/s")
    lines.append(f"run folder: {folder}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    lines.append(f"see it with: {tensorboard} --logdir {folder / TENSORBOARD_NAME}")
    return "\n".join(lines)
