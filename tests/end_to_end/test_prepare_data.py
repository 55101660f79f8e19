"""The command line of launch/prepare_data.py: exit codes, messages, what is left on disk."""

from __future__ import annotations

import gzip
import json
import os
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
    assert "error: the output cannot be written; got: " in capsys.readouterr().err
    output = str(tmp_path / os.fsdecode(b"caf\xe9"))
    assert main([*inputs, "--output", output]) == 1
    assert "error: the name of the output is not UTF-8" in capsys.readouterr().err


def test_a_summary_that_nobody_reads_is_no_failure(inputs, tmp_path):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, str(SCRIPT), *inputs, "--output", str(tmp_path / "store"), "--workers", "1"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 0 and "Error" not in done.stderr
    assert TokenStore.open(tmp_path / "store").num_documents == 7


@pytest.fixture
def disk(tmp_path):
    """A disk of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk, and not in every container; the words are tested without")
    yield folder
    # Lazily: an error that pytest keeps holds Arrow files open.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("num_lines", "where"), [(600, "written"), (200, "tokenized")])
def test_a_disk_that_is_really_full(inputs, tmp_path, disk, capsys, caplog, workers, num_lines, where):
    """Text of 600 and 200 kB: the first does not fit, of the second the tokens do not."""
    for number in range(2):
        lines = (json.dumps({"text": f"{line:04} " * 100}) + "\n" for line in range(num_lines))
        (tmp_path / "texts" / f"{number}.jsonl").write_text("".join(lines))
    assert main([*inputs, "--output", str(disk / "store"), "--workers", workers]) == 1
    error = capsys.readouterr().err
    assert "error: the disk of the output is full; got: No space left on device: 0." in error
    assert f" MB free in {disk}/.store.preparing-" in error and "Traceback" not in error
    assert ("Tokenizing" in error) == (where == "tokenized")
    assert "the disk of the output may be too small" in caplog.text
    assert list(disk.iterdir()) == []


def test_text_that_cannot_fit_is_refused_before_the_work(inputs, tmp_path, disk, capsys):
    (tmp_path / "texts" / "large.txt").write_text("large " * 50_000)
    assert main([*inputs, "--output", str(disk / "store")]) == 1
    error = capsys.readouterr().err
    assert "error: the disk of the output has too little room; got: 0.5 MB free" in error and "Generating" not in error


def test_what_cannot_be_read_is_an_error_or_listed(inputs, tmp_path, capsys):
    gone = tmp_path / "texts" / "deep" / "gone.txt"
    gone.symlink_to(tmp_path / "nowhere")
    words = [*inputs, "--output", str(tmp_path / "store"), "--workers", "1"]
    assert main(words) == 1
    assert f"error: some inputs cannot be read; got: {gone} (symbolic link to nothing); do: " in capsys.readouterr().err
    assert main([*words, "--skip-unreadable"]) == 0
    assert f"left out, cannot be read: {gone} (symbolic link to nothing)\n" in capsys.readouterr().out


def test_nul_characters_are_an_error_or_counted(inputs, tmp_path, capsys):
    (tmp_path / "texts" / "nul.txt").write_bytes(b"one\0 and two\0")
    words = [*inputs, "--output", str(tmp_path / "store"), "--workers", "2"]
    assert main(words) == 1
    assert "error: an input has NUL characters; got: " in capsys.readouterr().err
    assert main([*words, "--drop-nul"]) == 0
    assert "dropped from train: 2 NUL characters\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "-1 is negative"),
        (["--seed", "x"], "'x' is not a whole number"),
        (["--min-tokens", "9" * 5000], "is not a whole number"),
        (["--workers", "0"], "0 processes; this machine can have 1 to "),
        (["--workers", "100000"], "100000 processes; this machine can have 1 to "),
        (["--output", ""], "the path is empty"),
        (["--validation-documents", "1", "--validation", "x"], "not allowed with"),
    ],
)
def test_bad_words_exit_with_two(inputs, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main([*inputs, "--output", str(tmp_path / "store"), *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_hashes_are_added_to_a_store_of_before(inputs, tmp_path, capsys):
    output = tmp_path / "store"
    assert main([*inputs, "--output", str(output), "--workers", "1"]) == 0
    made = json.loads((output / "store.json").read_text())
    before = json.loads((output / "store.json").read_text())
    del before["splits"]["train"]["files"], before["splits"]["train"]["tokens_sha256"]
    (output / "store.json").write_text(json.dumps(before))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--add-hashes", str(output)])
    assert ended.value.code == 0 and f"hashes of train were added to {output}" in capsys.readouterr().err
    assert json.loads((output / "store.json").read_text()) == made
    with pytest.raises(SystemExit) as ended:
        main(["--add-hashes", str(output)])
    assert ended.value.code == 1 and "error: the token store has hashes already" in capsys.readouterr().err
