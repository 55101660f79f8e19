"""Precedence, parsing of the command line, and the round trip of what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.fields import section_models
from pipeline.config.load import dump_config, load_config, load_from_command_line, parse_command_line
from pipeline.config.schema import Config
from pipeline.config.yaml_text import read_yaml, write_yaml
from pipeline.errors import ConfigError

Make = Callable[..., Config]


def test_defaults_lose_to_the_file_and_the_file_to_the_command_line(tmp_path: Path, minimal_path: Path) -> None:
    path = tmp_path / "with_memory.yaml"
    path.write_text(minimal_path.read_text() + "memory:\n  tokens: 128\n  chunk_size: 8\n")
    assert (load_config(minimal_path).memory.tokens, load_config(minimal_path).memory.chunk_size) == (65536, 4)
    assert (load_config(path).memory.tokens, load_config(path).memory.chunk_size) == (128, 8)
    overridden = load_config(path, ["--memory.tokens", "256"])
    assert (overridden.memory.tokens, overridden.memory.chunk_size) == (256, 8)


def test_the_last_of_two_overrides_counts_in_both_spellings(make: Make) -> None:
    assert make("--train.steps", "20", "--train.steps=30").train.steps == 30


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("--sidenet.gate_init=-1", -1.0),
        ("--sidenet.num_layers=null", None),
        ("--sidenet.memory_layers=all", "all"),
        ("--sidenet.memory_layers=[3, 1]", (1, 3)),
        ("--memory.enabled=false", False),
        ("--train.learning_rate=3e-4", 0.0003),
        ("--train.weight_decay=0", 0.0),
        ("--memory.position=true", "true"),
        ("--memory.position=clamp:512", "clamp:512"),
        ("--run.output_dir=2024", "2024"),
        ("--run.resume=none", "none"),
        ("--run.resume=a=b", "a=b"),
    ],
)
def test_a_value_on_the_command_line_has_the_type_of_its_field(make: Make, override: str, value: object) -> None:
    section, key = override[2:].partition("=")[0].split(".")
    assert getattr(getattr(make(override), section), key) == value


def test_a_mixture_is_given_by_file_or_command_line_and_a_path_is_one_source(make: Make, tmp_path: Path) -> None:
    found = make("--data.path", "null", "--data.sources", "[{path: x/books, weight: 3}, {path: ~/code}]").data
    assert [(source.path, source.weight) for source in found.mixture] == [
        ("x/books", 3.0),
        (str(Path.home() / "code"), 1.0),
    ]
    assert found.shares == {"books": 0.75, "code": 0.25} and found.path is None
    path = tmp_path / "mixture.yaml"
    path.write_text(dump_config(make("--data.path=null", "--data.sources=[{path: x/a}, {path: y/a, weight: 1e-1}]")))
    again = load_config(path)
    assert [source.weight for source in again.data.mixture] == [1.0, 0.1]
    assert list(again.data.shares) == ["1_a", "2_a"]
    whole, decimals = (
        f"[{{path: a, weight: {first}}}, {{path: b, weight: {other}}}]" for first, other in ((3, 1), (0.3, 0.1))
    )
    sources = [make("--data.path=null", f"--data.sources={text}").data for text in (whole, decimals)]
    assert sources[0].shares == sources[1].shares == {"a": 0.75, "b": 0.25}
    one = make("--data.path", "2024").data
    assert [(source.path, source.weight) for source in one.mixture] == [("2024", 1.0)] and one.shares == {"2024": 1.0}


def test_negative_number_as_an_argument_of_its_own(make: Make) -> None:
    assert make("--sidenet.gate_init", "-2.5").sidenet.gate_init == -2.5


@pytest.mark.parametrize("written", ["true", "'true'"])
def test_position_true_needs_no_quotes_in_yaml(minimal_path: Path, written: str) -> None:
    minimal_path.write_text(minimal_path.read_text() + f"memory:\n  position: {written}\n")
    assert load_config(minimal_path).memory.position == "true"


def test_a_section_without_keys_is_all_defaults(minimal_path: Path) -> None:
    minimal_path.write_text(minimal_path.read_text() + "memory:\n  # tokens: 5\n")
    assert load_config(minimal_path).memory.tokens == 65536


def test_command_line_ignores_what_the_launcher_adds(minimal_path: Path) -> None:
    argv = ["--local_rank=1", "--config", str(minimal_path), "--local_rank", "3", "--data.lanes", "6", "--local-rank=2"]
    line = parse_command_line(argv)
    assert (line.config_path, line.overrides, line.wants_help) == (str(minimal_path), ("--data.lanes", "6"), False)
    assert load_from_command_line(argv).data.lanes == 6
    assert load_from_command_line([f"--config={minimal_path}"]).data.lanes == 4


@pytest.mark.parametrize("argv", [["--help"], ["--config", "nowhere.yaml", "-h"]])
def test_help_prints_every_field_with_default_and_text(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_from_command_line(argv)
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for section, model in section_models().items():
        for key in model.model_fields:
            assert f"--{section}.{key} " in text
    assert (
        "--memory.tokens  (whole number >= 1 and <= 10,000,000,000; default 65536)\n      Tokens remembered per lane"
        in text
    )
    assert "--data.lanes  (whole number >= 1 and <= 1,000,000; required)" in text
    assert "--sidenet.num_layers  (whole number >= 1 and <= 10,000 or null; default null)" in text


@pytest.mark.parametrize("argv", [[], ["--train.steps", "3"], ["--config"]])
def test_config_is_required(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--config FILE is required; do: name one of configs"):
        load_from_command_line(argv)


def test_what_is_written_loads_back_equal(make: Make, tmp_path: Path) -> None:
    config = make(
        "--run.output_dir=2e4", "--memory.position=true", "--sidenet.memory_layers=[2, 1]", "--train.adam_epsilon=1e-8",
        "--backbone.path=null", "--train.learning_rate=0.1234567890123456", "--train.stop_after_steps=3",
    )  # fmt: skip
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path).backbone.path == "null"


@given(
    st.one_of(
        st.floats(allow_nan=False), st.integers(), st.booleans(), st.none(), st.text("0123456789eE+-.:_xonflT~ '#")
    )
)
def test_yaml_keeps_value_and_type(value: object) -> None:
    back = read_yaml(write_yaml({"key": value}))["key"]
    assert back == value
    assert type(back) is type(value)


def test_settings_are_frozen(make: Make) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().memory.tokens = 8


def test_derived_numbers(make: Make) -> None:
    config = make("--memory.top_k_tokens=20", "--memory.tokens=400")
    assert (config.memory.top_k_chunks, config.memory.num_chunks) == (5, 100)


def test_memory_takes_the_precision_of_training_unless_told(make: Make) -> None:
    assert make("--train.precision=bf16").model.memory_dtype == "bf16"
    assert make("--train.precision=bf16", "--memory.dtype=fp32").model.memory_dtype == "fp32"
