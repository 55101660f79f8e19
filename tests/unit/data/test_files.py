"""Finding the input files: all of them, each once, and a word for each that cannot be read."""

from __future__ import annotations

import builtins
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.files import find_files
from pipeline.errors import DataError


def write(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def found(folder, *inputs, **settings):
    return [str(path.relative_to(folder)) for path in find_files(inputs or [folder], **settings)]


@pytest.fixture
def forbid(monkeypatch):
    """Has the system refuse to list or open something; root would be let in."""
    forbidden: list[str] = []
    scandir, opened = os.scandir, builtins.open

    def check(path):
        if str(path) in forbidden:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: (check(path), scandir(path))[1])
    monkeypatch.setattr(builtins, "open", lambda path, *words: (check(path), opened(path, *words))[1])
    return lambda path: forbidden.append(str(path))


def test_folders_are_searched_in_a_fixed_order_each_file_once(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", "notes.md", ".hidden.txt", ".git/c.txt", "CAPITALS.TXT"):
        write(tmp_path / name)
    files = ["b.txt", "CAPITALS.TXT", "a/y.jsonl", "a/z.txt"]
    assert found(tmp_path, tmp_path / "b.txt", tmp_path, tmp_path / "a") == files


def test_files_of_other_kinds_are_counted(tmp_path, caplog):
    for name in ("b.txt", "notes.md", "more.md", "README"):
        write(tmp_path / name)
    with caplog.at_level("INFO"):
        find_files([tmp_path])
    assert f"passed over in {tmp_path}, files of other kinds: 2 .md, 1 no suffix" in caplog.text


def test_inputs_that_cannot_be_used_are_errors(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    for given, match in {
        "nowhere": "input does not exist.*nowhere",
        "gone.txt": "is a symbolic link to nothing; got: .*gone.txt",
        "~no-such-user/x": "names a home folder that is not there",
    }.items():
        with pytest.raises(DataError, match=match):
            find_files([given if given.startswith("~") else tmp_path / given])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no readable files.*\.jsonl\.zst"):
        find_files([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"unknown kind.*notes\.md.*expected: \.txt"):
        find_files([write(tmp_path / "notes.md")])


def test_links_to_folders_are_followed_and_loops_found(tmp_path):
    texts, other = tmp_path / "texts", tmp_path / "other"
    write(texts / "a.txt")
    write(texts / "deep" / "b.txt")
    write(other / "c.txt")
    (texts / "0-linked").symlink_to(other)
    (texts / "0-self").symlink_to(texts)
    (texts / "0-deep").symlink_to(texts / "deep")  # before its folder by name, and yet not what the file is called
    (texts / "deep" / "up").symlink_to(texts, target_is_directory=True)
    (other / "back").symlink_to(texts)
    (texts / "again.txt").symlink_to(texts / "a.txt")
    assert found(texts) == ["0-linked/c.txt", "a.txt", "deep/b.txt"]
    through = ["0-linked/back/a.txt", "0-linked/back/deep/b.txt", "0-linked/c.txt"]
    assert found(texts, texts / "0-linked") == through
    assert found(texts, texts, texts / "0-linked") == ["0-linked/c.txt", "a.txt", "deep/b.txt"]


@pytest.mark.parametrize("name", ["deep", "deep/deeper", "deep/b.txt"])
def test_what_cannot_be_read_below_a_folder_is_an_error_or_on_a_list(tmp_path, forbid, caplog, name):
    for file in ("a.txt", "deep/b.txt", "deep/deeper/c.txt"):
        write(tmp_path / file)
    forbid(tmp_path / name)
    words = f"{tmp_path / name} (Permission denied)"
    with pytest.raises(DataError) as error:
        find_files([tmp_path])
    assert f"some inputs cannot be read; got: {words}; do: " in str(error.value)
    assert "--skip-unreadable" in str(error.value)
    left_out: list[str] = []
    there = {"deep": ["a.txt"], "deep/deeper": ["a.txt", "deep/b.txt"], "deep/b.txt": ["a.txt", "deep/deeper/c.txt"]}
    assert found(tmp_path, left_out=left_out) == there[name]
    assert left_out == [words] and f"left out, cannot be read: {words}" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_what_a_user_really_may_not_read(tmp_path):
    for file in ("a.txt", "b.txt", "deep/c.txt", "half/d.txt"):
        write(tmp_path / "texts" / file)
    tmp_path.chmod(0o755)
    (tmp_path / "texts" / "b.txt").chmod(0)
    (tmp_path / "texts" / "deep").chmod(0)
    (tmp_path / "texts" / "half").chmod(0o444)  # its names may be read, what they name may not
    code = "import os, sys; from pipeline.data.files import find_files; os.chdir(sys.argv[1]); os.setuid(65534)\n"
    code += "left_out = []; print(*find_files(['texts'], left_out=left_out)); print(*left_out, sep='\\n')"
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, check=True)
    read, *left_out = done.stdout.splitlines()
    assert read == "texts/a.txt"
    denied = [f"texts/{name} (Permission denied)" for name in ("b.txt", "deep", "half/d.txt")]
    assert sorted(left_out) == denied


def test_an_input_that_cannot_be_read_itself(tmp_path, forbid):
    readable = write(tmp_path / "a.txt")
    for given in (write(tmp_path / "b.txt"), write(tmp_path / "folder" / "c.txt").parent):
        forbid(given)
        with pytest.raises(DataError, match=f"cannot be read; got: {given} .Permission denied"):
            find_files([readable, given])
        assert find_files([readable, given], left_out=[]) == [readable]
        with pytest.raises(DataError, match=f"no input can be read; got: {given}"):
            find_files([given], left_out=[])


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disk").symlink_to(tmp_path / "not-mounted")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "notes.md").symlink_to(tmp_path / "nowhere")  # would not be read in any case
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        listener.bind("socket.txt")
    left_out: list[str] = []
    assert found(tmp_path, left_out=left_out) == ["a.txt"]
    assert {line.removeprefix(f"{tmp_path}/") for line in left_out} == {
        "disk (symbolic link to nothing)",
        "gone.txt (symbolic link to nothing)",
        "loop (Too many levels of symbolic links)",
        "pipe.txt (not a regular file)",
        "socket.txt (not a regular file)",
    }
    with pytest.raises(DataError, match="pipe.txt .not a regular file"):
        find_files([tmp_path / "pipe.txt"])


def test_names_that_are_not_utf8_are_named_readably(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.md")
    with pytest.raises(DataError, match=r"unknown kind; got: .*/caf\\xe9\.md"):
        find_files([write(path)])
