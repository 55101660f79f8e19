"""What a run folder says to a person at the end of a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from pipeline.metrics.record import TENSORBOARD_NAME, read_metrics

EVALUATION_NAME = "evaluation"


def summary(folder: Path) -> str:
    """Sums a run up: the held-out table, speed, and where to look.

    Args:
        folder: The run folder.

    Returns:
        Some lines of text.
    """
    lines = [""]
    table = folder / f"{EVALUATION_NAME}.txt"
    if table.is_file():
        step = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))["step"]
        lines += [table.read_text(encoding="utf-8").rstrip(), "", f"held-out evaluation: after step {step}"]
    records = read_metrics(folder)
    if records:
        speed = statistics.median(record["tokens_per_second"] for record in records)
        lines.append(f"training: {records[-1]['step']} steps, median {speed:,.0f} tokens/s")
    lines.append(f"run folder: {folder}")
    lines.append(f"see it with: .venv/bin/tensorboard --logdir {folder / TENSORBOARD_NAME}")
    return "\n".join(lines)
