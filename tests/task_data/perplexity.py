"""Perplexity: of the held-out documents that the tiny run has."""

from __future__ import annotations

from pathlib import Path


def arguments(folder: Path) -> list[str]:
    """How it is read; data: none."""
    del folder
    return ["--perplexity.documents", "3", "--perplexity.context_tokens", "32", "--perplexity.scored_tokens", "32"]
