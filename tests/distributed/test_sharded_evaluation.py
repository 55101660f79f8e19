"""An evaluation by memory groups: whatever their size, every token of every document loses what it loses alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import while_training
from eval.held_out import DocumentLosses, PerplexityReport, summarise
from eval.while_training import evaluate
from pipeline.config.schema import Config
from pipeline.data.store import TokenStore
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import world_size
from pipeline.model.longmem import LongMem, build
from pipeline.planning.plan import make_plan
from pipeline.planning.shapes import shape_of
from tests.distributed.sharded_training import CLEAR_CHOICE, banks_made, measured_choices
from tests.ranks import run_ranks
from tests.tiny_config import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model
from tests.unit.eval.test_perplexity import save

TOLERANCE = 1e-5  # float32, of losses up to 12 nats; partial results are added in another order
SEGMENT = 8
DEEP: Mapping[str, Any] = {"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 1.0}
UNIFORM: Mapping[str, Any] = {"layout": "uniform", "fusion": "gate"}
# 3 segments of context and 2 that are scored, which are no multiple of any group's size.
EVALUATION: Mapping[str, Any] = {"documents": 5, "context_tokens": 24, "scored_tokens": 16}


@dataclass(frozen=True)
class Case:
    """What is evaluated.

    Attributes:
        family: Of the backbone.
        memory: Settings that differ.
        sidenet: Settings.
        evaluation: Settings that differ.
        lengths: Tokens of each held-out document.
        token_seed: Of their text.
        left: Tokens of left context.
    """

    family: str = "llama"
    memory: Mapping[str, Any] = field(default_factory=dict)
    sidenet: Mapping[str, Any] = field(default_factory=lambda: DEEP)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (41, 40, 39, 70, 55, 48)  # five are long enough, one of them without a last target
    token_seed: int = 0
    left: int = 0

    def config(self, group_size: int) -> Config:
        """The settings of a run."""
        memory = {"position": "clamp:12", "group_size": group_size, **self.memory}
        return tiny_config(
            backbone={"context_tokens": self.left},
            memory=memory,
            sidenet=self.sidenet,
            train={"segment_tokens": SEGMENT, "segments_per_step": 4},
            evaluation={**EVALUATION, **self.evaluation},
            data={"lanes": 4},
        )


# The seeds are those of texts in which every choice of chunks is clear.
CASES: Mapping[str, Case] = {
    "clamp": Case(token_seed=1),
    "document, true": Case(memory={"scope": "document", "position": "true"}),
    "group": Case(memory={"scope": "group"}, token_seed=1),
    "odd memory": Case(memory={"tokens": 20, "position": "true"}, token_seed=1),
    "memory larger than documents": Case(memory={"tokens": 400}, token_seed=1),
    "alibi": Case("bloom", token_seed=3),
    "paper": Case("gpt2", memory={"position": "none"}, sidenet=UNIFORM),
    "no context": Case(evaluation={"context_tokens": 0, "scored_tokens": 40}, token_seed=3),
    "fewer segments than ranks": Case(evaluation={"context_tokens": 8, "scored_tokens": 16}),
    "whole rounds": Case(
        evaluation={"documents": 3, "context_tokens": 32, "scored_tokens": 32}, lengths=(64, 70, 65), token_seed=1
    ),
    "long context": Case(
        memory={"tokens": 96},
        evaluation={"documents": 3, "context_tokens": 88, "scored_tokens": 24},
        lengths=(112, 120, 130),
        token_seed=3,
    ),
    "many documents": Case(lengths=(41, 42, 43, 44, 45, 46, 47, 48, 49), evaluation={"documents": 9}),
    "context, sink, window": Case(
        memory={"sink": True, "window_tokens": 12, "retrieve_for": "kv_head"}, left=11, token_seed=1
    ),
    "one document": Case(evaluation={"documents": 1}),
    "no memory": Case(memory={"enabled": False}),
}
WORLDS: Mapping[str, tuple[int, int]] = {  # world and group size
    "2": (2, 2),
    "4": (4, 4),
    "two of 2": (4, 2),
    "four alone": (4, 1),
}


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found, on one rank.

    Attributes:
        documents: By number in the store, put together from all ranks.
        report: What `evaluate` said.
        bank_bytes: Of keys, values and chunk keys of the largest bank that this rank made.
        narrowest: As in `sharded_training.Outcome`.
    """

    documents: Mapping[int, DocumentLosses]
    report: PerplexityReport
    bank_bytes: int
    narrowest: float


@contextmanager
def documents_summarised() -> Iterator[list[DocumentLosses]]:
    """Collects the documents, put together from all ranks, of which a report is made."""
    found: list[DocumentLosses] = []

    def summarising(documents: Sequence[DocumentLosses], **kwargs: Any) -> PerplexityReport:
        found.extend(documents)
        return summarise(documents, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(while_training, "summarise", summarising)
        yield found


def evaluate_all(folder: Path, cases: Mapping[str, Case], group_size: int) -> dict[str, Outcome]:
    """Evaluates one case after another, `group_size` ranks to a memory group."""
    group, found = MemoryGroup.build(group_size, timeout_s=60), {}
    assert group.num_groups * group_size == world_size()
    for name, case in cases.items():
        config = case.config(group_size)
        model = LongMem(config.model, *build(config.model, tiny_model(case.family)))
        store = TokenStore.open(folder / name, "validation")
        with measured_choices() as gaps, banks_made() as sizes, documents_summarised() as documents:
            report = evaluate(model, [store], config, group=group)
        found[name] = Outcome(
            {one.document: one for one in documents}, report, max(sizes, default=0), min(gaps, default=1.0)
        )
        assert len(found[name].documents) == len(documents), "each document counts once"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token stores of all cases, by name."""
    where = tmp_path_factory.mktemp("held out")
    for name, case in CASES.items():
        random = np.random.default_rng(case.token_seed)
        save(where / name, [random.integers(1, VOCABULARY, length).tolist() for length in case.lengths])
    return where


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Outcome]:
    return evaluate_all(folder, CASES, 1)


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[dict[str, Outcome]]]:
    """World -> what each rank found."""
    return {
        name: run_ranks(evaluate_all, world, folder, CASES, size, timeout_s=200)
        for name, (world, size) in WORLDS.items()
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_every_token_loses_what_it_loses_alone(
    alone: dict[str, Outcome], outcomes: dict[str, list[dict[str, Outcome]]], name: str, world: str
) -> None:
    expected = alone[name]
    assert expected.narrowest > CLEAR_CHOICE, "a choice hangs on rounding: take another token_seed"
    for rank in outcomes[world]:
        found = rank[name]
        assert found.documents.keys() == expected.documents.keys()
        for document, wanted in expected.documents.items():
            got = found.documents[document]
            assert got.losses.keys() == wanted.losses.keys()
            np.testing.assert_array_equal(got.counts, wanted.counts)
            for condition, losses in wanted.losses.items():
                assert got.losses[condition].dtype == np.float64
                np.testing.assert_allclose(got.losses[condition], losses, TOLERANCE, TOLERANCE, err_msg=condition)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_reports_the_same(
    alone: dict[str, Outcome], outcomes: dict[str, list[dict[str, Outcome]]], name: str, world: str
) -> None:
    expected, ranks = alone[name].report, [rank[name].report for rank in outcomes[world]]
    assert ranks[1:] == ranks[:-1]
    assert (ranks[0].num_documents, ranks[0].num_tokens) == (expected.num_documents, expected.num_tokens)
    assert ranks[0].conditions.keys() == expected.conditions.keys()
    for condition, result in expected.conditions.items():
        assert ranks[0].conditions[condition].loss_nats == pytest.approx(result.loss_nats, abs=TOLERANCE)


def test_memory_is_read_in_every_case_that_has_one(alone: dict[str, Outcome]) -> None:
    for name, outcome in alone.items():
        for one in outcome.documents.values():
            if name == "no memory":
                assert set(one.losses) == {"backbone", "memory_off", "longest_window"}
                continue
            off, on = one.losses["memory_off"], one.losses["memory_on"]
            assert abs(on - off).max() > 1000 * TOLERANCE, name
            if name != "one document":
                assert abs(on - one.losses["other_memory"]).max() > 1000 * TOLERANCE, name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_its_share_as_planned(
    outcomes: dict[str, list[dict[str, Outcome]]], name: str, world: str
) -> None:
    case, (num_ranks, group_size) = CASES[name], WORLDS[world]
    config = case.config(group_size)
    plan = make_plan(config, shape_of(tiny_model(case.family).config), world_size=num_ranks)
    planned = {part.name: part.num_bytes for part in plan.parts}.get("evaluation's memory", 0)
    held = [rank[name].bank_bytes for rank in outcomes[world]]
    assert max(held) == planned
    assert held[:group_size] == [planned] * group_size, "the first group has the most documents"


@pytest.mark.parametrize(("world", "of_alone"), [("2", 7 / 13), ("4", 4 / 13)])
def test_a_share_shrinks_with_the_group(
    alone: dict[str, Outcome], outcomes: dict[str, list[dict[str, Outcome]]], world: str, of_alone: float
) -> None:
    # 88 + 24 tokens are 14 segments, of which memory holds 12: a share of them, and one that is being read.
    for rank in outcomes[world]:
        assert rank["long context"].bank_bytes == alone["long context"].bank_bytes * of_alone
