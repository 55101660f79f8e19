"""Everything under launch/ that a user starts has its console command; what the project says of itself agrees."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def has_main(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


STARTED = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if has_main(path))


def test_every_program_has_its_command_and_every_command_its_program() -> None:
    assert {"train", "evaluate"} <= set(STARTED) and "failing" not in STARTED
    expected = {f"longmem-{name.replace('_', '-')}": f"launch.{name}:program" for name in STARTED}
    assert PROJECT["scripts"] == expected, "do: a line a program below [project.scripts], and program() in it"


@pytest.mark.parametrize("name", STARTED)
def test_a_program_started_as_a_file_does_what_its_command_does(name: str) -> None:
    assert callable(import_module(f"launch.{name}").program)
    last = ast.parse((ROOT / "launch" / f"{name}.py").read_text(encoding="utf-8")).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last) == "if __name__ == '__main__':\n    program()"


def test_version_licence_and_citation_agree() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changes.splitlines() if line.startswith("## "))
    assert newest.split()[1] == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert "version" not in citation, "the version stands in pyproject.toml alone"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    assert licence[:4] == ["Apache", "License", "Version", "2.0,"]
