"""A checkpoint that cannot be converted for another number of ranks."""

from __future__ import annotations

import pytest

from pipeline.errors import CheckpointError
from pipeline.training.universal import load_universal


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path):
    source = tmp_path / "sidenet"
    (source / "engine").mkdir(parents=True)
    words = "could not be converted for another number of ranks; the checkpoint is untouched; got: .*do: make room"
    with pytest.raises(CheckpointError, match=words):
        load_universal(None, source, "engine", scratch=tmp_path / "scratch")
    assert [path.name for path in tmp_path.iterdir()] == ["sidenet"]
