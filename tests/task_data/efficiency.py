"""Efficiency: of a text that it makes itself."""

from __future__ import annotations

from pathlib import Path


def arguments(folder: Path) -> list[str]:
    """How it is asked; data: none."""
    del folder
    return ["--efficiency.lengths", "[32, 96]", "--efficiency.rounds", "2"]
