"""In-context learning: its files, its draws, and its rules by scorers that know the answers."""

from __future__ import annotations

import json
import logging
from typing import Any, cast

import datasets
import numpy as np
import pytest

from eval.demonstrations import Draw, pool_of
from eval.labelled import FORMS, read_set
from eval.options import take_options
from eval.report import markdown
from eval.runner import EvaluationError
from eval.scorer import BACKBONE, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON, OTHER_MEMORY, WINDOW_ONLY
from eval.task import Given
from eval.tasks.in_context.report import SHUFFLED, how_right, in_context_section
from eval.tasks.in_context.task import AT_ONCE, InContext, InContextOptions
from pipeline.errors import ConfigError, DataError
from tests.labelled_files import write_set
from tests.oracle_scorer import OracleScorer
from tests.tiny_config import tiny_config
from tests.tiny_tokenizer import save_tiny_tokenizer

WORDS = ("dull", "fine")
TRAIN = [(f"{WORDS[number % 2]} {number}", number % 2) for number in range(40)]
TEST = [(f"{WORDS[number % 2]} film {number}", number % 2) for number in range(6)] + [("dull end", 0), ("dull act", 0)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), tiny_config(), 10**6)


@pytest.fixture
def make(given, tmp_path):
    """Takes sets and options, gives the task."""

    def made(sets=None, given=given, **options):
        for name, (train, test) in (sets or {"MR": (TRAIN, TEST)}).items():
            write_set(tmp_path, name, train, test)
        wanted: dict[str, Any] = {"sets": tuple(sets or ["MR"]), "window_demonstrations": (2,), "seeds": (1,)}
        wanted |= {"memory_demonstrations": (0,), "data": (str(tmp_path),), **options}
        return InContext(InContextOptions(**wanted), given)

    return made


def last(given, before):
    """The last sentence that is asked about, and what was said of it so far."""
    text = given.tokenizer.decode(before)
    sentence, _, said = text[text.rindex("Review: ") + len("Review: ") :].partition(" Sentiment:")
    return sentence, said


def knows_labels(given, labels=WORDS, *, wrong=5.0):
    """A label is likely if its word is that of the sentence: dull is negative, fine is positive."""

    def knows(before, token, condition):
        sentence, said = last(given, [*before, token])
        right = " negative" if sentence.startswith("dull") else " positive"
        return 0.5 if right.startswith(said) else wrong

    return knows


def scored(task, scorer):
    scores = {item.name: task.score(item, scorer) for item in task.items()}
    scores = json.loads(json.dumps(scores))
    return scores, task.report(scores)


def means(section, **which):
    found = [one for one in section.figures["accuracy"] if all(one[key] == value for key, value in which.items())]
    assert len(found) == 1
    return {name: one["mean"] for name, one in found[0]["means"].items()}


def test_a_scorer_that_knows_is_always_right(make, given):
    task = make(memory_demonstrations=(0, 8), seeds=(1, 2))
    _, section = scored(task, OracleScorer(knows_labels(given)))
    without = means(section, memory_demonstrations=0)
    assert without == {name: 1.0 for name in (BACKBONE, MEMORY_OFF, MEMORY_ON)}
    conditions = {BACKBONE, MEMORY_OFF, MEMORY_ON, WINDOW_ONLY, LONGEST_WINDOW, SHUFFLED}
    assert means(section, memory_demonstrations=8) == {name: 1.0 for name in conditions}
    assert section.figures["accuracy"][0]["labels"] == {"negative": 5 / 8, "positive": 3 / 8}
    assert section.figures["accuracy"][0]["majority"] == 5 / 8
    text = markdown({}, {"in_context": section})
    assert "0: with nothing in memory (d), (e) and (g) are (c), and (f) is (a)." in section.tables[1].note
    assert "negative 62.5%, positive 37.5%" in text and "8 of test.csv" in text
    assert any(line.startswith("(d)") and "only one set" in line for line in section.missing)
    assert [plot.name for plot in section.plots] == ["MR-2"]
    assert section.plots[0].lines["(g) memory on, labels in memory shuffled"] == ([0, 8], [1.0, 1.0])


@pytest.mark.parametrize(("name", "chance"), [("MR", 1 / 2), ("SST-5", 1 / 5)])
def test_one_that_knows_nothing_has_the_chance(make, name, chance):
    _, section = scored(make({name: (TRAIN, TEST)}), OracleScorer(lambda before, token, condition: 0.0))
    assert list(means(section).values()) == pytest.approx([chance] * 3)
    assert section.figures["accuracy"][0]["ties"] == {name: len(TEST) for name in (BACKBONE, MEMORY_OFF, MEMORY_ON)}
    assert f"{chance:.3f}" in section.tables[0].rows[0]


def test_the_sum_over_a_labels_tokens_counts(make, given):
    """At one nat a token the label of fewer tokens is the likelier one: sums, not means."""
    _, section = scored(make(), OracleScorer(lambda before, token, condition: 1.0))
    lengths = [len(given.tokens(f" {label}")) for label in ("negative", "positive")]
    assert lengths[0] != lengths[1]
    assert set(means(section).values()) == {(5, 3)[int(np.argmin(lengths))] / 8}


def test_the_official_rule_errs_where_a_word_that_is_no_label_is_likelier(make, given):
    knows = knows_labels(given)
    scorer = OracleScorer(knows, lambda before, condition: given.tokens(" the"))
    assert set(means(scored(make(), scorer)[1]).values()) == {1.0}
    scores, section = scored(make(rule="prefix"), scorer)
    assert set(means(section).values()) == {0.0}
    first = given.tokenizer.decode(given.tokens(" the")[:1]).strip()
    assert next(iter(scores.values()))["answers"][MEMORY_ON][0] == first

    def writes(before, condition):
        return given.tokens("negative" if last(given, before)[0].startswith("dull") else "positive")

    assert set(means(scored(make(rule="prefix"), OracleScorer(writes=writes))[1]).values()) == {1.0}


@pytest.mark.parametrize(
    ("answer", "gold", "right", "is_tie"),
    [
        ([1.0, 2.0], 0, 1.0, False),
        ([1.0, 2.0], 1, 0.0, False),
        ([1.0, 1.0], 1, 0.5, True),
        ([2.0, 1.0], 0, 0.0, False),
        ([float("nan"), float("nan")], 0, 0.0, False),
        ("pos", 1, 1.0, False),
        ("positive", 1, 1.0, False),
        ("", 1, 0.0, False),
        ("positives", 1, 0.0, False),
        ("neg", 1, 0.0, False),
    ],
)
def test_how_right_an_answer_is(answer, gold, right, is_tie):
    assert how_right(answer, gold, ("negative", "positive")) == (right, is_tie)


def test_what_is_in_memory_tells(make, given):
    """A scorer that says of a sentence what memory says of its first word is right only with its own memory."""
    train = [(f"{word} {number}", label) for number in range(20) for label, word in enumerate(("dull", "fine"))]

    def knows(before, token, condition):
        sentence, said = last(given, [*before, token])
        shown = given.tokenizer.decode(before).split(f"Review: {sentence.split()[0]} ")[1:-1]
        labels = [one.partition(" Sentiment: ")[2].split(".")[0] for one in shown]
        if condition in (BACKBONE, MEMORY_OFF) or not labels:
            return 1.0 if said == "" else 0.0
        wanted = max(("negative", "positive"), key=labels.count)
        return 0.5 if f" {wanted}".startswith(said) else 9.0

    sets = {"MR": (train, TEST), "MPQA": ([(f"it {number}", number % 2) for number in range(40)], TEST)}
    task = make(sets, window_demonstrations=(0,), memory_demonstrations=(30,))
    _, section = scored(task, OracleScorer(knows))
    found = means(section, set="MR")
    assert found[MEMORY_ON] == 1.0
    assert found[SHUFFLED] < 1.0 and found[OTHER_MEMORY] < 1.0 and found[MEMORY_OFF] < 1.0
    differences = next(one for one in section.figures["accuracy"] if one["set"] == "MR")["memory_on_minus"]
    assert differences[SHUFFLED]["mean"] == pytest.approx(1.0 - found[SHUFFLED])
    assert not any(line.startswith("(d)") for line in section.missing)


def test_a_past_is_remembered_once_and_items_come_many_at_once(make):
    sets = {"MR": (TRAIN, [(f"new {number}", number % 2) for number in range(AT_ONCE + 3)])}
    task = make(sets, window_demonstrations=(1, 3), memory_demonstrations=(0, 4), seeds=(1, 2))
    scorer = OracleScorer()
    scores, _ = scored(task, scorer)
    assert len(scores) == 2 * 2 * 2 * 2  # seeds, memories, windows, batches
    assert scorer.num_remembered == 2 * 2
    assert {len(one["gold"]) for one in scores.values()} == {AT_ONCE, 3}


def test_fewer_items_are_the_first_of_more_and_named_by_what_they_hold(make):
    few, more = (make(limit=limit) for limit in (3, 6))
    golds = [[question.gold for question in task._questions["MR"]] for task in (few, more)]
    few_items, more_items = few.items(), more.items()
    assert golds[0] == golds[1][:3] and {item.name for item in few_items}.isdisjoint(one.name for one in more_items)
    assert len(set(golds[1])) == 2  # files are sorted by label


def test_a_draw(make, given, tmp_path):
    task = make({"MR": (TRAIN, TEST), "MPQA": (TRAIN, TEST)})
    pool = task._sets["MR"][1]
    drawn = Draw(given, pool, task._sets["MPQA"][1], seed=3, num_window=4)

    def shown(tokens):
        return [one.strip() for one in given.tokenizer.decode(tokens).split("Review:")]

    window, memory = shown(drawn.window(4)), drawn.memory(10)
    assert shown(drawn.window(2))[1:] == window[-2:]
    own, shuffled, _ = (shown(lane) for lane in memory.lanes)
    assert {len(lane) % 16 for lane in memory.lanes} == {0} and len({len(lane) for lane in memory.lanes}) == 1
    assert own[-10:] == shown(drawn.memory(20).lanes[0])[-10:]
    assert len(own) - 1 >= 10 and not set(own[-10:]) & set(window)
    assert len(memory.lanes[0]) <= sum(memory.sizes) < len(memory.lanes[0]) + memory.sizes[-1]
    sentences = [[one.partition(" Sentiment")[0] for one in lane[1:]] for lane in (own, shuffled)]
    assert sentences[0] == sentences[1] and own != shuffled
    labels = [sorted(one.partition("Sentiment: ")[2] for one in lane[-10:]) for lane in (own, shuffled)]
    assert abs(labels[0].count("positive.") - labels[1].count("positive.")) <= len(memory.sizes) - 10
    assert memory.num_fitting(sum(memory.sizes[:3])) == 3 and memory.num_fitting(0) == 0
    assert [len(lane) for lane in drawn.memory(0).lanes] == [0, 0, 0]
    assert shown(Draw(given, pool, None, seed=4, num_window=4).window(4)) != window


def test_other_memory_is_that_of_a_set_asked_in_another_way_and_has_no_test_item(make, given):
    own = [("the same film", 1), *TRAIN]
    sets = {"MR": (TRAIN, [("the same film", 1), *TEST]), "MPQA": (TRAIN, TEST), "Subj": (own, TEST)}
    task = make(sets)
    assert [task._other(name) for name in ("MR", "MPQA", "Subj")] == ["Subj", "Subj", "MR"]
    lane = task._draw("MR", 1).memory(38).lanes[2]
    assert "the same film" not in given.tokenizer.decode(lane)
    assert "the same film" in given.tokenizer.decode(task._draw("MPQA", 1).memory(38).lanes[2])


def test_a_test_item_among_the_demonstrations(make, caplog):
    train = [("Dull  END", 0), ("dull end", 0), ("dull end", 1), *TRAIN, TRAIN[0]]
    with caplog.at_level(logging.WARNING):
        task = make({"MR": (train, TEST)})
        items = task.items()
    assert "MR: 1 demonstrations are test items" in caplog.text
    pool = items and task._sets["MR"][1]
    assert [one.text for one in pool.examples] == [text for text, _ in TRAIN]
    assert (pool.num_repeated, pool.num_tested) == (3, 1)
    with pytest.raises(EvaluationError, match="test items of MR are among its demonstrations; got: 1 of 41, such as"):
        make({"MR": (train, TEST)}, overlap="refuse").items()
    with pytest.raises(EvaluationError, match="name other data: nothing would be left"):
        make({"MR": (TEST, TEST)}).items()


def test_what_memory_forgets_is_said(make, given, caplog):
    with caplog.at_level(logging.WARNING):
        _, section = scored(make(memory_demonstrations=(30,)), OracleScorer())
    assert "MR: memory.tokens 32 hold the newest" in caplog.text
    assert "the others are forgotten" in section.tables[1].note


def test_mean_and_deviation_over_seeds():
    part = {"set": "MR", "memory": 0, "window": 1, "first": 0, "end": 2, "split": "test.csv", "labels": ["no", "yes"]}
    part |= {"gold": [0, 1], "memory_tokens": 0, "remembered": 0, "within_memory": 0, "within_longest": 0}
    part |= {"other": None, "pool": {"size": 9, "repeated": 0, "tested": 0}}
    answers = [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]]]
    parts = [part | {"seed": seed, "answers": {MEMORY_ON: one}} for seed, one in enumerate(answers)]
    section = in_context_section(parts, rule="labels", longest=9)
    (found,) = section.figures["accuracy"]
    assert found["by_seed"] == {MEMORY_ON: [1.0, 0.5]} and found["deviation"] == {MEMORY_ON: 0.25}
    assert found["means"][MEMORY_ON]["mean"] == 0.75 and found["means"][MEMORY_ON]["num_items"] == 2


def test_files_are_read_as_their_authors_give_them(tmp_path):
    for name, form in FORMS.items():
        last_label = len(form.labels) - 1
        write_set(tmp_path, name, [('say "so", then', 0)], [("a new\u0301 day .", last_label)])
        found = read_set(name, [str(tmp_path)])
        assert found.train == [('say "so", then', 0)] and found.test == [("a new\u0301 day .", last_label)]
        assert found.split == form.files[1]
    assert FORMS["Subj"].labels[0] == "subjective"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SST-2", "text\ttarget\nfine\t1\n", r"another format; got: the columns \['text', 'target'\]"),
        ("SST-2", '{"sentence": "fine", "label": 1}\n', "another format; got: the columns"),
        ("SST-2", "sentence\tlabel\nfine\t1\textra\n", "line 2: another format"),
        ("SST-2", "sentence\tlabel\n", "SST-2 is empty; got: no sentence in train.tsv"),
        ("SST-2", "sentence\tlabel\nfine\t2\n", r"line 2: a label outside the set SST-2; got: '2'; expected: 0 \(neg"),
        ("MR", "", "MR is empty"),
        ("MR", "0,fine\nfine\n", r"line 2: another format; got: \['fine'\]; expected: LABEL,TEXT"),
        ("MR", "positif,fine\n", "line 1: a label outside the set mr; got: 'positif'"),
        ("SST-5", "5 fine\n", "a label outside the set sst-5; got: '5'; expected: 0 .terrible"),
        ("SST-5", "fine\n", "another format"),
        ("MPQA", b"0,caf\xe9\n", "cannot be read; got: UnicodeDecodeError"),
        ("MPQA", b"0,a\x00b\n", None),
    ],
)
def test_bad_files(make, tmp_path, name, text, message):
    task = make({name: (TRAIN, TEST)})
    path = tmp_path / FORMS[name].folder / FORMS[name].files[0]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if message is None:
        assert len(read_set(name, [str(tmp_path)]).train) == 1
        return
    with pytest.raises(DataError, match=message):
        task.items()


def test_sets_that_are_not_there(make, given, tmp_path):
    task = make()
    for data in (str(tmp_path / "nowhere"), str(tmp_path / "mr" / "train.csv")):
        with pytest.raises(DataError, match="the set sst-5 is not in the data"):
            read_set("SST-5", [data])
    assert len(read_set("MR", [str(tmp_path / "mr")]).test) == len(task._sets["MR"][0].test)
    (tmp_path / "mr" / "test.csv").unlink()
    with pytest.raises(DataError, match="test.csv cannot be read"):
        read_set("MR", [str(tmp_path)])


def test_demands_that_cannot_be_met(make, given):
    with pytest.raises(EvaluationError, match="MR has too few demonstrations; got: 40, without 0 repeated"):
        make(memory_demonstrations=(39,)).items()
    short = Given(given.tokenizer, given.config, 30)
    with pytest.raises(EvaluationError, match="a prompt of MR with 2 demonstrations is too long; got: .* at most 30"):
        make(given=short).items()
    fits = Given(given.tokenizer, given.config, 120)
    assert make(given=fits).items()
    with_context = Given(given.tokenizer, tiny_config(backbone={"context_tokens": 64}), 120)
    with pytest.raises(EvaluationError, match="64 of them left context"):
        make(given=with_context).items()


def test_options_on_the_command_line():
    line = ["--in_context.sets", "mpqa,Sst-2", "--in_context.seeds", "2,1,2", "--in_context.memory-demonstrations", "5"]
    options = cast(InContextOptions, take_options([InContext], line, data=["folder"], limit="small")[0]["in_context"])
    assert options.sets == ("MPQA", "SST-2") and options.seeds == (1, 2) and options.memory_demonstrations == (5,)
    for wrong in (["--in_context.sets", "SST2"], ["--in_context.rule", "mean"], ["--in_context.seeds", "[]"]):
        with pytest.raises(ConfigError, match=wrong[0].removeprefix("--")):
            take_options([InContext], wrong, data=["folder"], limit=None)


def test_the_hub(monkeypatch):
    def load(name, split):
        assert name in ("SetFit/subj", "someone/subj")
        rows = {"text": [f"I {split}"], "label": [0], "label_text": ["objective"]}
        return datasets.Dataset.from_dict(rows if name == "SetFit/subj" else {"text": ["I"], "target": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_set("Subj", ["hub"])
    assert found.train == [("I train", 1)] and found.test == [("I test", 1)]
    with pytest.raises(DataError, match=r"someone/subj has another format; got: the columns \['text', 'target'\]"):
        read_set("Subj", ["Subj=someone/subj"])

    def fails(name, split):
        raise ConnectionError("offline mode")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="jxm/mpqa cannot be loaded from the hub; got: ConnectionError: offline mode"):
        read_set("MPQA", ["hub"])


def test_a_pool_keeps_the_first_of_repeated_sentences(tmp_path):
    write_set(tmp_path, "MR", [("a", 0), ("b", 1), ("A", 1)], [("c", 0)])
    pool = pool_of(read_set("MR", [str(tmp_path)]), refuse=True)
    assert [tuple(one) for one in pool.examples] == [("a", 0), ("b", 1)]
