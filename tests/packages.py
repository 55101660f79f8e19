"""What tests need of the package index besides the environment: fetched once, into .cache/, never committed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache"


def fetched(name: str, *commands: Sequence[str]) -> Path:
    """A folder with what pip has put into it; skips the test where there is no index.

    Args:
        name: Of the folder.
        *commands: Arguments of pip, one after another; `{}` is the folder.
    """
    folder = CACHE / name
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=CACHE))
            for command in commands:
                arguments = [part.format(partial) for part in command]
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries=1", *arguments]
                done = subprocess.run(pip, capture_output=True, text=True, timeout=240)
                if done.returncode:
                    shutil.rmtree(partial)
                    pytest.skip(f"pip fetches no {name} here: {done.stderr.strip().splitlines()[-1:]}")
            partial.rename(folder)
    return folder
