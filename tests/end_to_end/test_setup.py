"""launch/setup.sh on tiny packages of our own, without network: whole, repeatable, repaired, one at a time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"torch": "", "tiny_runtime": "", "tiny_backbone": "no_such_package", "tiny_tool": ""}
FAST_S = 1.0


def write_wheel(folder: Path, name: str, requires: str) -> None:
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + (
        f"Requires-Dist: {requires}\n" if requires else ""
    )
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("re po")  # a place with a space in its name
    (root / "launch").mkdir()
    (root / "pipeline").mkdir()
    (root / "pipeline" / "__init__.py").touch()
    shutil.copy(ROOT / "launch" / "setup.sh", root / "launch")
    (root / "requirements.txt").write_text("tiny_runtime\n")
    (root / "requirements-backbone.txt").write_text("tiny_backbone\n")
    (root / "requirements-dev.txt").write_text("tiny_tool\n")
    (root / "requirements-lm-eval.txt").write_text("# nothing\n")
    (root / "constraints.txt").write_text("torch==1.0\n")
    return root


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    wheels = tmp_path_factory.mktemp("wheels")
    for name, requires in PACKAGES.items():
        write_wheel(wheels, name, requires)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return {**kept, **pip}


def setup(repository: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = ["bash", str(repository / "launch" / "setup.sh"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, text=True, cwd="/", **pipes)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def can_import(repository: Path, module: str) -> bool:
    python = repository / ".venv" / "bin" / "python"
    return subprocess.run([python, "-c", f"import {module}"], cwd="/", capture_output=True).returncode == 0


def test_setup_from_nothing_to_repair(repository: Path, environment: dict[str, str]) -> None:
    before = set(repository.iterdir())
    both = [setup(repository, environment) for _ in range(2)]
    outputs = [finish(process) for process in both]
    assert sorted("setup: .venv is ready" in output for output in outputs) == [False, True]
    assert set(repository.iterdir()) - before == {repository / ".venv"}
    assert all(can_import(repository, name) for name in ("torch", "tiny_runtime", "tiny_backbone", "pipeline"))
    assert not can_import(repository, "tiny_tool")

    took: list[float] = []
    while len(took) < 3 and min(took, default=FAST_S) >= FAST_S:  # a machine with other work may delay one
        begin = time.monotonic()
        assert finish(setup(repository, environment)) == ""
        took.append(time.monotonic() - begin)
    assert min(took) < FAST_S

    finish(setup(repository, environment, "--dev"))
    assert can_import(repository, "tiny_tool")
    assert finish(setup(repository, environment)) == ""  # what --dev made serves without it as well

    # A pin that nothing satisfies: the failure is the exit status, and nothing claims to be ready.
    (repository / "constraints.txt").write_text("torch==1.0\ntiny_runtime==2.0\n")
    failed = setup(repository, environment)
    failed.communicate(timeout=120)
    assert failed.returncode != 0
    assert not (repository / ".venv" / "longmem-stamp").exists()

    # An interrupted pip left a package without its record, which pip by itself can neither use nor replace.
    (repository / "constraints.txt").write_text("torch==1.0\n")
    site = next((repository / ".venv" / "lib").glob("python*/site-packages"))
    (site / "torch.py").unlink()
    (site / "torch-1.0.dist-info" / "RECORD").unlink()
    finish(setup(repository, environment))
    assert can_import(repository, "torch") and can_import(repository, "pipeline")


def refusal(repository: Path, environment: dict[str, str], *options: str) -> str:
    process = setup(repository, environment, *options)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    return output


def test_an_unknown_option_is_refused(repository: Path, environment: dict[str, str]) -> None:
    assert re.search("unknown option --devel\n.*expected: --dev, --gpu", refusal(repository, environment, "--devel"))


def test_an_unfit_interpreter_is_refused(repository: Path, environment: dict[str, str], tmp_path: Path) -> None:
    old = tmp_path / "python3.6"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    output = refusal(repository, {**environment, "PYTHON": str(old)})
    assert re.search(r"python3\.6 does not run, or is older than 3\.10\n.*do: give the path of Python 3\.10", output)


def test_a_missing_compiler_is_named(environment: dict[str, str], repository: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    shutil.copytree(repository, fresh, ignore=shutil.ignore_patterns(".venv"))
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "flock", "sed"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(os.path.realpath(found))
    interpreter = os.path.realpath(sys.executable)
    output = refusal(fresh, {**environment, "PATH": str(tools), "PYTHON": interpreter})
    assert re.search("gcc was not found.*\n.*do: install it .*build-essential", output)
    assert not (fresh / ".venv").exists()
