"""SQuAD: four short passages of two questions, one of which has no answer."""

from __future__ import annotations

import json
from pathlib import Path


def arguments(folder: Path) -> list[str]:
    """How it is read."""
    paragraphs = [
        {
            "context": f"Ship {number} is red.",
            "qas": [
                {"id": f"{number}a", "question": "Which ship?", "answers": [{"text": f"Ship {number}"}]},
                {"id": f"{number}b", "question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(4)
    ]
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "Ships", "paragraphs": paragraphs}]}))
    return [
        *("--data", f"squad={path}"),
        *("--squad.passage", "memory"),
        *("--squad.window_demonstrations", "1"),
        *("--squad.memory_demonstrations", "0,1"),
        *("--squad.answer_tokens", "4"),
        *("--squad.limit", "3"),
    ]
