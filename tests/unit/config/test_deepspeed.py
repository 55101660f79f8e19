"""The DeepSpeed JSON: our numbers filled in, conflicts refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.deepspeed import backbone_deepspeed, sidenet_deepspeed
from pipeline.config.schema import Config
from pipeline.config.shipped import SHIPPED
from pipeline.errors import ConfigError

Make = Callable[..., Config]


def write(folder: Path, content: Any) -> str:
    """Write a DeepSpeed JSON and give its name."""
    path = folder / "engine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_sidenet_gets_our_numbers(make: Make) -> None:
    config = make("--data.lanes=8", "--train.segments_per_step=3", "--train.gradient_clipping=0.5")
    filled = sidenet_deepspeed(config, world_size=2)
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["train_batch_size"] == 24
    assert filled["gradient_clipping"] == 0.5
    assert filled["zero_optimization"]["stage"] == 2
    assert filled["zero_allow_untested_optimizer"] is True
    assert filled["zero_force_ds_cpu_optimizer"] is False
    assert filled["steps_per_print"] > 1_000_000


def test_backbone_gets_micro_batches_only(make: Make) -> None:
    filled = backbone_deepspeed(make("--data.lanes=8", "--train.segments_per_step=3"), world_size=2)
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 1
    assert filled["train_batch_size"] == 8
    assert filled["zero_optimization"]["stage"] == 3
    assert "gradient_clipping" not in filled


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("fp32", False, False), ("bf16", True, False), ("fp16", False, True)]
)
def test_precision_comes_from_train_precision(make: Make, precision: str, bf16: bool, fp16: bool) -> None:
    config = make(f"--train.precision={precision}")
    for filled in (backbone_deepspeed(config, 1), sidenet_deepspeed(config, 1)):
        assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (bf16, fp16)


def test_what_the_engine_owns_stays(make: Make, tmp_path: Path) -> None:
    content = {"fp16": {"initial_scale_power": 8}, "zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 5}
    filled = sidenet_deepspeed(make("--train.deepspeed", write(tmp_path, content)), 1)
    assert filled["fp16"] == {"initial_scale_power": 8, "enabled": False}
    assert filled["zero_optimization"] == {"reduce_bucket_size": 7, "stage": 2}
    assert filled["steps_per_print"] == 5


def test_a_literal_that_agrees_is_accepted(make: Make, tmp_path: Path) -> None:
    content = {
        "train_batch_size": 4,
        "gradient_clipping": 1,
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }
    assert sidenet_deepspeed(make("--train.deepspeed", write(tmp_path, content)), 2)["train_batch_size"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 7}, "train_batch_size contradicts the configuration; got: 7; "
         "expected: 12 (micro batch 2 x accumulation 3 x 2 ranks); do: remove it or write \"auto\""),
        ({"train_micro_batch_size_per_gpu": 4}, "got: 4; expected: 2 (lanes of a memory group = data.lanes 4 / "
         "(2 ranks / memory.group_size 1))"),
        ({"gradient_accumulation_steps": True}, "got: true; expected: 3 (train.segments_per_step 3 / "
         "memory.group_size 1)"),
        ({"gradient_clipping": 2.0}, "gradient_clipping contradicts the configuration; got: 2.0; expected: 1.0"),
        ({"gradient_clipping": True}, "gradient_clipping contradicts the configuration; got: true; expected: 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled contradicts the configuration; got: true; expected: false "
         "(train.precision is fp32)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage contradicts the configuration; got: 3; "
         "expected: 2"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer contradicts"),
        ({"zero_optimization": True}, "zero_optimization is not a section; got: True; expected: an object"),
        ({"optimizer": {"type": "Adam"}}, "section optimizer: the optimizer is built from train.*; do: remove"),
        ({"scheduler": {}}, "section scheduler: the learning rate follows train.schedule"),
        ({"bfloat16": {}}, 'section bfloat16: precision is train.precision; do: call the section "bf16"'),
        ({"torch_autocast": {}}, "section torch_autocast: precision is train.precision"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size is "auto"'),
        ([1], "the file is not a JSON object; got: list"),
        ("{", "the file is not valid JSON: Expecting property name"),
        ('{"a": ' * 3000 + "1" + "}" * 3000, "the file is not valid JSON: it is nested too deep; do: name one of"),
        ('{"a": ' * 300 + "1" + "}" * 300, "the file is not valid JSON: it is nested too deep; do: name one of"),
        ('{"a": ' + "9" * 5000 + "}", "the file is not valid JSON: Exceeds the limit"),
        ("null", "the file is not a JSON object; got: NoneType; do: name one of ds_configs/*.json"),
        ("", "the file is not valid JSON: Expecting value"),
        ('{"a": 1, "a": 2}', "the file is not valid JSON: key given twice: a"),
    ],
)  # fmt: skip
def test_conflicts_are_refused_with_their_numbers(make: Make, tmp_path: Path, content: Any, message: str) -> None:
    config = make("--train.segments_per_step=3", "--train.deepspeed", write(tmp_path, content))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        sidenet_deepspeed(config, world_size=2)
    assert len(caught.value.problems) == 1
    assert "engine.json (train.deepspeed) has 1 problem" in str(caught.value)


def test_backbone_refuses_another_stage(make: Make, tmp_path: Path) -> None:
    config = make("--backbone.deepspeed", write(tmp_path, {"zero_optimization": {"stage": 2}}))
    with pytest.raises(
        ConfigError, match=r"zero_optimization.stage .* got: 2; expected: 3 \(the backbone's parameters"
    ):
        backbone_deepspeed(config, 1)


def test_all_conflicts_at_once(make: Make, tmp_path: Path) -> None:
    config = make(
        "--train.deepspeed", write(tmp_path, {"train_batch_size": 7, "optimizer": {}, "bf16": {"enabled": True}})
    )
    with pytest.raises(ConfigError, match="has 3 problem"):
        sidenet_deepspeed(config, 1)


def test_a_world_that_does_not_fit_is_refused_here_too(make: Make) -> None:
    for complete in (backbone_deepspeed, sidenet_deepspeed):
        with pytest.raises(ConfigError, match=r"data\.lanes is not a multiple"):
            complete(make(), 3)


def test_paths_start_here_then_among_the_shipped(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "reduce_bucket_size" in sidenet_deepspeed(make(), 1)["zero_optimization"]
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "sidenet_zero2.json").write_text("{}")
    assert sidenet_deepspeed(make(), 1)["zero_optimization"] == {"stage": 2}


def test_a_missing_file_is_named_with_the_places(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = "backbone.deepspeed names a file that does not exist; got: none.json; "
    message += f"looked in: {tmp_path} and {SHIPPED}; do: name one of"
    with pytest.raises(ConfigError, match=re.escape(message)):
        backbone_deepspeed(make("--backbone.deepspeed=none.json"), 1)


def test_what_is_no_file_of_text_is_said(make: Make, tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = {
        str(tmp_path): "the file cannot be read: Is a directory; expected: a JSON file; do: name one of ds_configs",
        str(binary): "the file is not valid JSON: 'utf-8' codec can't decode byte 0xff",
        "/dev/zero": "the file cannot be read: Not a plain file; expected: a JSON file; do: name one of",
        "x" * 3000: "names a file that does not exist; got: " + "x" * 200 + "...; looked in",
        str(binary / "below"): "names a file that does not exist",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            sidenet_deepspeed(make("--train.deepspeed", name), 1)
        with pytest.raises(ConfigError, match=re.escape(words)):
            backbone_deepspeed(make("--backbone.deepspeed", name), 1)
