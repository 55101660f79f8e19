"""What a run folder says about the software that made it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from pipeline.files import write_text

VERSIONS_NAME = "versions.json"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "datasets", "faiss-cpu", "faiss-gpu", "tensorboard")


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
    """The commit's hash, with `-dirty` behind it if tracked files were changed; None without git or a working tree."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
