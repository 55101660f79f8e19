"""A smallest valid configuration, and ways to make one from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import Config

MINIMAL = """\
run:
  output_dir: runs/test
backbone:
  path: some/model
data:
  path: some/data
  lanes: 4
train:
  steps: 10
"""


@pytest.fixture
def minimal_path(tmp_path: Path) -> Path:
    """A file with the required fields only."""
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


@pytest.fixture
def make(minimal_path: Path) -> Callable[..., Config]:
    """Takes overrides, gives the minimal configuration with them."""

    def build(*overrides: str) -> Config:
        return load_config(minimal_path, overrides)

    return build
