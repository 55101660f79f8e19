"""In-context learning: two sets of a few short sentences, more of them in memory than it has room for."""

from __future__ import annotations

from pathlib import Path

from tests.labelled_files import write_set


def arguments(folder: Path) -> list[str]:
    """How they are read."""
    sentences = [(f"{'good' if number % 2 else 'bad'} {number}", number % 2) for number in range(16)]
    write_set(folder, "MPQA", sentences[:12], sentences[12:])
    write_set(folder, "Subj", [(f"I see {number}", number % 2) for number in range(12)], sentences[12:])
    return [
        *("--data", f"in_context={folder}"),
        *("--in_context.sets", "MPQA,Subj"),
        *("--in_context.window_demonstrations", "1"),
        *("--in_context.memory_demonstrations", "0,5"),
        *("--in_context.seeds", "1,2"),
    ]
