"""ChapterBreak: two works of the published format, contexts longer than memory and not even a segment long."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCES = ("The captain spoke of the other ship. ", "She read the old letter again. ", "A road led over the hills. ")


def example(number: int) -> dict[str, object]:
    """A context of about 130 tokens, and three suffixes."""
    endings = [f"Chapter {number + which}. {SENTENCES[which]}" for which in range(3)]
    return {"ctx": SENTENCES[number % 3] * 12, "pos": endings[0], "negs": endings[1:]}


def arguments(folder: Path) -> list[str]:
    """How it is read."""
    path = folder / "chapterbreak.json"
    path.write_text(
        json.dumps({"pg19": {"1": [example(0), example(1)], "2": [example(2)]}, "ao3": {"3": [example(3)]}})
    )
    return [
        *("--data", f"chapterbreak={path}"),
        *("--chapterbreak.contexts", "10,100"),
        *("--chapterbreak.suffix_tokens", "12"),
    ]
