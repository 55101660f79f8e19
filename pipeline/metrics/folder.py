"""What a run folder says about the software that made it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from pipeline.files import write_text

VERSIONS_NAME = "versions.json"
PACKAGES = (
    "longmem-deepspeed",
    "torch",
    "deepspeed",
    "transformers",
    "numpy",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "tensorboard",
)


def write_versions(folder: Path) -> Path:
    """Writes `versions.json`: Python, packages, git commit. Never the environment."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: version for name in PACKAGES if (version := _version(name)) is not None}
    if (commit := git_commit(Path(__file__).parent)) is not None:
        versions["git_commit"] = commit
    path = folder / VERSIONS_NAME
    write_text(path, json.dumps(versions, indent=2) + "\n")
    return path


def git_commit(folder: Path) -> str | None:
    """The commit's hash, with `-dirty` behind it if tracked files were changed.

    Args:
        folder: A folder of the working tree.

    Returns:
        None without git, and where no file of the folder is tracked: an environment may lie in another working tree.
    """
    tracked = ["ls-files", "--error-unmatch", "."]
    commit = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        _git(folder, tracked)
        return _git(folder, commit)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, words: list[str]) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
