"""What must hold between settings. A rule names the values it needs, to be skipped where one of them is broken."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.untrusted import short


@dataclass(frozen=True)
class Rule:
    """One condition.

    Attributes:
        fields: Dotted names of the settings that it needs.
        problem: Takes their values in that order; gives the problem in words, or None where all is well.
    """

    fields: tuple[str, ...]
    problem: Callable[..., str | None]


def _whole_chunks(name: str) -> Rule:
    def problem(tokens: int, chunk_size: int) -> str | None:
        if tokens % chunk_size == 0:
            return None
        below = tokens // chunk_size * chunk_size
        nearest = f"{below} or {below + chunk_size}" if below else f"{chunk_size}"
        return (
            f"{name} is not a multiple of memory.chunk_size; got: {tokens} and {chunk_size}; "
            f"do: set {name} to {nearest}, or another chunk size"
        )

    return Rule((name, "memory.chunk_size"), problem)


def _warmup(warmup_steps: int, steps: int) -> str | None:
    if warmup_steps <= steps:
        return None
    return f"train.warmup_steps is longer than the run; got: {warmup_steps}; expected: at most train.steps {steps}"


def _memory_layers(memory_layers: object, num_layers: int | None) -> str | None:
    if num_layers is None or not isinstance(memory_layers, (list, tuple)) or max(memory_layers) <= num_layers:
        return None
    return (
        f"sidenet.memory_layers names a layer that the SideNet does not have; got: {max(memory_layers)}; "
        f"expected: 1 to sidenet.num_layers {num_layers}"
    )


def _window(window_tokens: int, tokens: int) -> str | None:
    if window_tokens <= tokens:
        return None
    return (
        f"memory.window_tokens reaches farther back than memory; got: {window_tokens}; "
        f"expected: at most memory.tokens {tokens}"
    )


def _faiss(search: str, retrieve_for: str) -> str | None:
    if search != "faiss" or retrieve_for == "head":
        return None
    return (
        f"memory.search faiss finds chunks for single heads only; got: memory.retrieve_for {retrieve_for}; "
        "do: set memory.search to torch, or memory.retrieve_for to head"
    )


def _path_or_sources(path: str | None, sources: Sequence[Any]) -> str | None:
    if path is None and not sources:
        return "data.path is required and missing, and so is data.sources; expected: one of them; do: write `path: ...`"
    if path is not None and sources:
        return (
            f"data.path and data.sources are both given; got: {short(path)} and {len(sources)} source(s); "
            "expected: one of them; do: leave one out, or add --data.path null or --data.sources []"
        )
    return None


def _different_sources(sources: Sequence[Any]) -> str | None:
    paths = [os.path.realpath(os.path.expanduser(source["path"])) for source in sources]
    twice = next((path for number, path in enumerate(paths) if path in paths[:number]), None)
    return (
        twice and f"data.sources names a folder twice; got: {short(twice)}; do: name it once, with the sum of weights"
    )


RULES = (
    _whole_chunks("memory.tokens"),
    _whole_chunks("memory.top_k_tokens"),
    _whole_chunks("memory.window_tokens"),
    _whole_chunks("train.segment_tokens"),
    Rule(("train.warmup_steps", "train.steps"), _warmup),
    Rule(("sidenet.memory_layers", "sidenet.num_layers"), _memory_layers),
    Rule(("memory.search", "memory.retrieve_for"), _faiss),
    Rule(("memory.window_tokens", "memory.tokens"), _window),
    Rule(("data.path", "data.sources"), _path_or_sources),
    Rule(("data.sources",), _different_sources),
)


def rule_problems(values: Mapping[str, Any]) -> list[str]:
    """A line for each broken rule; a rule with a name that is not among the (valid) values is skipped."""
    usable = [rule for rule in RULES if all(name in values for name in rule.fields)]
    found = [rule.problem(*(values[name] for name in rule.fields)) for rule in usable]
    return [problem for problem in found if problem is not None]
