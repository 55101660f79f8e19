"""The table of many runs."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from launch.status import main
from pipeline.errors import DataError
from pipeline.training.run_lock import RunLock


def make(folder, *, age_s=0.0, **changes):
    folder.mkdir(parents=True)
    time = (datetime.now(timezone.utc) - timedelta(seconds=age_s)).isoformat(timespec="seconds")
    status = {"state": "finished", "step": 4, "steps": 4, "time": time, "reason": None, "host": "node1"}
    (folder / "status.json").write_text(json.dumps({**status, "world_size": 8, **changes}))
    return folder


def test_every_run_has_its_line(tmp_path, capsys):
    make(tmp_path / "a", age_s=7300)
    make(tmp_path / "b", state="failed", reason="the loss of step 3\nis not finite", step=2, age_s=3 * 86400)
    make(tmp_path / "c", state="running", age_s=200, step=3)  # on a file system without locks
    lock = RunLock(make(tmp_path / "d", state="running", step=1))
    lock.acquire()
    lock.release()  # as after SIGKILL
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.yaml").touch()
    (tmp_path / "no run").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "status.json").write_text("{}")
    other = make(tmp_path / "elsewhere" / "f", state="preempted", reason="SIGTERM", age_s=30)
    main([str(tmp_path), str(other)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines[1:]] == [
        "finished", "failed", "running", "died", "unknown", "unknown", "preempted",
    ]  # fmt: skip
    assert lines[1][2:] == ["4/4", "2", "h", "8", "node1"]
    assert " ".join(lines[2][2:]) == "2/4 3 d 8 node1 the loss of step 3 is not finite"
    assert lines[3][2:] == ["3/4", "3", "min", "8", "node1"]
    assert " ".join(lines[4]).endswith("the process of rank 0 ended without a word; see its log")
    assert " ".join(lines[5]).endswith("no status.json")
    assert "is not the status of a run" in " ".join(lines[6])
    assert lines[7][0] == str(other) and lines[7][-1] == "SIGTERM"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no run; got: .*; expected: a run folder, or a folder of them; do"):
        main([str(tmp_path)])
