"""The requirement files agree with each other, with the pins, and with every Python that is supported."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "requirements.txt",
    "requirements-gpu.txt",
    "requirements-backbone.txt",
    "requirements-dev.txt",
    "requirements-lm-eval.txt",
]


def read(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(python: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pin in read("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "==", pin
            found[pin.name.lower()] = specifier.version
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", FILES)
def test_every_requirement_has_a_pin_above_its_floor(name: str, python: str) -> None:
    pinned = pins(python)
    for requirement in read(name):
        assert requirement.name.lower() in pinned, requirement
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_the_gpu_file_differs_in_faiss_only() -> None:
    cpu = {str(requirement) for requirement in read("requirements.txt")}
    gpu = {str(requirement).replace("faiss-gpu", "faiss-cpu") for requirement in read("requirements-gpu.txt")}
    assert gpu == cpu
    assert any(requirement.name == "faiss-gpu" for requirement in read("requirements-gpu.txt"))
