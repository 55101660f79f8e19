"""What a run folder says about the software that made it, and of the newest held-out evaluation."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.config.untrusted import parse_json, read_small
from pipeline.files import write_text

logger = logging.getLogger(__name__)
EVALUATION_NAME = "evaluation"
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


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The newest evaluation of a run; empty if there is none that can be read, which is logged: it is made anew."""
    path = folder / f"{EVALUATION_NAME}.json"
    try:
        found = parse_json(read_small(path))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged and does not count (%s)", path, error)
        return {}
    return found


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
