"""The table of many runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from launch.status import main
from pipeline.errors import DataError
from pipeline.training.job.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[3]


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


def lines_of(text):
    return [line.split() for line in text.splitlines()[1:]]


NOW = datetime.now(timezone.utc).isoformat(timespec="seconds")
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "naive time": ({"time": "2026-01-31T12:00:00"}, "time is '2026-01-31T12:00:00' (Value error, a time without its"),
    "odd time": ({"time": "yesterday"}, "time is 'yesterday' (Value error, Invalid isoformat"),
    "a number for the time": ({"time": 1700000000}, "time is 1700000000 (Input should be a valid string)"),
    "a number for the host": ({"host": 5}, "host is 5 (Input should be a valid string)"),
    "no host": ({"host": None}, "host is None ("),
    "a list for the reason": ({"reason": ["x"]}, "reason is ['x'] ("),
    "text for a step": ({"step": "4"}, "step is '4' ("),
    "a yes for a step": ({"step": True}, "step is True ("),
    "less than no step": ({"step": -1}, "step is -1 ("),
    "many steps": ({"steps": 10**400}, "steps is a whole number of about 401 digits ("),
    "half a rank": ({"world_size": 1.5}, "world_size is 1.5 ("),
    "another state": ({"state": "paused"}, "state is 'paused' (Input should be 'running', 'finished', 'preempted' or"),
}
JUNK: dict[str, str | bytes] = {
    "a list": "[]",
    "nothing": "",
    "deep": "[" * 100_000,
    "digits": "1" * 5000,
    "binary": b"\xff\xfe\x00",
    "large": b" " * (17 << 20),
    "null": "null",
    "fields missing": '{"state": "running"}',
}


def test_one_bad_file_harms_only_its_own_line(tmp_path, capsys):
    for number, (name, (changes, _)) in enumerate(WRONG.items()):
        make(tmp_path / f"{number:02d} {name}", **changes)
    for number, (name, content) in enumerate(JUNK.items(), start=len(WRONG)):
        folder = make(tmp_path / f"{number:02d} {name}")
        (folder / "status.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (make(tmp_path / "80 folder") / "status.json").unlink()
    (tmp_path / "80 folder" / "status.json").mkdir()
    (make(tmp_path / "81 pipe") / "status.json").unlink()
    os.mkfifo(tmp_path / "81 pipe" / "status.json")
    (make(tmp_path / "82 nowhere") / "status.json").unlink()
    (tmp_path / "82 nowhere" / "status.json").symlink_to("status.json")
    make(tmp_path / "90 more than this version knows", later={"a": 1})
    make(tmp_path / "91 year one", time="0001-01-01T00:00:00+14:00")
    make(tmp_path / "92 words", reason="a\tb\n\x1b[31mred\u2028", host="h\ni")
    os.mkdir(os.fsencode(tmp_path) + b"/93 \xff")
    make(tmp_path / "93 half a character", host="\ud800")
    make(tmp_path / "99 good")
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(WRONG) + len(JUNK) + 3 + 5
    for line, (_, words) in zip(lines, WRONG.values(), strict=False):
        assert " unknown " in line and "is not the status of a run; got: " + words in line and "do: see the log" in line
    for line in lines[len(WRONG) : len(WRONG) + len(JUNK) + 3]:
        assert " unknown " in line and "is not the status of a run; got: " in line and len(line) < 2000
    assert [" finished " in line for line in lines[-5:]] == [True] * 5
    assert lines[-3].endswith("h i     a b \\x1b[31mred") and lines[-2].endswith("\\ud800")


def test_a_folder_whose_name_is_no_text_is_shown(tmp_path, capsys):
    make(tmp_path / os.fsdecode(b"run \xff"))
    main([str(tmp_path)])
    assert "run \\udcff" in capsys.readouterr().out


def test_a_folder_that_cannot_be_looked_into_is_shown(tmp_path):
    make(tmp_path / "a").chmod(0)
    make(tmp_path / "b")
    tmp_path.chmod(0o755)
    # Root reads everything, and becomes somebody else once all is imported.
    code = "import os, sys; from launch.status import main; os.chdir(sys.argv[1])\n"
    code += "os.setuid(65534) if os.geteuid() == 0 else None; main(['.'])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    (tmp_path / "a").chmod(0o700)
    assert [line[1] for line in lines_of(done.stdout)] == ["unknown", "finished"]


def test_a_name_without_run_does_not_hide_the_others(tmp_path, capsys):
    make(tmp_path / "a")
    with pytest.raises(DataError, match="there is no run; got: /nowhere, .*; expected: a run folder"):
        main(["/nowhere", str(tmp_path / "a"), "x" * 5000])
    assert [line[1] for line in lines_of(capsys.readouterr().out)] == ["finished"]


@pytest.mark.parametrize("arguments", [["launch/status.py", "RUNS"], ["launch/train.py", "--help"]])
def test_nobody_need_read_to_the_end(tmp_path, arguments):
    make(tmp_path / "a")
    root, (reader, writer) = Path(__file__).resolve().parents[3], os.pipe()
    os.close(reader)  # as `| true` does
    command = [sys.executable, *(str(tmp_path) if word == "RUNS" else word for word in arguments)]
    ended = subprocess.run(command, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, [line for line in ended.stderr.splitlines() if "accelerator" not in line]) == (0, [])
