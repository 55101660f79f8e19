"""The files of ChapterBreak, and one level flatter ones.

Source: Sun, Thai and Iyyer (2022), https://arxiv.org/abs/2204.10878; the format is that of their repository's README.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

KEYS = ("ctx", "pos", "negs")
FORMAT = '{"pg19": {work: [{"ctx": text, "pos": text, "negs": [text, ...]}, ...]}, "ao3": {...}}, or {work: [...]}'


@dataclass(frozen=True)
class Example:
    """A book so far, and what may follow.

    Attributes:
        subset: `pg19` or `ao3`; of a flatter file its name.
        work: The book.
        number: Its place among those of the work.
        context: The text before a chapter's end.
        suffixes: What may follow; the right one first.
    """

    subset: str
    work: str
    number: int
    context: str
    suffixes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its own among all."""
        return f"{self.subset}/{self.work}/{self.number}"


def read_examples(paths: Sequence[str], subset: str) -> list[Example]:
    """Reads files.

    Args:
        paths: The files.
        subset: Name of the only subset wanted, or `all`.

    Returns:
        The examples: the first one of every work, then the second ones, so that the first few are of many books.

    Raises:
        DataError: A file cannot be read or is of another format, there is no example, or an example is there twice.
    """
    found = [example for path in paths for example in _examples(Path(path).expanduser())]
    subsets = list(dict.fromkeys(example.subset for example in found))
    wanted = [example for example in found if subset in ("all", example.subset)]
    if not wanted:
        raise DataError(
            "there is no example of ChapterBreak in the subset",
            got=f"{subset!r} of {', '.join(paths)}",
            expected=f"one of {', '.join(['all', *subsets])}" if found else "at least one example",
            do="set --chapterbreak.subset" if found else "name another file with --data",
        )
    twice = [name for name, count in Counter(example.name for example in wanted).items() if count > 1]
    if twice:
        raise DataError(
            "two files hold the same example of ChapterBreak",
            got=twice[0],
            do="name the file with the longest contexts only; they are cut with --chapterbreak.contexts",
        )
    return sorted(wanted, key=lambda example: example.number)


def _examples(path: Path) -> Iterator[Example]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "a file of ChapterBreak cannot be read", got=f"{path} ({error})", expected=f"a JSON file: {FORMAT}"
        ) from error
    if not isinstance(whole, dict):
        raise _foreign(path, f"a {type(whole).__name__} at the top")
    is_flat = any(isinstance(works, list) for works in whole.values())
    for subset, works in {path.stem: whole}.items() if is_flat else whole.items():
        above = () if is_flat else (subset,)
        if not isinstance(works, dict):
            raise _foreign(path, f"{_keys(whole)}; {_place(*above)} holds {_keys(works)}")
        for work, examples in works.items():
            if not isinstance(examples, list):
                raise _foreign(path, f"{_keys(whole)}; {_place(*above, work)} holds {_keys(examples)}")
            for number, one in enumerate(examples):
                problem = _problem(one)
                if problem:
                    raise _foreign(path, f"{_place(*above, work, number)} {problem}")
                yield Example(subset, work, number, one["ctx"], (one["pos"], *one["negs"]))


def _problem(one: Any) -> str | None:
    """Why this is no example; None: it is one."""
    if not isinstance(one, Mapping) or not set(KEYS) <= one.keys():
        return f"holds {_keys(one)}"
    if not isinstance(one["negs"], list) or not one["negs"]:
        return "has no list of wrong suffixes under 'negs'"
    if not all(isinstance(text, str) and text.strip() for text in (one["ctx"], one["pos"], *one["negs"])):
        return "has a text that is empty or none"
    return "has its right suffix among the wrong ones" if one["pos"] in one["negs"] else None


def _place(*keys: Any) -> str:
    return "".join(f"[{key!r}]" for key in keys)[:200]


def _keys(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"the keys {', '.join(map(str, found))[:200] or '(none)'}"
    return f"a {type(found).__name__}"


def _foreign(path: Path, got: str) -> DataError:
    return DataError("a file is not one of ChapterBreak", got=f"{path}: {got}", expected=FORMAT, do="name another file")
