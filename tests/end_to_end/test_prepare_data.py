"""The command line of launch/prepare_data.py: exit codes, messages, what is left on disk."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.prepare_data import main
from pipeline.data.store import TokenStore
from tests.tiny_tokenizer import save_tiny_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"


@pytest.fixture()
def inputs(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"document number {number} " * 30)
    lines = "".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(3))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return [str(tmp_path / "texts"), str(tmp_path / "lines.jsonl.gz"), "--tokenizer", str(tmp_path / "tokenizer")]


def test_the_script_makes_a_store_and_prints_a_table(inputs, tmp_path):
    output = tmp_path / "out" / "store"
    words = [sys.executable, str(SCRIPT), *inputs, "--output", str(output), "--validation-documents", "2"]
    done = subprocess.run([*words, "--workers", "2"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Tokenizing train" in done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["train", "5"]
    assert TokenStore.open(output, "validation").num_documents == 2


def test_errors_exit_with_one_and_a_message_without_traceback(inputs, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n\n{"txt": 1}\n')
    assert main([str(bad), *inputs, "--output", str(tmp_path / "store"), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert f"error: a jsonl line has no field 'text'; got: {bad}, line 3, fields ['txt']" in error
    assert "Traceback" not in error
    assert not (tmp_path / "store").exists()


def test_an_output_that_cannot_be_made_is_an_error_in_words(inputs, tmp_path, capsys):
    output = tmp_path / "lines.jsonl.gz" / "store"
    assert main([*inputs, "--output", str(output), "--workers", "1"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "-1 is negative"),
        (["--validation-documents", "1", "--validation", "x"], "not allowed with"),
    ],
)
def test_bad_words_exit_with_two(inputs, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main([*inputs, "--output", str(tmp_path / "store"), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
