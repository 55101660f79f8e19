"""`docs/new_family.md` says what the code has: fields, the worked example, tests; the README counts families right."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.backbone.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "new_family.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
_WORDS = ("nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen")
NUMBERS = dict(zip(_WORDS, range(9, 16), strict=True))
# A paragraph that begins with a file's name, and the code under it.
BLOCKS = re.findall(r"^`([\w/]+\.\w+)`, (?:[^\n]+\n)+\n```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_example_is_short() -> None:
    written = sum(len(lines_of(code)) for _, code in BLOCKS)
    assert f"for `phi3`: {written} lines" in PAGE
    assert written < 30


@pytest.mark.parametrize(("path", "code"), BLOCKS, ids=[path for path, _ in BLOCKS])
def test_the_example_is_what_the_files_have(path: str, code: str) -> None:
    have = "\n".join(lines_of((ROOT / path).read_text(encoding="utf-8")))
    for piece in code.split("\n\n"):
        assert "\n".join(lines_of(piece)) in have


def test_the_example_is_whole() -> None:
    files = ["pipeline/backbone/families.py", "tests/tiny_models.py", "tests/reference_lm.py", "README.md"]
    assert [path for path, _ in BLOCKS] == files
    for path in files:  # no other line of these files names the family
        said = " ".join(code for of, code in BLOCKS if of == path)
        assert said.lower().count("phi3") == (ROOT / path).read_text(encoding="utf-8").lower().count("phi3")


def test_every_field_is_looked_up() -> None:
    table = PAGE.partition("## 1.")[2].partition("Found without")[0]
    assert not [field.name for field in fields(Family) if f"`{field.name}`" not in table]


def test_the_tests_that_it_names_exist() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 8
    assert not [name for name in named if f"def {name}(" not in code]


def test_the_readme_lists_the_families() -> None:
    table = README.partition("## Supported backbones")[2].partition("\n\nOf rotary")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")][1:]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(FAMILIES)
    counted = re.search(r"over any of (\w+) model families", README)
    assert counted
    assert NUMBERS[counted[1]] == len(FAMILIES)
