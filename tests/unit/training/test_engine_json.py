"""What DeepSpeed does not accept is said before any weight is loaded."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.training.engines import Engines
from tests.tiny_config import tiny_config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"zero_optimization": {"reduce_bucket_size": -1}}', "reduce_bucket_size Input should be greater than 0"),
        ('{"zero_optimization": {"reduce_bucket_size": "many"}}', "reduce_bucket_size Input should be a valid integer"),
        ('{"zero_optimization": {"bucket": 1}}', "bucket Extra inputs are not permitted"),
    ],
)
def test_a_value_that_deepspeed_does_not_take(tmp_path, content, words):
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(
        ConfigError, match=f"train.deepspeed has .*(?s:.)*DeepSpeed does not accept the file: .*{words}.*do"
    ):
        Engines(tiny_config(train={"deepspeed": str(tmp_path / "engine.json")}))
