"""Every mistake in a configuration, in words, and all of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.schema import Config, DataConfig
from pipeline.errors import ConfigError

Make = Callable[..., Config]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--memory.token=8", "unknown key memory.token; nearest known: memory.tokens"),
        ("--train.lanes=8", "unknown key train.lanes; nearest known: data.lanes"),
        ("--traim.step=8", "unknown key traim.step; nearest known: train.steps"),
        ("--memory.qqqqq=8", "unknown key memory.qqqqq; do: see --help for all keys"),
        ("--memory.tokens=x", "memory.tokens is not valid; got: 'x'; expected: whole number >= 1"),
        ("--memory.tokens=0", "memory.tokens is not valid; got: 0; expected: whole number >= 1"),
        ("--memory.tokens=8.0", "memory.tokens is not valid; got: 8.0; expected: whole number >= 1"),
        ("--memory.tokens=true", "memory.tokens is not valid; got: True; expected: whole number >= 1"),
        ("--memory.enabled=1", "memory.enabled is not valid; got: 1; expected: true or false"),
        ("--memory.scope=rank", "memory.scope is not valid; got: 'rank'; expected: `document` or `lane` or `group`"),
        ("--memory.tokens=1022", "memory.tokens is not a multiple of memory.chunk_size; got: 1022 and 4; "
         "do: set memory.tokens to 1020 or 1024"),
        ("--memory.top_k_tokens=3", "memory.top_k_tokens is not a multiple of memory.chunk_size; got: 3 and 4; "
         "do: set memory.top_k_tokens to 4, or"),
        ("--train.segment_tokens=6", "train.segment_tokens is not a multiple of memory.chunk_size; got: 6 and 4"),
        ("--memory.position=fixed:0", "memory.position is not valid; got: 'fixed:0'; expected: `none`, `true`, `fixed"),
        ("--memory.position=clamp", "memory.position is not valid; got: 'clamp'"),
        ("--sidenet.memory_layers=[]", "sidenet.memory_layers is not valid; got: []; expected: `all`, null, or a list"),
        ("--sidenet.memory_layers=[0]", "sidenet.memory_layers is not valid; got: [0]"),
        ("--sidenet.memory_layers=[2, 2]", "sidenet.memory_layers is not valid; got: [2, 2]"),
        ("--sidenet.memory_layers=3", "sidenet.memory_layers is not valid; got: 3"),
        ("--sidenet.gate_init=.nan", "sidenet.gate_init is not valid; got: nan; expected: number"),
        ("--train.adam_beta2=1", "train.adam_beta2 is not valid; got: 1; expected: number >= 0 and < 1"),
        ("--train.learning_rate=0", "train.learning_rate is not valid; got: 0; expected: number > 0"),
        ("--train.warmup_steps=11", "train.warmup_steps is longer than the run; got: 11; expected: at most"),
        ("--train.stop_after_steps=0", "train.stop_after_steps is not valid; got: 0; expected: whole number >= 1 or"),
        ("--checkpoint.keep=0", "checkpoint.keep is not valid; got: 0; expected: whole number >= 1"),
        ("--run.output_dir=", "run.output_dir is not valid; got: ''; expected: text"),
        ("--train.steps=[", "train.steps on the command line is not valid YAML; got: '['"),
        ("--train.steps", "--train.steps has no value; expected: --train.steps VALUE"),
        ("steps=3", "unexpected argument 'steps=3'; expected: --section.key value"),
    ],
)  # fmt: skip
def test_each_mistake_in_words(make: Make, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make(override)
    assert len(caught.value.problems) == 1


def test_memory_layer_beyond_the_sidenet(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"names a layer .* got: 7; expected: 1 to sidenet.num_layers 6"):
        make("--sidenet.memory_layers=[7, 2]", "--sidenet.num_layers=6")
    assert make("--sidenet.memory_layers=[6]", "--sidenet.num_layers=6").sidenet.memory_layers == (6,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memori:\n  tokens: 4\n", "unknown section memori; expected one of: run, backbone, data, memory"),
        ("segment_tokens: 4\n", "unknown key segment_tokens; nearest known: train.segment_tokens"),
        ("memory.tokens: 4\n", "memory.tokens is not a section; do: write `tokens:` below `memory:`"),
        ("memory: 5\n", "memory is not a section; got: 5; expected: its keys, indented below `memory:`"),
        ("memory:\n  tokens: 8\n  tokens: 16\n", "the file is not valid YAML: key given twice: tokens"),
        ("memory: [\n", "the file is not valid YAML: while parsing"),
    ],
)
def test_mistakes_of_the_file(minimal_path: Path, text: str, message: str) -> None:
    minimal_path.write_text(minimal_path.read_text() + text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(minimal_path)
    assert len(caught.value.problems) == 1


def test_a_required_section_that_is_no_section_is_one_problem(minimal_path: Path) -> None:
    minimal_path.write_text(minimal_path.read_text().replace("data:\n  path: some/data\n  lanes: 4", "data: here"))
    with pytest.raises(ConfigError, match="data is not a section; got: 'here'") as caught:
        load_config(minimal_path)
    assert len(caught.value.problems) == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config.yaml has 1 .*\n.*does not exist; do: check --config"):
        load_config(path)
    with pytest.raises(ConfigError, match="the file cannot be read: Is a directory"):
        load_config(tmp_path)
    path.write_bytes(b"run: \xff")
    with pytest.raises(ConfigError, match="the file is not UTF-8 text: byte 5"):
        load_config(path)
    path.write_text("- run\n")
    with pytest.raises(ConfigError, match="the file is not a mapping; got: list; expected: sections"):
        load_config(path)


def test_an_empty_file_names_every_required_field(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    required = ["run.output_dir", "backbone.path", "data.path", "data.lanes", "train.steps"]
    assert [problem.split()[0] for problem in caught.value.problems] == required
    assert caught.value.problems[3].endswith("expected: whole number >= 1; do: write `lanes: ...` below `data:`")


def test_all_problems_at_once_rules_between_sound_fields_too(minimal_path: Path) -> None:
    minimal_path.write_text(minimal_path.read_text() + "memory:\n  tokens: -4\n  top_k_tokens: 6\n  speed: 1\n")
    with pytest.raises(ConfigError, match=r"minimal.yaml with the command line has 5 problem") as caught:
        load_config(minimal_path, ["--train.schedule=square", "--train.warmup_steps=50"])
    expected = [
        "unknown key memory.speed",
        "memory.tokens is not valid",
        "train.schedule is not valid",
        "memory.top_k_tokens is not a multiple",
        "train.warmup_steps is longer",
    ]
    assert all(problem.startswith(start) for problem, start in zip(caught.value.problems, expected, strict=True))


def test_rules_hold_without_a_file_too(make: Make) -> None:
    values = make().model_dump() | {"data": DataConfig(path="x", lanes=1)}
    values["memory"] |= {"tokens": 10, "top_k_tokens": 10}
    with pytest.raises(ConfigError, match=r"configuration has 2 problem"):
        Config.model_validate(values)
