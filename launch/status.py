"""Shows how runs go, a line each: `python launch/status.py RUN...`, each a run folder or a folder of run folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.errors import DataError
from pipeline.metrics.status import STATUS_NAME, Status, read_status
from pipeline.training.run_lock import is_held

HEADER = ("run", "state", "step", "last sign", "ranks", "host", "reason")
_MARKS = (STATUS_NAME, "config.yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, reads, prints.

    Args:
        arguments: Command-line words; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description="How runs go. 'died': status.json says that it runs, but no job holds its folder. "
        "'last sign' is the age of the last step of a run that goes on (at most 10 s late), or of its end.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="a run folder, or a folder of run folders")
    rows = [HEADER, *(_row(run) for given in parser.parse_args(arguments).runs for run in _runs(given))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _runs(folder: Path) -> Iterator[Path]:
    """The run folders that an argument means."""
    below = sorted(folder.glob("*/")) if folder.is_dir() else []
    found = [run for run in ([folder] if _is_run(folder) else below) if _is_run(run)]
    if not found:
        raise DataError(
            "there is no run", got=str(folder), expected="a run folder, or a folder of them", do="give run.output_dir"
        )
    yield from found


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _row(run: Path) -> tuple[str, ...]:
    try:
        status = read_status(run)
    except DataError as error:
        return (str(run), "unknown", "", "", "", "", " ".join(str(error).split()))
    if status is None:
        return (str(run), "unknown", "", "", "", "", f"no {STATUS_NAME}")
    steps = f"{status.step}/{status.steps}"
    state, reason = _state(run, status)
    return (str(run), state, steps, _age(status.age_s), str(status.world_size), status.host, " ".join(reason.split()))


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


if __name__ == "__main__":
    with explained():
        main()
