"""Scores of rows that follow a past: as the plain backbone, as documents read in order, and alike on 1 and 2 ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eval.in_step import in_step
from eval.model_scorer import ModelScorer
from eval.runner import Progress, run
from eval.scorer import BACKBONE, CONDITIONS, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON, How, Row
from eval.task import Item
from pipeline.distributed.groups import MemoryGroup
from pipeline.model.longmem import LongMem, build
from tests.ranks import run_ranks
from tests.tiny_config import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

TOLERANCE = 2e-4  # float32 losses of another number of rows
SEGMENT, LEFT, LONGEST = 8, 5, 40
TEXT = np.random.default_rng(3).integers(1, VOCABULARY, 61)
OTHER = np.random.default_rng(4).integers(1, VOCABULARY, 61)
PAST = 40


def model() -> LongMem:
    config = tiny_config(
        backbone={"context_tokens": LEFT},
        memory={"tokens": 32, "position": "clamp:12", "sink": True, "window_tokens": 12, "group_size": 1},
        sidenet={"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 2.0},
        train={"segment_tokens": SEGMENT},
    )
    return LongMem(config.model, *build(config.model, tiny_model("llama")))


def rows() -> list[Row]:
    """Rows of several lengths, the first of which is the text that follows the past in documents."""
    random = np.random.default_rng(5)
    made = [Row(random.integers(1, VOCABULARY, length), scored) for length, scored in ((6, 2), (9, 8), (2, 1), (7, 3))]
    return [Row(TEXT[PAST : PAST + SEGMENT + 1], SEGMENT), *made]


def scored(scorer: ModelScorer) -> dict[str, list[list[float]]]:
    past = scorer.remember(TEXT[:PAST], OTHER[: PAST + 3])
    found = scorer.losses(past, rows(), scorer.conditions)
    return {name: [one.tolist() for one in losses] for name, losses in found.items()}


def written(scorer: ModelScorer, condition: str, guesses: Any = None) -> list[list[int]]:
    past = scorer.remember(TEXT[:PAST], OTHER[:PAST])
    prompts = [TEXT[PAST : PAST + 3], OTHER[PAST : PAST + 6], OTHER[:1]]
    return scorer.greedy(
        past, prompts, condition, max_tokens=5, is_done=lambda tokens: tokens[-1] % 7 == 0, guesses=guesses
    )


@pytest.fixture(scope="module")
def alone() -> ModelScorer:
    return ModelScorer(model(), longest=LONGEST)


@pytest.fixture(scope="module")
def scores(alone) -> dict[str, list[list[float]]]:
    return scored(alone)


def plain_losses(longmem: LongMem, before: np.ndarray, row: Row) -> np.ndarray:
    """By the causal LM of transformers, which knows nothing of us."""
    whole = torch.from_numpy(np.concatenate([before, row.tokens]))[None]
    with torch.no_grad():
        logits = tiny_model("llama")(whole).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], whole[0, 1:], reduction="none")
    return losses[len(losses) - row.num_scored :].numpy()


@pytest.mark.parametrize("number", range(5))
def test_the_backbone_alone_is_the_plain_model_with_left_context(alone, scores, number):
    expected = plain_losses(alone.model, TEXT[PAST - LEFT : PAST], rows()[number])
    np.testing.assert_allclose(scores[BACKBONE][number], expected, atol=TOLERANCE)


@pytest.mark.parametrize("number", range(5))
def test_the_longest_window_is_the_plain_model_with_all_that_fits(alone, scores, number):
    most = max(len(row.tokens) for row in rows())
    expected = plain_losses(alone.model, TEXT[PAST - (LONGEST - most) : PAST], rows()[number])
    np.testing.assert_allclose(scores[LONGEST_WINDOW][number], expected, atol=TOLERANCE)


# A row's last token is in the longest window, too, which so begins one token later: see the plain model above.
@pytest.mark.parametrize("condition", [name for name in CONDITIONS if name != LONGEST_WINDOW])
def test_a_row_that_goes_on_loses_what_the_document_loses_there(alone, scores, condition):
    """`follow` is held against loops over documents by other tests."""
    texts = [TEXT[: PAST + SEGMENT + 1], OTHER[3 : PAST + SEGMENT + 4]]
    followed = alone.follow(texts, first_scored=PAST, num_tokens=PAST + SEGMENT, hows={condition: How(condition)})
    np.testing.assert_allclose(scores[condition][0], followed[condition][0], atol=TOLERANCE)


def test_conditions_differ_where_they_should(scores):
    first = {name: np.array(scores[name][0]) for name in CONDITIONS}
    for one in CONDITIONS:
        for other in CONDITIONS:
            assert one == other or np.abs(first[one] - first[other]).max() > 10 * TOLERANCE, (one, other)


def test_rows_are_alone_with_their_past(alone, scores):
    past = alone.remember(TEXT[:PAST], OTHER[: PAST + 3])
    for number, row in enumerate(rows()):
        found = alone.losses(past, [row], [MEMORY_OFF, MEMORY_ON])
        for name, losses in found.items():
            np.testing.assert_allclose(losses[0], scores[name][number], atol=TOLERANCE)


@pytest.mark.parametrize("shared", [1, 6])
def test_what_rows_begin_with_alike_is_read_once_and_changes_nothing(alone, shared):
    past = alone.remember(TEXT[:PAST], OTHER[: PAST + 3])
    suffixes = [np.concatenate([[number + 1], row.tokens[1:]]) for number, row in enumerate(rows())]
    alike = [Row(np.concatenate([TEXT[PAST : PAST + shared], suffix]), len(suffix)) for suffix in suffixes]
    ordinary = [name for name in CONDITIONS if name != LONGEST_WINDOW]
    together = alone.losses(past, alike, ordinary)
    for number, row in enumerate(alike):
        unlike = Row((row.tokens + 1) % VOCABULARY, row.num_scored)  # nothing is alike: each row is read whole
        for name, losses in alone.losses(past, [row, unlike], ordinary).items():
            np.testing.assert_allclose(together[name][number], losses[0], atol=TOLERANCE)


def test_what_is_alike_is_read_once_over_all_passes_and_labels(alone):
    num_texts, tail, shared = 4, 2, 6
    texts = [np.concatenate([TEXT[PAST : PAST + shared], [number + 1, 9]]) for number in range(num_texts)]
    rows_of_labels = [Row(np.array([*text, label]), 1) for text in texts for label in (3, 4, 5)]
    read: list[int] = []
    few = ModelScorer(
        model(), longest=LONGEST, tokens_at_once=2 * (LEFT + shared + tail), on_read=lambda count: read.append(count)
    )
    past = few.remember(TEXT[:PAST], OTHER[:PAST])
    for condition in CONDITIONS:
        read.clear()
        (found,) = few.losses(past, rows_of_labels, [condition]).values()
        assert sum(read) == shared + num_texts * tail
        for number, one in enumerate(found):
            unlike = Row((rows_of_labels[number].tokens + 1) % VOCABULARY, 1)
            expected = alone.losses(past, [rows_of_labels[number], unlike], [condition])[condition][0]
            np.testing.assert_allclose(one, expected, atol=TOLERANCE)


def test_many_rows_go_in_several_passes(scores):
    few = ModelScorer(model(), longest=LONGEST, tokens_at_once=2 * (LEFT + 9))
    for name, losses in scored(few).items():
        for one, expected in zip(losses, scores[name], strict=True):
            np.testing.assert_allclose(one, expected, atol=TOLERANCE)


@pytest.mark.parametrize("condition", [BACKBONE, MEMORY_ON, LONGEST_WINDOW])
def test_guesses_change_nothing(alone, condition):
    free = written(alone, condition)
    assert any(len(one) > 1 for one in free)
    wrong_at_once = [[(one[0] + 1) % VOCABULARY, 3, 3] for one in free]
    half_right = [[*one[:2], 0, 0, 0, 0, 0] for one in free]
    tried: list[list[list[int]]] = [free, wrong_at_once, half_right, [one * 3 for one in free], [[], [], []]]
    for guesses in tried:
        assert written(alone, condition, guesses) == free


def test_greedy_writes_the_likeliest_token_of_the_plain_model(alone):
    expected = []
    for prompt in (TEXT[PAST : PAST + 3], OTHER[PAST : PAST + 6], OTHER[:1]):
        text: list[int] = [*TEXT[PAST - LEFT : PAST], *prompt]
        own: list[int] = []
        while len(own) < 5 and not (own and own[-1] % 7 == 0):
            with torch.no_grad():
                own.append(int(tiny_model("llama")(torch.tensor([text + own])).logits[0, -1].argmax()))
        expected.append(own)
    assert written(alone, BACKBONE) == expected


def test_nothing_is_remembered_by_scoring(alone, scores):
    past = alone.remember(TEXT[:PAST], OTHER[: PAST + 3])
    for _ in range(2):
        again = alone.losses(past, rows(), [MEMORY_ON])
        np.testing.assert_allclose(again[MEMORY_ON][1], scores[MEMORY_ON][1], atol=TOLERANCE)


def test_a_past_longer_than_memory_says_what_is_forgotten(alone):
    assert alone.remember(TEXT[:PAST]).forgotten == PAST - 32
    assert alone.remember(TEXT[:24]).forgotten == 0
    assert alone.remember(TEXT[: SEGMENT - 1]).tokens.shape == (1, 0)


def test_a_row_without_a_past(alone):
    found = alone.losses(alone.remember(TEXT[:3]), rows()[:2], [BACKBONE, MEMORY_ON, LONGEST_WINDOW])
    for row, loss in zip(rows()[:2], found[BACKBONE], strict=True):
        np.testing.assert_allclose(loss, plain_losses(alone.model, TEXT[:0], row), atol=TOLERANCE)
    assert np.isfinite(found[MEMORY_ON][0]).all()


def likely(scorer: ModelScorer, condition: str) -> list[tuple[list[float], bool]]:
    """The rows, and one that goes on as the model would write, which has another length."""
    past = scorer.remember(TEXT[:PAST], OTHER[: PAST + 3])
    prompt = OTHER[PAST : PAST + 6]
    (own,) = scorer.greedy(past, [prompt], condition, max_tokens=5, is_done=lambda tokens: False)
    found = scorer.likelihoods(past, [*rows(), Row(np.array([*prompt, *own]), len(own))], condition)
    return [(one.losses.tolist(), one.is_likeliest) for one in found]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_likelihoods_are_losses_and_what_greedy_decoding_writes_is_likeliest(alone, scores, condition):
    found = likely(alone, condition)
    assert [is_likeliest for _, is_likeliest in found] == [False] * len(rows()) + [True]
    if condition != LONGEST_WINDOW:  # the longer row leaves the others less of it
        for (losses, _), expected in zip(found, scores[condition], strict=False):
            np.testing.assert_allclose(losses, expected, atol=TOLERANCE)


def of_labels(scorer: ModelScorer) -> dict[str, list[float]]:
    """Five texts that begin alike, with three labels each."""
    past = scorer.remember(TEXT[:PAST], OTHER[: PAST + 3])
    texts = [[*TEXT[PAST : PAST + 6], number + 1, 9] for number in range(5)]
    asked = [Row(np.array([*text, label]), 1) for text in texts for label in (3, 4, 5)]
    found = scorer.losses(past, asked, scorer.conditions)
    return {name: [float(one[0]) for one in losses] for name, losses in found.items()}


def of_rank() -> tuple[Any, Any, Any, Any]:
    group = MemoryGroup.build(2, timeout_s=60)
    scorer = ModelScorer(model(), group, longest=LONGEST)
    few = ModelScorer(model(), group, longest=LONGEST, tokens_at_once=LEFT + 8)
    return scored(scorer), written(scorer, MEMORY_ON), likely(scorer, MEMORY_ON), of_labels(few)


def test_a_group_of_two_finds_the_same(scores, alone):
    for losses, texts, likelihoods, labels in run_ranks(of_rank, 2):
        for name, expected in of_labels(alone).items():
            np.testing.assert_allclose(labels[name], expected, atol=TOLERANCE)
        for (of_row, is_likeliest), (wanted, is_so_alone) in zip(likelihoods, likely(alone, MEMORY_ON), strict=True):
            np.testing.assert_allclose(of_row, wanted, atol=TOLERANCE)
            assert is_likeliest == is_so_alone
        for name in CONDITIONS:
            for one, expected in zip(losses[name], scores[name], strict=True):
                np.testing.assert_allclose(one, expected, atol=TOLERANCE)
        assert texts == written(alone, MEMORY_ON)


def uneven() -> tuple[dict[str, Any], int]:
    """Five items of other lengths on two ranks, whose model counts its turns."""
    group = MemoryGroup.build(1, timeout_s=60)
    turns = 0
    plain = model()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal turns
        turns += 1
        ready = torch.zeros(2)
        dist.all_gather_into_tensor(ready, torch.ones(1))  # as ZeRO-3: hangs unless every rank is here
        return plain.runs_backbone(*args, **kwargs)

    with in_step(plain.encoding_by(counted)) as (stepping, finish):
        scorer = ModelScorer(stepping, group, longest=LONGEST)

        def score(item: Item) -> dict[str, Any]:
            past = scorer.remember(TEXT[: item.content])
            found = scorer.losses(past, rows()[:2], [BACKBONE, MEMORY_ON, LONGEST_WINDOW])
            return {name: [one.tolist() for one in losses] for name, losses in found.items()}

        items = [Item(str(length), length) for length in (40, 8, 0, 16, 24)]
        found = run(items, score, group, finish=finish, progress=Progress(None))
    return dict(found), turns


def test_ranks_with_uneven_work_take_part_in_every_pass(alone):
    (first, turns), (second, turns_of_second) = run_ranks(uneven, 2)
    assert first == second and list(first) == ["40", "8", "0", "16", "24"]
    assert turns == turns_of_second > 10
    for name in (BACKBONE, MEMORY_ON, LONGEST_WINDOW):
        expected = alone.losses(alone.remember(TEXT[:24]), rows()[:2], [name])[name]
        np.testing.assert_allclose(first["24"][name][0], expected[0], atol=TOLERANCE)
