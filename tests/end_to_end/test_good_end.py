"""A run that has finished ends well: every process exits with 0, with nothing left that could bring it down."""

from __future__ import annotations

from pathlib import Path

from tests.finishing import finish_runs, finishing_configs
from tests.tiny_run import TinyRun


def test_finished_runs_end_with_0(tiny_run: TinyRun, tmp_path: Path) -> None:
    found = finish_runs(finishing_configs(tiny_run, tmp_path), 3, num_busy=1)
    assert [(run["ranks"], run["codes"], run["state"], run["said"]) for run in found] == [
        (1, [0], "finished", ""),
        (2, [0, 0], "finished", ""),
        (4, [0, 0, 0, 0], "finished", ""),
    ]
