"""versions.json tells what ran, and nothing of the environment."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import pytest

from pipeline.files import write_text
from pipeline.metrics.folder import git_commit, write_versions


def test_versions_of_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-print-me")
    path = write_versions(tmp_path)
    versions = json.loads(path.read_text())
    assert path == tmp_path / "versions.json"
    assert versions["python"] == platform.python_version()
    for package in ("torch", "deepspeed", "transformers", "numpy"):
        assert versions[package] == importlib.metadata.version(package)
    assert "do-not-print-me" not in path.read_text()


def test_the_commit_of_a_working_tree(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    git("tag", "v1")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == commit + "-dirty"
    (tmp_path / "environment").mkdir()
    assert git_commit(tmp_path / "environment") is None


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
