"""Preparations that are stopped, killed, or not alone: what is left on disk, of processes, and in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.prepare_data import main
from pipeline.data.store import TokenStore
from tests.held_preparation import ROOT, TIMEOUT_S, all_end, held
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture
def words(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document number {number} " * 30)
    (tmp_path / "out").mkdir()
    inputs = [str(tmp_path / "texts"), "--tokenizer", str(tmp_path / "tokenizer")]
    return [*inputs, "--output", str(tmp_path / "out" / "store"), "--workers", "2"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def temporary():
    """An empty folder; pytest's own have names that are too long for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)],
    ids=["Ctrl-C", "kill", "kill all", "hang-up"],
)
def test_a_signal_ends_workers_and_leaves_nothing(words, out, number, to_all, temporary, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(temporary))
    with held("reading", words, waiting=2) as run:
        workers = run.workers
        assert len(workers) >= 2 and names(out) != []
        (os.killpg if to_all else os.kill)(run.process.pid, number)
        status, output, errors = run.end()
        assert all_end(workers)
    assert status == 128 + number and output == ""
    assert f"stopped by {number.name}: no store was written" in errors and "Traceback" not in errors
    assert names(out) == [] and names(temporary) == []


def test_a_signal_takes_away_the_folders_that_were_made(words, out):
    words[words.index("--output") + 1] = str(out / "new" / "deep" / "store")
    with held("reading", words, waiting=2) as run:
        assert names(out) == ["new"]
        run.process.terminate()
        assert run.end()[0] == 143
    assert names(out) == []


def test_a_signal_while_a_store_is_replaced_comes_too_late(words, out):
    assert main(words) == 0
    with held("exchanging", [*words, "--overwrite"]) as run:
        assert not (out / "store").exists()
        run.process.terminate()
        run.let_go()
        status, output, _ = run.end()
    assert status == 0 and "written to" in output
    assert names(out) == ["store"] and TokenStore.open(out / "store").num_documents == 4


def test_a_signal_before_anything_is_loaded_is_heeded():
    code = "import os, signal, builtins, launch.prepare_data as p; old = builtins.__import__\n"
    code += (
        "def late(name, *rest, **more):\n    if name == 'pipeline.data.prepare': os.kill(os.getpid(), signal.SIGINT)\n"
    )
    code += "    return old(name, *rest, **more)\n"
    code += "builtins.__import__ = late; p.main(['x', '--tokenizer', 'y', '--output', 'z'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 130 and "stopped by SIGINT" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_at_the_very_end_does_not_make_a_failure_of_it(words, out, tmp_path):
    code = "import atexit, os, runpy, signal, sys; sys.path.insert(0, '')\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
    code += "runpy.run_path('launch/prepare_data.py', run_name='__main__')"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr


def test_signals_that_were_ignored_stay_ignored():
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "from pipeline.data.ending import StopSignals\n"
    code += "with StopSignals(): assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr


def test_workers_end_with_a_parent_that_is_killed_and_a_later_start_removes_its_folder(words, out, caplog):
    with held("reading", words, waiting=2) as run:
        workers = run.workers
        run.process.kill()
        run.end()
        assert all_end(workers)
    (left,) = [name for name in names(out) if name.startswith(".store.preparing-")]
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert names(out) == ["store"]
    assert f"{left}, which a preparation that was killed had left" in caplog.text


def test_a_folder_that_no_dead_preparation_named_is_not_removed(words, out, caplog):
    (out / ".store.preparing-12345678").mkdir()
    (out / ".store.preparing-12345678" / "mine").touch()
    (out / "elsewhere").mkdir()
    (out / ".store.preparing.lock").write_text(json.dumps({"work": ".store.preparing-/../elsewhere"}))
    assert main(words) == 0
    assert names(out) == [".store.preparing-12345678", "elsewhere", "store"]
    assert ".store.preparing-12345678 was left by a preparation that was killed; it can be deleted" in caplog.text


def test_a_store_that_was_put_aside_when_its_preparation_was_killed_goes_back(words, out, capsys):
    assert main(words) == 0
    before = (out / "store" / "store.json").stat()
    with held("exchanging", [*words, "--overwrite"]) as run:
        assert not (out / "store").exists()
        run.process.kill()
        run.end()
    assert main(words) == 1
    assert "the output exists already" in capsys.readouterr().err
    assert names(out) == ["store"] and os.path.samestat(before, (out / "store" / "store.json").stat())


@pytest.mark.parametrize("exists", [False, True], ids=["nothing there", "an empty folder there"])
def test_the_second_of_two_at_once_is_refused_at_once(words, out, capsys, exists):
    if exists:
        (out / "store").mkdir()
    with held("reading", words, waiting=2) as run:
        assert main([*words, "--overwrite"]) == 1
        error = capsys.readouterr().err
        assert "another preparation is making this store" in error and f'"pid": {run.process.pid}' in error
        os.symlink(out, out.parent / "other-name")
        other = [*words[:-3], str(out.parent / "other-name" / "store")]
        assert main(other) == 1
        assert "another preparation is making this store" in capsys.readouterr().err
        run.let_go()
        assert run.end()[0] == 0
    assert names(out) == ["store"] and TokenStore.open(out / "store").num_documents == 4
    assert not [name for name in names(out / "store") if name.startswith(".")]


def test_a_folder_that_appears_at_the_output_meanwhile_is_kept(words, out):
    with held("written", [*words, "--overwrite"]) as run:
        (out / "store").mkdir()
        (out / "store" / "mine").write_text("mine")
        run.let_go()
        status, output, errors = run.end()
    assert status == 1 and "written to" not in output
    assert "something else is at the output than when the store was begun" in errors and "Traceback" not in errors
    assert names(out) == ["store"] and names(out / "store") == ["mine"]


@pytest.mark.parametrize("which", [0, -1], ids=["a reader", "the one between them"])
def test_a_worker_that_is_killed_is_an_error_in_words(words, out, which):
    with held("reading", words, waiting=2) as run:
        run.workers[which].kill()
        status, _, errors = run.end()
    assert status == 1 and "a worker process was ended from outside" in errors and "fewer --workers" in errors
    assert "Traceback" not in errors and names(out) == []
