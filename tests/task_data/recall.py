"""Recall: of texts that it makes itself; passages of the tiny run's held-out documents."""

from __future__ import annotations

from pathlib import Path


def arguments(folder: Path) -> list[str]:
    """How it is asked; data: none."""
    del folder
    values = {
        "lengths": "[480, 640]",
        "depths": "[0.0, 1.0]",
        "keys": "1",
        "distances": "[40, 64]",
        "passages": "3",
        "passage_tokens": "20",
    }
    return [part for key, value in values.items() for part in (f"--recall.{key}", value)]
