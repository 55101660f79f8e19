"""Complete the DeepSpeed JSON: it holds what the engine owns, our configuration owns the numbers filled in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.shipped import find_file, looked_in
from pipeline.config.untrusted import parse_json, read_small, short, shown
from pipeline.config.world import check_world
from pipeline.errors import ConfigError

NEVER_PRINT = 1_000_000_000
FOREIGN_SECTIONS = {
    "optimizer": "the optimizer is built from train.*; do: remove the section",
    "scheduler": "the learning rate follows train.schedule; do: remove the section",
    "bfloat16": 'precision is train.precision; do: call the section "bf16"',
    "torch_autocast": "precision is train.precision; do: remove the section",
}


@dataclass(frozen=True)
class Owned:
    """A number of the DeepSpeed JSON that our configuration owns.

    Attributes:
        key: Where it stands, sections divided by a dot.
        value: What it must be.
        reason: Where it comes from, with the numbers.
    """

    key: str
    value: bool | int | float
    reason: str


def backbone_deepspeed(config: Config, world_size: int) -> dict[str, Any]:
    """The JSON that `backbone.deepspeed` names, completed: ZeRO stage 3, no optimizer. Raises ConfigError."""
    owned = [
        *_batch_numbers(config, world_size, accumulation=1, why="the backbone is never trained"),
        *_precision(config),
        Owned("zero_optimization.stage", 3, "the backbone's parameters are split over all ranks"),
    ]
    return _complete(config.backbone.deepspeed, "backbone.deepspeed", owned)


def sidenet_deepspeed(config: Config, world_size: int) -> dict[str, Any]:
    """The JSON that `train.deepspeed` names, completed: ZeRO stage 2, our optimizer. Raises ConfigError."""
    segments, group_size = config.train.segments_per_step, config.memory.group_size
    why = f"train.segments_per_step {segments} / memory.group_size {group_size}"
    owned = [
        *_batch_numbers(config, world_size, accumulation=check_world(config, world_size).accumulation_steps, why=why),
        *_precision(config),
        Owned("zero_optimization.stage", 2, "the SideNet's gradients and optimizer state are split over all ranks"),
        Owned("gradient_clipping", config.train.gradient_clipping, "train.gradient_clipping"),
        Owned("zero_allow_untested_optimizer", True, "the optimizer is our own"),
        Owned("zero_force_ds_cpu_optimizer", False, "the optimizer is our own, with offload too"),
    ]
    return _complete(config.train.deepspeed, "train.deepspeed", owned)


def _batch_numbers(config: Config, world_size: int, *, accumulation: int, why: str) -> list[Owned]:
    group_size, lanes = config.memory.group_size, config.data.lanes
    micro_batch = check_world(config, world_size).lanes_per_group
    groups = f"data.lanes {lanes} / ({world_size} ranks / memory.group_size {group_size})"
    product = f"micro batch {micro_batch} x accumulation {accumulation} x {world_size} ranks"
    return [
        Owned("train_micro_batch_size_per_gpu", micro_batch, f"lanes of a memory group = {groups}"),
        Owned("gradient_accumulation_steps", accumulation, why),
        Owned("train_batch_size", micro_batch * accumulation * world_size, product),
    ]


def _precision(config: Config) -> list[Owned]:
    precision = config.train.precision
    return [Owned(f"{name}.enabled", precision == name, f"train.precision is {precision}") for name in ("bf16", "fp16")]


def _complete(name: str, setting: str, owned: list[Owned]) -> dict[str, Any]:
    path = _find(name, setting)
    given = _read_json(path, setting)
    problems = [f"section {key}: {words}" for key, words in FOREIGN_SECTIONS.items() if key in given]
    filled = deepcopy(given)
    for item in owned:
        problems.extend(_fill(filled, item))
    problems.extend(
        f'{key} is "auto", which is not one of the numbers filled in here; do: write the value'
        for key in _autos(filled)
    )
    if problems:
        raise ConfigError(problems, source=f"{path} ({setting})")
    # DeepSpeed's own progress lines would repeat ours.
    filled.setdefault("steps_per_print", NEVER_PRINT)
    return filled


def _fill(filled: dict[str, Any], item: Owned) -> list[str]:
    *sections, key = item.key.split(".")
    place: Any = filled
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            return [f"{section} is not a section; got: {shown(place)}; expected: an object"]
    literal = place.get(key, "auto")
    place[key] = item.value
    # `true == 1` in Python, and a flag where a number belongs is a mistake.
    if literal == "auto" or (literal == item.value and isinstance(literal, bool) == isinstance(item.value, bool)):
        return []
    return [
        f"{item.key} contradicts the configuration; got: {json.dumps(literal)}; "
        f'expected: {json.dumps(item.value)} ({item.reason}); do: remove it or write "auto"'
    ]


def _autos(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{prefix}.{key}" if prefix else key)
    elif value == "auto":
        yield prefix


def _find(name: str, setting: str) -> Path:
    path = find_file(name)
    if path is None:
        words = f"got: {short(name)}{looked_in(name)}; do: name one of ds_configs/*.json"
        raise ConfigError([f"{setting} names a file that does not exist; {words}"])
    return path


def _read_json(path: Path, setting: str) -> dict[str, Any]:
    source = f"{path} ({setting})"

    def refuse(problem: str) -> ConfigError:
        return ConfigError([f"{problem}; do: name one of ds_configs/*.json, or a file like them"], source=source)

    try:
        value = parse_json(read_small(path), object_pairs_hook=_once)
    except OSError as error:
        raise refuse(f"the file cannot be read: {error.strerror or error}; expected: a JSON file") from None
    except ValueError as error:  # malformed JSON, a key given twice, or bytes that are not UTF-8
        raise refuse(f"the file is not valid JSON: {short(str(error))}") from None
    if not isinstance(value, dict):
        raise refuse(f"the file is not a JSON object; got: {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"key given twice: {', '.join(repeated)}")
    return dict(pairs)
