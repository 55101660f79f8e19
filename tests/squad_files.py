"""Files of SQuAD, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ship(number: int) -> dict[str, Any]:
    """A passage with two questions, one of which has no answer."""
    return {
        "context": f"Ship {number} is red.",
        "qas": [
            {"id": f"{number}a", "question": f"Which ship is {number}?", "answers": [{"text": f"Ship {number}"}]},
            {"id": f"{number}b", "question": "Why?", "answers": [], "is_impossible": True},
        ],
    }


def write_squad(path: Path, **articles: list[dict[str, Any]]) -> str:
    """Writes a file of version 2.0.

    Args:
        path: Where.
        **articles: Title to passages.

    Returns:
        The path.
    """
    data = [{"title": title, "paragraphs": passages} for title, passages in articles.items()]
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return str(path)
