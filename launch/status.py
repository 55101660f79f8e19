"""Shows how runs go, a line each: `python launch/status.py RUN...`, each a run folder or a folder of run folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.config.output import readers_may_leave
from pipeline.errors import DataError
from pipeline.training.job.run_lock import is_held
from pipeline.training.job.status import STATUS_NAME, Status, read_status

HEADER = ("run", "state", "step", "last sign", "ranks", "host", "reason")
_MARKS = (STATUS_NAME, "config.yaml")
_CELL = 1000  # characters

Row = tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, reads, prints. Raises DataError: there is no run."""
    parser = argparse.ArgumentParser(
        description="How runs go. 'died': status.json says that it runs, but no job holds its folder. "
        "'last sign' is the age of the last step of a run that goes on (at most 10 s late), or of its end.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder, or a folder of run folders")
    rows: list[Row] = [HEADER]
    problems = []
    for given in parser.parse_args(arguments).runs:
        found = _runs(given)
        rows += [_row(run) for run in found]
        if not found:
            problems.append(given)
    if len(rows) > 1:
        with readers_may_leave():
            _print(rows)
    if problems:
        raise DataError(
            "there is no run",
            got=", ".join(map(str, problems)),
            expected="a run folder, or a folder of them",
            do="give run.output_dir",
        )


def _print(rows: Sequence[Row]) -> None:
    shown = [tuple(_cell(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(HEADER))]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(text: str) -> str:
    """One line of what any terminal can show, whatever stands in a file or is the name of a folder."""
    line = " ".join(text.split())
    line = line if len(line) <= _CELL else line[:_CELL] + "..."
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def _runs(folder: Path) -> list[Path]:
    """The run folders that an argument means."""
    if _is_run(folder):
        return [folder]
    try:
        below = sorted(path for path in folder.iterdir() if os.path.isdir(path))
    except OSError:
        return []
    return [run for run in below if _is_run(run)]


def _is_run(folder: Path) -> bool:
    """Whether a folder holds what a run writes; one that cannot be looked into may, and is shown with what is wrong."""
    for mark in _MARKS:
        try:
            os.lstat(folder / mark)
        except PermissionError:
            return True
        except (OSError, ValueError):
            continue
        return True
    return False


def _row(run: Path) -> Row:
    try:
        status = read_status(run)
    except DataError as error:
        return (str(run), "unknown", "", "", "", "", str(error))
    if status is None:
        return (str(run), "unknown", "", "", "", "", f"no {STATUS_NAME}")
    steps = f"{status.step}/{status.steps}"
    state, reason = _state(run, status)
    return (str(run), state, steps, _age(status.age_s), str(status.world_size), status.host, reason)


def _state(run: Path, status: Status) -> tuple[str, str]:
    """State and reason; a process that was killed could not say so itself."""
    if status.state == "running" and is_held(run) is False:
        return "died", "the process of rank 0 ended without a word; see its log"
    return status.state, status.reason or ""


def _age(seconds: float) -> str:
    """Such as `3 min`: the largest unit of which there are at least two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def program() -> None:
    """The command `longmem-status`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
