"""Every mistake in a configuration, in words, and all of them at once."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.load import load_config
from pipeline.config.schema import Config, DataConfig
from pipeline.config.shipped import SHIPPED
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
        *(
            (f"--memory.position={text}", f"memory.position is not valid; got: '{text}'")
            for text in ("None", "fixed:-3", "clamp:", "clamp:1.5", "true:3", "clamp:07")
        ),
        ("--sidenet.memory_layers=[]", "sidenet.memory_layers is not valid; got: []; expected: `all`, null, or a list"),
        ("--sidenet.memory_layers=[0]", "sidenet.memory_layers is not valid; got: [0]"),
        ("--sidenet.memory_layers=[2, 2]", "sidenet.memory_layers is not valid; got: [2, 2]"),
        ("--sidenet.memory_layers=3", "sidenet.memory_layers is not valid; got: 3"),
        ("--sidenet.gate_init=.nan", "sidenet.gate_init is not valid; got: nan; expected: number"),
        ("--train.adam_beta2=1", "train.adam_beta2 is not valid; got: 1; expected: number >= 0 and < 1"),
        ("--train.learning_rate=0", "train.learning_rate is not valid; got: 0; expected: number > 0"),
        ("--train.warmup_steps=11", "train.warmup_steps is longer than the run; got: 11; expected: at most"),
        ("--train.stop_after_steps=0", "train.stop_after_steps is not valid; got: 0; expected: whole number >= 1 and "
         "<= 1,000,000,000 or null"),
        ("--run.output_dir=a\0b", "run.output_dir is not valid; got: 'a\\x00b'; expected: text"),
        (f"--run.output_dir=runs/{'x' * 256}", "run.output_dir is not valid; got: 'runs/xxx"),
        ("--run.output_dir=~nobody-of-this-name/x", "run.output_dir is not valid; got: '~nobody-of-this-name/x'; "
         "expected: text: a path, each part at most 255 bytes; `~` is the home folder"),
        ("--run.output_dir= ", "run.output_dir is not valid; got: ' '; expected: text: a path"),
        ("--run.seed=18446744073709551616", "run.seed is not valid; got: 18446744073709551616; expected: whole number "
         ">= 0 and < 9,223,372,036,854,775,808"),
        (f"--run.seed=0x{'f' * 5000}", "run.seed is not valid; got: a whole number of about 6,021 digits; expected: "),
        (f"--run.seed={'9' * 5000}", "run.seed on the command line is not valid YAML; got: '9999"),
        ("--memory.position=fixed:1" + 30 * "0", "memory.position is not valid; got: 'fixed:1" + 30 * "0" +
         "'; expected: `none`, `true`, `fixed:N` or `clamp:N`, N a whole number of at most 9 digits"),
        ("--run.collective_timeout_s=1" + 18 * "0", "run.collective_timeout_s is not valid; got: 1000000000000000000; "
         "expected: whole number >= 10 and <= 1,000,000"),
        ("--memory.tokens=1000000000000", "memory.tokens is not valid; got: 1000000000000; expected: whole number >= 1 "
         "and <= 10,000,000,000"),
        ("--train.learning_rate=1e300", "train.learning_rate is not valid; got: 1e+300; expected: number > 0 and <= 1"),
        ("--train.learning_rate=1e400", "train.learning_rate is not valid; got: inf; expected: number > 0"),
        ("--train.adam_epsilon=1e-300", "train.adam_epsilon is not valid; got: 1e-300; expected: number >= 1e-30 and"),
        ("--train.steps=1" + 30 * "0", "train.steps is not valid; got: 1000000000000000000000000000000; expected: "),
        ("--data.lanes=100000000000", "data.lanes is not valid; got: 100000000000; expected: whole number >= 1 and <="),
        ("--sidenet.memory_layers=[1, 100000]", "sidenet.memory_layers is not valid; got: [1, 100000]; expected: "),
        ("--sidenet.gate_init=-1e30", "sidenet.gate_init is not valid; got: -1e+30; expected: number >= -10000 and"),
        ("--checkpoint.every_minutes=1e300", "checkpoint.every_minutes is not valid; got: 1e+300; expected: number >="),
        ("--train.steps=" + "[" * 3000, "train.steps on the command line is not valid YAML; got: '[[[["),
        ("--train.steps=" + "[" * 3000 + "]" * 3000, "train.steps on the command line is not valid YAML; got: '[[[["),
        ("--train.steps=2001-99-99", "train.steps on the command line is not valid YAML; got: '2001-99-99'"),
        ("--train.steps=!!bool x", "train.steps on the command line is not valid YAML; got: '!!bool x'"),
        ("--train.steps=&a [*a]", "train.steps is not valid; got: [[[[...]]]]; expected: whole number"),
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
    with pytest.raises(
        ConfigError, match=r"faiss finds chunks for single heads only; got: .*kv_head; do: set memory.search"
    ):
        make("--memory.search=faiss", "--memory.retrieve_for=kv_head")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memori:\n  tokens: 4\n", "unknown section memori; expected one of: run, backbone, data, memory"),
        ("segment_tokens: 4\n", "unknown key segment_tokens; nearest known: train.segment_tokens"),
        ("memory.tokens: 4\n", "memory.tokens is not a section; do: write `tokens:` below `memory:`"),
        ("memory: 5\n", "memory is not a section; got: 5; expected: its keys, indented below `memory:`"),
        ("memory:\n  tokens: 8\n  tokens: 16\n", "the file is not valid YAML: key given twice: tokens"),
        ("memory: [\n", "the file is not valid YAML: while parsing"),
        ("memory: " + "[" * 3000 + "]" * 3000, "the file is not valid YAML: it is nested too deep"),
        ("memory: " + "{a: " * 3000 + "}" * 3000, "the file is not valid YAML: it is nested too deep"),
        ("memory:\n  tokens: " + "9" * 5000, "the file is not valid YAML: a value cannot be read (Exceeds the limit"),
        (f"memory:\n  0x{'f' * 1000}: 1\n", "unknown key memory.a whole number of about 1,205 digits; "),
        ("x" * 1000 + ": 4\n", "unknown key " + "x" * 200 + "...; "),
        ("memory:\n  tokens: 2001-02-30\n", "the file is not valid YAML: a value cannot be read (day is out of range"),
        ("? [a, b]\n: 4\n", "the file is not valid YAML: while constructing a mapping"),
        ("memory: \0\n", "the file is not valid YAML: unacceptable character #x0000"),
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
    with pytest.raises(ConfigError, match=re.escape(f"does not exist; looked in: {Path.cwd()} and {SHIPPED}; do: ")):
        load_config("none.yaml")
    with pytest.raises(ConfigError, match="the file cannot be read: Is a directory"):
        load_config(tmp_path)
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(ConfigError, match="the file cannot be read: it has more than 1,048,576 bytes"):
        load_config(path)
    with pytest.raises(ConfigError, match="the file cannot be read: it has more than 1,048,576 bytes"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="the file cannot be read: File name too long"):
        load_config("x" * 5000)
    with pytest.raises(ConfigError, match="the file cannot be read: Not a directory"):
        load_config(path / "below")
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
    required = ["run.output_dir", "backbone.path", "data.lanes", "train.steps", "data.path"]
    assert [problem.split()[0] for problem in caught.value.problems] == required
    assert "and so is data.sources; expected: one of them; do: write `path: ...`" in caught.value.problems[4]
    assert caught.value.problems[2].endswith(
        "expected: whole number >= 1 and <= 1,000,000; do: write `lanes: ...` below `data:`"
    )


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


def test_what_many_aliases_stand_for_is_not_written_out(minimal_path: Path) -> None:
    text = "memory:\n  tokens: &a0 [x]\n"
    text += "".join(f"  t{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 30))
    text += "  chunk_size: *a29\n"
    minimal_path.write_text(minimal_path.read_text() + text)
    with pytest.raises(ConfigError, match="memory.chunk_size is not valid; got: ") as caught:
        load_config(minimal_path)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_every_seed_in_range_seeds_every_generator(make: Make, seed: int) -> None:
    accepted = make(f"--run.seed={seed}").run.seed
    assert accepted == seed
    random.seed(accepted)
    np.random.seed(accepted % 2**32)
    np.random.default_rng([accepted, 0, 0, 0])
    torch.manual_seed(accepted)


SOURCES = "{path: a, weight: 3}, {path: b}"
A_LIST = "expected: a list of `{path: FOLDER, weight: NUMBER}`, weights >= 1e-06 and <= 1e+06"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("a", f"data.sources is not valid; got: 'a'; {A_LIST}"),
        ("[a]", f"data.sources[0] is not valid; got: 'a'; {A_LIST}"),
        ("[{weight: 2}]", f"data.sources[0][path] is not valid; got: {{'weight': 2}}; {A_LIST}"),
        ("[{path: a}, {path: b, weights: 2}]", f"data.sources[1][weights] is not valid; got: 2; {A_LIST}"),
        *(
            (f"[{{path: a}}, {{path: b, weight: {weight}}}]", f"data.sources[1][weight] is not valid; got: {shown}; ")
            for weight, shown in (
                (0, "0"),
                (-1, "-1"),
                (".inf", "inf"),
                (".nan", "nan"),
                ("'2'", "'2'"),
                ("1e-9", "1e-09"),
            )
        ),
        ("[{path: x/a}, {path: b}, {path: x/../x/a/}]", "data.sources names a folder twice; got: "),
        ("[]", "data.path is required and missing, and so is data.sources; expected: one of them"),
    ],
)
def test_mistakes_of_sources(make: Make, sources: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make("--data.path=null", f"--data.sources={sources}")
    assert len(caught.value.problems) == 1


def test_path_and_sources_are_not_both_given(make: Make) -> None:
    message = "are both given; got: some/data and 2 source(s); expected: one of them; do: leave one out, or add --data."
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(f"--data.sources=[{SOURCES}]")


def test_a_tilde_is_the_home_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = make("--run.output_dir=~/runs/x", "--data.path=~/data", "--backbone.path=owner/model")
    assert (config.run.output_dir, config.data.path) == ("/home/me/runs/x", "/home/me/data")
    assert config.backbone.path == "owner/model"
