"""ChapterBreak: its rules by hand, by a scorer that knows the answers, and by a tiny model one row at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.chapterbreak_report import AtSize, by_rule, share_of_right
from eval.model_scorer import ModelScorer
from eval.options import take_options
from eval.scorer import CONDITIONS, MEMORY_ON, OTHER_MEMORY, Row
from eval.task import Given
from eval.tasks.chapterbreak import ChapterBreak, ChapterBreakOptions
from pipeline.errors import DataError
from pipeline.model.longmem import LongMem, build
from tests.oracle_scorer import OracleScorer
from tests.tiny_config import tiny_config
from tests.tiny_run import save_backbone
from tests.tiny_tokenizer import save_tiny_tokenizer

RIGHT, WRONG = "right right right", "wrong {} wrong"
TOLERANCE = 1e-4  # sums of float32 in other batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """Takes what files hold and options, gives the task."""

    def made(*contents, longest=10**6, config=None, **options):
        paths = []
        for number, content in enumerate(contents):
            path = tmp_path / f"file{number}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
            paths.append(str(path))
        given = Given(tokenizer, config or tiny_config(), longest)
        return ChapterBreak(ChapterBreakOptions(data=tuple(paths), **options), given)

    return made


def example(context="a b c d e f g h i j k l", right=RIGHT, num_wrong=5):
    return {"ctx": context, "pos": right, "negs": [WRONG.format(number) for number in range(num_wrong)]}


def works(**numbers):
    return {work: [example(f"{work} says {one} " * 9) for one in range(number)] for work, number in numbers.items()}


def scored(task, scorer):
    """Scores as a file brings them back, and the section."""
    scores = {item.name: task.score(item, scorer) for item in task.items()}
    scores = json.loads(json.dumps(scores))
    return scores, task.report(scores)


def means(section, subset, size, rule="mean"):
    found = section.figures[subset][str(size)]["accuracy_percent"][rule]["means"]
    return {name: one["mean"] for name, one in found.items()}


class Forgetful(OracleScorer):
    """Has room for 32 tokens."""

    def remember(self, *lanes):
        texts = super().remember(*lanes)
        texts.forgotten = max(0, len(texts[0]) - 32)
        return texts


@pytest.mark.parametrize(
    ("losses", "share", "is_tie"),
    [
        ([1.0, 2.0, 3.0], 1, False),
        ([2.0, 1.0, 3.0], 0, False),
        ([1.0, 1.0, 3.0], 1 / 2, True),
        ([1.0, 1.005, 0.995], 1 / 3, True),
        ([1.0, 0.991, 0.985], 0, True),  # the right one is not among those that are the lowest
        ([3.0, 1.0, 1.0], 0, True),
        ([5.0] * 6, 1 / 6, True),
        ([1.0, np.nan, 3.0], 0, False),
        ([np.inf] * 6, 0, False),
    ],
)
def test_ties_are_divided(losses, share, is_tie):
    found = share_of_right(np.array(losses), 0.01)
    assert found[0] == pytest.approx(share) and found[1] == is_tie


def test_rules_by_hand():
    """Sums 4, 6, 8 of 2, 4, 4 tokens: means 2, 1.5, 2. Without context 5, 8, 7: pmi -1, -2, 1."""
    sums, alone, sizes = np.array([4.0, 6.0, 8.0]), np.array([5.0, 8.0, 7.0]), np.array([2.0, 4.0, 4.0])
    assert by_rule("mean", sums, alone, sizes).tolist() == [2, 1.5, 2]
    assert by_rule("sum", sums, alone, sizes).tolist() == [4, 6, 8]
    assert by_rule("pmi", sums, alone, sizes).tolist() == [-1, -2, 1]


def test_all_rules_are_made_of_the_same_scores():
    """Right by sum only; then by pmi alone, where a tie by mean counts a half."""
    contexts = [[4.0, 6.0, 8.0], [4.0, 8.0, 3.0]]
    alone = [[5.0, 8.0, 7.0], [6.0, 8.0, 4.0]]
    items = [
        {
            "num_tokens": [2, 4, 4 - 2 * number],
            "without_context": {MEMORY_ON: alone[number]},
            "contexts": {"9": {"num_tokens": 9, "num_forgotten": 0, "sums": {MEMORY_ON: contexts[number]}}},
        }
        for number in range(2)
    ]
    items[1]["num_tokens"] = [2, 4, 1]  # means 2, 2, 3; sums 4, 8, 3; pmi -2, 0, -1
    found = AtSize(items, 9)
    assert {rule: of[MEMORY_ON] for rule, of in found.percent.items()} == {
        "mean": [0, 50],
        "sum": [100, 0],
        "pmi": [0, 100],
    }
    assert {rule: of[MEMORY_ON] for rule, of in found.ties.items()} == {"mean": 1, "sum": 0, "pmi": 0}
    assert found.chance == pytest.approx(100 / 3)


def test_who_knows_the_answer_is_always_right_and_who_knows_nothing_is_at_chance(make, tokenizer):
    right = set(tokenizer.encode(f" {RIGHT}"))
    task = make({"pg19": works(a=2, b=1), "ao3": works(c=3)}, contexts=(8, 40))

    def knows(before, token, condition):
        return 0.5 if condition == MEMORY_ON and token in right else 1.0

    scores, section = scored(task, OracleScorer(knows))
    assert len(scores) == 6 and list(section.figures) == ["pg19", "ao3"]
    for size in (8, 40):
        for subset, others in (("pg19", CONDITIONS), ("ao3", [name for name in CONDITIONS if name != OTHER_MEMORY])):
            expected = {name: 100 if name == MEMORY_ON else pytest.approx(100 / 6) for name in others}
            assert means(section, subset, size) == expected
            ties = section.figures[subset][str(size)]["ties"]["mean"]
            assert ties == {name: 0 if name == MEMORY_ON else 3 for name in others}
    assert section.missing == ["ao3: (d) memory of another document: the subset has one work only"]
    accuracy = next(table for table in section.tables if table.title == "pg19, 40 tokens of context: accuracy by mean")
    assert "Chance: 16.7 %. Ties: (a) backbone alone, same window 3, (b) memory off 3" in accuracy.note
    by_condition = {row[0]: row[1:] for row in accuracy.rows}
    assert by_condition["(b) memory off"] == ["16.7 [16.7, 16.7]", "+83.3 [+83.3, +83.3]", "3"]
    assert [plot.lines["chance"][1] for plot in section.plots] == [[pytest.approx(100 / 6)] * 2] * 2


def test_ties_of_float32_are_ties_whatever_the_rule(make):
    """Losses that differ by rounding only."""
    task = make(works(a=1, b=1), contexts=(8,))
    _, section = scored(task, OracleScorer(lambda before, token, condition: 1 + 1e-7 * (token % 7)))
    found = section.figures["file0"]["8"]
    assert found["ties"]["mean"][MEMORY_ON] == 2
    for rule in ("mean", "pmi"):
        assert means(section, "file0", 8, rule)[MEMORY_ON] == pytest.approx(100 / 6)


def test_contexts_are_cut_from_the_left_and_suffixes_from_the_right(make, tokenizer):
    content = works(a=1, b=1)
    task = make(content, contexts=(20, 40, 500), suffix_tokens=5)
    contexts = {work: tokenizer.encode(content[work][0]["ctx"].strip()) for work in content}
    suffixes = [tokenizer.encode(f" {text}")[:5] for text in (RIGHT, *(WRONG.format(number) for number in range(5)))]
    read: dict[str, list[tuple[list[int], int]]] = {name: [] for name in CONDITIONS}

    def knows(before, token, condition):
        read[condition].append((list(before), token))
        return 1.0

    scorer = OracleScorer(knows)
    scores = task.score(task.items()[0], scorer)
    assert scorer.num_remembered == 4  # a context of each size once, and nothing
    assert scores["num_tokens"] == [len(suffix) for suffix in suffixes] == [5] * 6
    assert [one["num_tokens"] for one in scores["contexts"].values()] == [20, 40, len(contexts["a"])]
    expected = [
        (before + suffix[:place], suffix[place])
        for before in (contexts["a"][-20:], contexts["a"][-40:], contexts["a"])
        for suffix in suffixes
        for place in range(5)
    ]
    alone = [([tokenizer.eos_token_id, *suffix[:place]], suffix[place]) for suffix in suffixes for place in range(5)]
    assert read[MEMORY_ON] == expected + alone
    assert read["longest_window"] == expected  # without context it is the backbone
    foreign, _ = read[OTHER_MEMORY][0]
    assert foreign == contexts["b"][-16:] + contexts["a"][-4:]  # the memory of b, and the rest of the own context


def test_a_context_longer_than_memory_says_what_was_forgotten_and_a_short_one_that_it_is(make, tokenizer):
    task = make({"pg19": works(a=1, b=1)}, contexts=(16, 10_000))
    _, section = scored(task, Forgetful())
    notes = {table.title: table.note for table in section.tables}
    longest = max(len(tokenizer.encode(one["ctx"].strip())) for of in works(a=1, b=1).values() for one in of)
    forgotten = (longest - 1) // 16 * 16 - 32
    assert forgotten > 0
    assert notes["pg19, 10,000 tokens of context: accuracy by mean"].endswith(
        "2 of the contexts are shorter, and whole. Memory had no room for 2 of the contexts: "
        f"up to {forgotten} of their first tokens were forgotten."
    )
    assert "forgotten" not in notes["pg19, 16 tokens of context: accuracy by mean"]


def test_rows_of_one_memory_are_what_single_rows_are(make, tmp_path):
    config = tiny_config(
        memory={"position": "clamp:12", "window_tokens": 8},
        sidenet={"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 2.0},
    )
    backbone = AutoModelForCausalLM.from_pretrained(save_backbone(tmp_path / "backbone"), dtype=torch.float32)
    model = LongMem(config.model, *build(config.model, backbone))
    task = make({"pg19": works(a=1, b=1)}, contexts=(60,), suffix_tokens=6, config=config)
    tokens = task.given.tokens
    scorer = ModelScorer(model)
    item = task.items()[0]
    found = task.score(item, scorer)["contexts"]["60"]
    assert found["num_forgotten"] == 48 - 32
    own, other = (tokens(one.context.strip())[-60:] for one in item.content)
    past = scorer.remember(np.array(own[:48]), np.array(other[-48:]))
    assert set(found["sums"]) == set(scorer.conditions) == set(CONDITIONS)
    for number, suffix in enumerate(item.content[0].suffixes):
        row = Row(np.array(own[48:] + tokens(f" {suffix}")[:6]), 6)
        alone = scorer.losses(past, [row], CONDITIONS)
        for name in CONDITIONS:
            assert found["sums"][name][number] == pytest.approx(alone[name][0].sum(), abs=TOLERANCE)
    sums = np.array([found["sums"][name] for name in CONDITIONS])
    assert abs(sums - sums[CONDITIONS.index(MEMORY_ON)]).max(axis=1).round(3).astype(bool).sum() == 5


def test_the_first_items_are_of_many_works_and_borrow_of_another(make):
    content = {"pg19": works(a=3, b=1, c=2), "ao3": works(d=1)}
    items = make(content).items()
    assert [item.name for item in items] == [
        "pg19/a/0",
        "pg19/b/0",
        "pg19/c/0",
        "ao3/d/0",
        "pg19/a/1",
        "pg19/c/1",
        "pg19/a/2",
    ]
    others = [other and other.name for _, other in (item.content for item in items)]
    assert others == ["pg19/b/0", "pg19/c/0", "pg19/a/0", None, "pg19/b/0", "pg19/a/1", "pg19/b/0"]
    assert make(content, limit=2).items() == items[:2]
    assert [item.name for item in make(content, subset="ao3").items()] == ["ao3/d/0"]
    assert [item.name for item in make(works(a=1), works(a=1)).items()] == ["file0/a/0", "file1/a/0"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", r"cannot be read; got: .*file0.json \(Expecting.*expected: a JSON file: \{\"pg19\": \{work: "),
        ("[]", "not one of ChapterBreak; got: .*file0.json: a list at the top"),
        ({"data": {"title": "x"}}, r"the keys data; \['data'\]\['title'\] holds a str"),
        ({"pg19": {"w": {"ctx": 1, "foo": 2}}}, r"the keys pg19; \['pg19'\]\['w'\] holds the keys ctx, foo"),
        ({"w": [{"context": "x", "answer": "y"}]}, r"\['w'\]\[0\] holds the keys context, answer"),
        ({"w": ["x"]}, "holds a str"),
        ({"version": "1.1", "data": []}, r"the keys version, data; \['version'\] holds a str"),
        ({"w": [example() | {"negs": "x"}]}, "no list of wrong suffixes"),
        ({"w": [example() | {"negs": []}]}, "no list of wrong suffixes"),
        ({"w": [example() | {"pos": " "}]}, "a text that is empty"),
        ({"w": [example() | {"negs": [RIGHT]}]}, "its right suffix among the wrong ones"),
        ({}, "no example.*expected: at least one"),
        ({"pg19": {}, "ao3": {"w": []}}, "no example.*expected: at least one"),
    ],
)
def test_other_files_are_refused(make, content, match):
    with pytest.raises(DataError, match=match):
        make(content).items()


def test_what_cannot_be_read_or_chosen_is_said(make, tokenizer):
    with pytest.raises(
        DataError, match=r"no example.*got: 'ao' of .*expected: one of all, pg19, ao3; do: set --chapter"
    ):
        make({"pg19": works(a=1), "ao3": works(b=1)}, subset="ao").items()
    with pytest.raises(DataError, match="two files hold the same example.*got: pg19/a/0"):
        make({"pg19": works(a=1)}, {"pg19": works(a=2)}).items()
    with pytest.raises(
        DataError, match="got: 144 tokens .*expected: at most 100; do: lower --chapterbreak.suffix_tokens"
    ):
        make(works(a=1), longest=100).items()
    given = Given(tokenizer, tiny_config(), 0)
    with pytest.raises(DataError, match="cannot be read; got: /no/such"):
        ChapterBreak(ChapterBreakOptions(data=("/no/such.json",)), given).items()


@pytest.mark.parametrize(("text", "sizes"), [("4096", (4096,)), ("10,20", (10, 20)), ("[10, 20]", (10, 20))])
def test_several_values_are_named_with_commas(text, sizes):
    options, left = take_options([ChapterBreak], ["--chapterbreak.contexts", text], data=["x=1"], limit="small")
    assert options["chapterbreak"].model_dump() == {
        **ChapterBreakOptions(data=("x=1",), **ChapterBreak.small).model_dump(),
        "contexts": sizes,
    }
    assert left == []
