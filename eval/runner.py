"""Items dealt to memory groups, scored, and written down one by one, so that a killed evaluation goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.report import SECTION_JSON, SECTION_MARKDOWN, plain
from eval.task import Item, Scores
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import gather_objects, on_rank_zero, rank
from pipeline.errors import LongMemError
from pipeline.files import write_text

ABOUT = "about.json"


class EvaluationError(LongMemError):
    """An evaluation cannot be made, or cannot go on in this folder."""


class Progress:
    """A progress bar of items, which also says how many tokens were read.

    Args:
        label: What is done; None: there is no bar.
    """

    def __init__(self, label: str | None) -> None:
        self._tokens, self._bar = 0, tqdm(desc=label, unit="item", miniters=0, disable=label is None)

    def begin(self, num_items: int) -> None:
        """So many items are to do."""
        self._bar.reset(num_items)

    def read(self, num_tokens: int) -> None:
        """So many more tokens were read."""
        self._tokens += num_tokens
        self._bar.set_postfix(tokens=f"{self._tokens:,}", refresh=False)
        self._bar.update(0)

    def next(self) -> None:
        """One more item is done."""
        self._bar.update()

    def close(self) -> None:
        """No more items."""
        self._bar.close()


def run(
    items: Sequence[Item],
    score: Callable[[Item], Scores],
    group: MemoryGroup | None = None,
    *,
    finish: Callable[[], None],
    progress: Progress,
    folder: Path | None = None,
) -> dict[str, Scores]:
    """Scores items, each by one memory group.

    Collective: every rank must call it.

    Args:
        items: All items, the same on all ranks.
        score: Scores one; every rank of a group calls it together.
        group: This rank's memory group; None: this rank is alone.
        finish: That of `in_step`: another group may have more items.
        progress: This rank's.
        folder: Where scores are written as they come, and found again; None: nowhere.

    Returns:
        The scores of all items, in their order, on every rank; as JSON brings them back where they were written.
    """
    number, num_groups = (group.number, group.num_groups) if group else (0, 1)
    is_first = group is None or group.rank == 0
    done: dict[str, Scores] = {}
    if folder is not None:
        done = gather_objects(_read(folder) if rank() == 0 else None)[0]
    names = [item.name for item in items]
    assert len(set(names)) == len(names), "items share a name"
    to_do = [item for item in items if item.name not in done][number::num_groups]
    mine: dict[str, Scores] = {}
    progress.begin(len(to_do))
    for item in to_do:
        mine[item.name] = score(item)
        if is_first and folder is not None:
            mine[item.name] = _write(folder / f"group{number}.jsonl", item.name, mine[item.name])
        progress.next()
    finish()
    progress.close()
    for part in gather_objects(mine if is_first else {}):
        done |= part
    return {name: done[name] for name in names}


def check_same(folder: Path, about: Mapping[str, Any]) -> None:
    """Checks that what a folder holds was scored with the same model and settings; says so in a new one.

    Collective: every rank must call it.

    Args:
        folder: Of one task.
        about: What must be the same, plain JSON.

    Raises:
        EvaluationError: It is not, or the folder cannot be written.
    """

    def check() -> None:
        path, wanted = folder / ABOUT, plain(about)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_text(path, json.dumps(wanted, indent=1) + "\n")
                return
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(
                "the folder of an evaluation cannot be used", got=f"{path} ({error})", do="name another --output"
            ) from error
        other = sorted(_differences(found, wanted))
        if other:
            raise EvaluationError(
                "the folder holds an evaluation of another model or with other settings",
                got=f"{folder}: {'; '.join(other[:5])}",
                do="name another --output, or remove the folder",
            )

    on_rank_zero(check)


def reported_before(output: Path, about: Mapping[str, Any]) -> list[str]:
    """Tasks whose report lies in a folder, and was of the same model; how they were asked does not matter."""
    names = []
    for path in output.glob(f"*/{ABOUT}"):
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found.get(key) == value for key, value in plain(about).items() if key != "options")
        if same and all((path.parent / name).exists() for name in (SECTION_JSON, SECTION_MARKDOWN)):
            names.append(path.parent.name)
    return names


def _differences(found: Any, wanted: Any, where: str = "") -> Iterable[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}" if where else str(key))
    elif found != wanted:
        yield f"{where} was {json.dumps(found)[:80]}, now {json.dumps(wanted)[:80]}"


def _read(folder: Path) -> dict[str, Scores]:
    """What was scored before. The last line of a file may be torn: its item is scored again."""
    found: dict[str, Scores] = {}
    for path in sorted(folder.glob("group*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                found[record["name"]] = record["scores"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


def _write(path: Path, name: str, scores: Scores) -> Scores:
    line = json.dumps({"name": name, "scores": plain(scores)})
    with path.open("a+b") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a line that a kill tore
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
    read: Scores = json.loads(line)["scores"]
    return read
