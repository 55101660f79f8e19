"""Invariant 1: sharding the memory changes nothing. Losses, gradients and retrieved chunks are those of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.distributed.sharded_training import CLEAR_CHOICE, SEGMENT, Case, Outcome, train, train_all, train_and_measure
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # one fixture trains every case on one, two and four ranks, beside other tests
TOLERANCE = 1e-5  # float32; partial results are added in another order
GRADIENT_TOLERANCE = 1e-4  # of a parameter's largest gradient: a sum over tokens of terms that nearly cancel
LATER_TOLERANCE = 5e-4  # the same once weights differ in their last bits
DEEP: Mapping[str, Any] = {"layout": "top", "memory_layers": "all", "fusion": "joint"}
UNIFORM: Mapping[str, Any] = {"layout": "uniform", "fusion": "gate"}
MEMORY: Mapping[str, Any] = {"tokens": 96, "chunk_size": 4, "top_k_tokens": 12, "query_block_tokens": 10}


def deep(family: str = "llama", *, sidenet: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    """A case with the `deep` profile; memory settings by keyword."""
    extra = {
        name: changes.pop(name)
        for name in ("vocabulary", "steps", "lanes", "token_seed", "learning_rate")
        if name in changes
    }
    backbone = {"context_tokens": changes.pop("context_tokens", 0)}
    sections = {"backbone": backbone, "memory": {**MEMORY, **changes}, "sidenet": {**DEEP, **(sidenet or {})}}
    return Case(family, sections, **extra)


WINDOW_ONLY = "window_of_everything"
# The seeds are those of texts in which every choice is clear.
CASES: Mapping[str, Case] = {
    "lane_clamp": deep(position="clamp:40", token_seed=6),
    "document_true": deep(position="true", scope="document", token_seed=1),
    "group_fixed": deep(position="fixed:30", scope="group", token_seed=37),
    "group_true_ties": deep(position="true", scope="group", vocabulary=3, token_seed=17),
    "ties_none": deep(position="none", vocabulary=3, token_seed=23),
    "ties_clamp_checkpointed": deep(
        position="clamp:40", vocabulary=3, token_seed=4, sidenet={"activation_checkpointing": True}
    ),
    "paper": Case("gpt2", {"memory": MEMORY, "sidenet": UNIFORM}, token_seed=2),
    "paper_residual": deep("llama", position="none", sidenet={"fusion": "gate", "residual": "paper", "num_layers": 2}),
    "alibi": deep("bloom", position="clamp:40", token_seed=2),
    "query_norms": deep("qwen3", position="true", token_seed=1),
    "norms_of_all_heads": deep("olmo2", position="true", token_seed=2),
    "one_projection": deep("phi3", position="true", token_seed=7),
    "faiss": deep(position="clamp:40", search="faiss", vocabulary=3, token_seed=4),
    "odd_memory": deep(tokens=44, position="true", chunk_size=2, token_seed=7),
    "memory_of_one_segment": deep(tokens=16, position="clamp:8", token_seed=1),
    "memory_larger_than_text": deep(tokens=4096, position="true", token_seed=15),
    "shared": deep(position="clamp:40", retrieve_for="kv_head"),
    "shared_group_ties": deep(position="none", retrieve_for="kv_head", scope="group", vocabulary=3, token_seed=6),
    "context_sink_window": deep(
        position="clamp:40", context_tokens=10, sink=True, window_tokens=24, retrieve_for="kv_head"
    ),
    "context_sink_window_document": deep(
        position="true",
        context_tokens=20,
        sink=True,
        window_tokens=40,
        scope="document",
        sidenet={"activation_checkpointing": True},
    ),
    "window_group_gate": deep("gpt2", scope="group", window_tokens=8, sidenet={"fusion": "gate"}, token_seed=83),
    "window_alibi": deep("bloom", position="clamp:40", window_tokens=64, sink=True, token_seed=1),
    WINDOW_ONLY: deep(position="none", window_tokens=96, context_tokens=16),
    # Weights stand still, and one layer reads: the same queries to the last bit, however narrow the choice.
    "still": Case("llama", {"memory": MEMORY, "sidenet": UNIFORM}, steps=8, learning_rate=0.0),
    "still_group_ties": Case(
        "llama",
        {"memory": {**MEMORY, "scope": "group"}, "sidenet": UNIFORM},
        steps=8,
        vocabulary=3,
        learning_rate=0.0,
    ),
    "twenty_steps": deep(
        position="clamp:40", steps=20, learning_rate=0.001, token_seed=6, sidenet={"memory_layers": [3]}
    ),
}
# What a group of four does no otherwise than one of two: families, layers, and how long it goes on
# (test_sharded_engines trains twenty steps on four).
OF_TWO = {"query_norms", "norms_of_all_heads", "one_projection", "paper_residual", "still", "twenty_steps"}
SIZES = [(name, size) for size in (2, 4) for name in CASES if size == 2 or name not in OF_TWO]
# Two groups of two ranks, two lanes each; with the seeds of their texts.
PARTED: Mapping[str, int] = {"lane_clamp": 364, "document_true": 3, "ties_none": 249, "alibi": 169, "paper": 7}


@pytest.fixture(scope="module")
def outcomes() -> dict[int, dict[str, list[Outcome]]]:
    """Group size -> case -> outcome of each rank."""
    found = {1: {name: [train_and_measure(case)] for name, case in CASES.items()}}
    for size in (2, 4):
        names = [name for name, of in SIZES if of == size]
        ranks = run_ranks(train_all, size, [CASES[name] for name in names], size, timeout_s=280)
        found[size] = {name: [ran[place] for ran in ranks] for place, name in enumerate(names)}
    return found


def check_equal(expected: Outcome, got: Outcome) -> None:
    """Losses, gradients and retrieved chunks are equal."""
    np.testing.assert_allclose(got.losses, expected.losses, rtol=0, atol=TOLERANCE)
    assert expected.ages.keys() == got.ages.keys()
    for place, ages in expected.ages.items():
        np.testing.assert_array_equal(got.ages[place], ages, err_msg=f"(step, layer) {place}")
    for step, (wanted, found) in enumerate(zip(expected.gradients, got.gradients, strict=True)):
        for name, gradient in wanted.items():
            bound = TOLERANCE + (LATER_TOLERANCE if step else GRADIENT_TOLERANCE) * np.abs(gradient).max()
            np.testing.assert_allclose(found[name], gradient, rtol=0, atol=bound, err_msg=name)


def check_choices(outcome: Outcome) -> None:
    """The case retrieves something, and nothing that another order of summation would not."""
    assert sum(map(len, outcome.ages.values())) > 0, "the case must retrieve something"
    assert outcome.narrowest > CLEAR_CHOICE, "a choice hangs on rounding: take another token_seed"


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_sharding_changes_nothing(outcomes: dict[int, dict[str, list[Outcome]]], name: str, size: int) -> None:
    expected = outcomes[1][name][0]
    if name == WINDOW_ONLY:
        assert not any(map(len, expected.ages.values())), "the window is all that is remembered"
    elif CASES[name].learning_rate > 0:
        check_choices(expected)
    for got in outcomes[size][name]:
        check_equal(expected, got)


def test_two_groups_of_two() -> None:
    cases = [replace(CASES[name], lanes=4, token_seed=seed) for name, seed in PARTED.items()]
    alone = [train_and_measure(case) for case in cases]
    for outcome in alone:
        check_choices(outcome)
    for outcomes in run_ranks(train_all, 4, cases, 2, timeout_s=200):
        for expected, got in zip(alone, outcomes, strict=True):
            check_equal(expected, got)


def test_a_run_on_four_shards_of_16384_tokens_equals_one_on_65536() -> None:
    memory = {**MEMORY, "tokens": 65536, "top_k_tokens": 64, "position": "clamp:512", "query_block_tokens": 256}
    # 18 steps of 4 segments of 1,024 tokens: the memory is full before the last two.
    case = Case("llama", {"memory": memory, "sidenet": UNIFORM}, lanes=1, steps=18, segment=1024)
    alone = train(case, 1)
    for got in run_ranks(train, 4, case, 4, timeout_s=280):
        assert got.bank_tokens == 16384 + 1024
        np.testing.assert_allclose(got.losses, alone.losses, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_share(outcomes: dict[int, dict[str, list[Outcome]]], size: int) -> None:
    remembered = MEMORY["tokens"]
    for outcome in outcomes[size]["lane_clamp"]:
        assert outcome.bank_tokens <= -(-remembered // (size * SEGMENT)) * SEGMENT + SEGMENT
