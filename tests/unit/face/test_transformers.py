"""transformers' own tests of any model, and our own with the oldest transformers that is supported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

from tests.packages import fetched

ROOT = Path(__file__).parents[3]
NEWEST = transformers.__version__
OLDEST = "5.17.0"
# The newest ones that it takes; all else is in the environment.
BESIDE_THE_OLDEST = ("huggingface_hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9")
PASSED = 55  # of transformers' tests, at least: fewer would be another file
NARROW = (
    "tests/unit/face/test_bad_input.py",
    "tests/unit/face/test_saving.py",
    "tests/unit/face/test_generate.py",
)
SLOW = "no_end or other_rows or another_dtype"


def run(folder: Path, *arguments: str, **environment: str) -> str:
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_what_transformers_tests_of_any_model():
    folder = fetched(
        f"transformers-tests-{NEWEST}",
        ("download", "--no-binary=:all:", "--no-deps", "--dest={}", f"transformers=={NEWEST}"),
        ("install", "--no-deps", "--target={}/packages", "parameterized==0.9.0"),
    )
    tests = folder / f"transformers-{NEWEST}" / "tests"
    if not tests.is_dir():
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, [part for part in archive if "/tests" in part.name], filter="data")
    told = run(
        folder / "packages",
        "--override-ini=addopts=",
        "-rs",
        "tests/unit/face/transformers_common.py",
        LONGMEM_TRANSFORMERS_TESTS=str(tests),
    )
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None and int(passed[1]) >= PASSED, told[-3000:]


def test_the_oldest_transformers():
    wanted = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if "transformers" in line)
    assert f"{wanted.split('>=')[1]}.0" == OLDEST
    what = (f"transformers=={OLDEST}", *BESIDE_THE_OLDEST)
    folder = fetched(f"transformers-{OLDEST}", ("install", "--no-deps", "--target={}", *what))
    found = subprocess.run(
        [sys.executable, "-c", "import transformers; print(transformers.__version__)"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == OLDEST
    assert " passed" in run(folder, *NARROW, "-k", f"not ({SLOW})")
