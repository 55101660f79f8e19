"""Recall: texts by hand, answers by oracles that know the key always, never, or from the last tokens only."""

from __future__ import annotations

import re

import numpy as np
import pytest

from eval.runner import EvaluationError
from eval.scorer import BACKBONE, CONDITIONS, LONGEST_WINDOW, MEMORY_ON, OTHER_MEMORY
from eval.task import Given
from eval.tasks.perplexity import Perplexity, PerplexityOptions
from eval.tasks.recall.passkey import (
    GARBAGE,
    LARGEST_KEY,
    QUESTION,
    TASK,
    PasskeyMaker,
    first_integer,
    is_decided,
    keys,
    most_digits,
)
from eval.tasks.recall.read_again import GENERATED, made_up, of_stores, place_of_second, read_once, read_twice
from eval.tasks.recall.task import Recall, RecallOptions
from pipeline.config.schema import DataConfig
from pipeline.data.store import TokenStore
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import DataError
from tests.oracle_scorer import OracleScorer
from tests.tiny_run import VALIDATION_TOKENS

LENGTHS, DEPTHS = (480, 640), (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def given(tiny_run, tmp_path_factory):
    return Given(load_tokenizer(tiny_run.backbone), tiny_run.config(tmp_path_factory.mktemp("run")), longest=128)


@pytest.fixture
def make(given):
    """Takes options, gives the task; nothing is read again where no distance is named, no key asked for by default."""

    def made(given=given, **options):
        return Recall(RecallOptions(**({"lengths": (), "distances": ()} | options)), given)

    return made


def evaluated(task, scorer):
    """The scores of all texts and passages, and the section."""
    scores = {item.name: task.score(item, scorer) for item in task.items()}
    return {name: one for item in scores.values() for name, one in item.items()}, task.report(scores)


def key_in(text):
    """The key that a text says; None: its line is not there."""
    found = re.search(r"The pass key is (\d+)\. Remember", text)
    return found and found.group(1)


def writer(given, reach):
    """Writes the key, and on, if its line is among the last tokens that the condition reaches."""

    def writes(before, condition):
        reached = before[len(before) - min(len(before), reach(condition)) :]
        key = key_in(given.tokenizer.decode(reached))
        return given.tokens(f" {key}. Remember" if key else " 0, said the captain")

    return writes


class TestText:
    @pytest.mark.parametrize("length", [400, 401, 1000])
    @pytest.mark.parametrize(("depth", "share"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
    def test_is_as_long_as_asked_for_and_has_the_key_where_asked_for(self, given, length, depth, share):
        text = PasskeyMaker(given.tokens).make("name", length=length, depth=depth, key=41237)
        assert len(text.tokens) == length
        start, stop = text.line
        line = given.tokenizer.decode(text.tokens[start:stop])
        assert line == "\nThe pass key is 41237. Remember it. 41237 is the pass key.\n"
        head, tail = given.tokens(TASK + "\n"), given.tokens("\n" + QUESTION)
        num_garbage = length - len(head) - (stop - start) - len(tail)
        assert start == len(head) + round(share * num_garbage)
        assert text.tokens[: len(head)].tolist() == head and text.tokens[-len(tail) :].tolist() == tail
        garbage = given.tokenizer.decode(text.tokens[stop : -len(tail)]) + given.tokenizer.decode(
            text.tokens[len(head) : start]
        )
        endless = " ".join([GARBAGE] * 20)
        assert garbage[:50] in ("", endless[:50]) or endless.startswith(garbage)
        assert given.tokenizer.decode(text.answer) == " 41237."

    def test_that_is_too_short_is_refused_with_the_shortest_that_there_is(self, make):
        with pytest.raises(EvaluationError, match=r"too short for a passkey; got: 40; expected: (\d+) tokens") as error:
            make(lengths=(40,)).items()
        least = int(str(error.value).partition("expected: ")[2].partition(" ")[0])
        with pytest.raises(EvaluationError, match="too short"):
            make(lengths=(least - 8,), depths=(0.0,), keys=1).items()
        assert make(lengths=(least + 8,), depths=(0.0,), keys=1).items()  # keys have from 1 to 5 digits

    def test_keys_are_different_and_in_range(self):
        drawn = keys(1000, seed="0/1024")
        assert len(set(drawn)) == 1000 and 1 <= min(drawn) < 200 and 49_800 < max(drawn) <= LARGEST_KEY
        assert drawn == keys(1000, seed="0/1024") != keys(1000, seed="1/1024")
        with pytest.raises(EvaluationError, match="more texts of a length than there are keys; got: 50001"):
            keys(LARGEST_KEY + 1, seed="0")


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        (" 41237. Remember", 41237),
        ("41237", 41237),
        (" the number 00412 or 7", 412),
        ("-12", 12),
        (" 41,237", 41),
        ("4.5", 4),
        (" forty", None),
        ("", None),
        (" \u0664\u0661", None),  # digits, but not those of the keys
    ],
)
def test_the_first_integer_counts(text, integer):
    assert first_integer(text) == integer


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("", False),
        (" the", False),
        (" 4", False),
        (" 412", False),
        (" 0", False),
        (" 04", False),
        (" 412.", True),
        (" 41 ", True),
        (" 4123", True),
        (" 5", True),
        (" 05", True),
    ],
)
def test_an_answer_is_decided_when_nothing_more_can_change_it(text, decided):
    assert is_decided(text, 412) == decided


@pytest.mark.parametrize(
    ("text", "num_left", "decided"),
    [(" a key that", 2, False), (" a key that", 1, True), (" 4", 1, False), (" 4", 0, True), (" 412", 0, False)],
)
def test_an_answer_is_decided_when_there_is_no_room_for_the_key(text, num_left, decided):
    assert is_decided(text, 412, num_left=num_left, digits_a_token=2) == decided


def test_the_most_digits_of_a_token():
    assert most_digits(["the", "Ġ12", "a1b234", "5"]) == 3 and most_digits(["no", "digits"]) == 1


class TestAccuracy:
    def test_of_one_who_copies_the_key_is_1_and_of_others_memory_0(self, given, make):
        task = make(lengths=LENGTHS, depths=DEPTHS, keys=1)
        parts, section = evaluated(task, OracleScorer(writes=writer(given, lambda condition: 10**6)))
        assert len(parts) == 6 and {one["length"] for one in parts.values()} == set(LENGTHS)
        figures = section.figures["passkey"]["all"]["means"]
        means = {name: figure["mean"] for name, figure in figures.items()}
        # The other text has another key: nobody who reads that one knows this one's.
        assert means == {name: float(name != OTHER_MEMORY) for name in CONDITIONS}
        assert all(figure["num_items"] == 6 for figure in figures.values())

    def test_of_one_who_writes_something_else_is_0(self, make, given):
        task = make(lengths=LENGTHS, depths=DEPTHS, keys=1)
        _, section = evaluated(task, OracleScorer(writes=writer(given, lambda condition: 0)))
        assert {one["mean"] for one in section.figures["passkey"]["all"]["means"].values()} == {0.0}

    def test_by_length_and_depth_is_that_of_one_who_knows_the_last_tokens_only(self, make, given):
        reach = {MEMORY_ON: 400, LONGEST_WINDOW: 10**6}
        task = make(lengths=(480, 640, 1000), depths=DEPTHS, keys=2)
        parts, section = evaluated(task, OracleScorer(writes=writer(given, lambda name: reach.get(name, 0))))
        assert len(parts) == 18
        heats = {plot.name: plot for plot in section.plots}
        assert list(heats) == ["passkey-memory_on", "passkey-memory_off", "passkey-longest_window"]
        # The line of the key begins 360, 220 and 90 tokens before the end of 480, 520, 300 and 90 before that of 640.
        assert heats["passkey-memory_on"].values == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
        assert heats["passkey-memory_on"].rows == ["0", "0.5", "1"]
        assert heats["passkey-memory_on"].columns == ["480", "640", "1,000"]
        assert heats["passkey-longest_window"].values == [[1, 1, 1]] * 3
        assert heats["passkey-memory_off"].values == [[0, 0, 0]] * 3

    def test_an_answer_may_have_ten_tokens(self, make, given):
        def late(num_tokens):
            one = given.tokens(" the")
            assert len(one) == 1

            def writes(before, condition):
                return one * num_tokens + given.tokens(f"{key_in(given.tokenizer.decode(before))}.")

            task = make(lengths=(480,), depths=(1.0,), keys=2)
            parts, section = evaluated(task, OracleScorer(writes=writes))
            return parts, section.figures["passkey"]["all"]["means"][BACKBONE]["mean"]

        assert late(5)[1] == 1.0
        parts, accuracy = late(10)
        assert accuracy == 0.0 and {one["answers"][BACKBONE] for one in parts.values()} == {None}

    def test_what_follows_the_end_of_text_is_no_answer(self, make, given):
        def writes(before, condition):
            return [given.tokenizer.eos_token_id, *given.tokens(key_in(given.tokenizer.decode(before)))]

        parts, _ = evaluated(make(lengths=(480,), depths=(1.0,), keys=2), OracleScorer(writes=writes))
        assert {one["answers"][BACKBONE] for one in parts.values()} == {None}


def test_a_text_that_is_alone_has_no_other_memory(make, given):
    task = make(lengths=(480,), depths=(0.5,), keys=1)
    parts, section = evaluated(task, OracleScorer(writes=writer(given, lambda condition: 10**6)))
    assert set(next(iter(parts.values()))["answers"]) == set(CONDITIONS) - {OTHER_MEMORY}
    assert section.missing == ["(d) memory of another document"]


def test_what_memory_has_no_room_for_is_said(make, given, caplog):
    task = make(lengths=(480,), depths=DEPTHS, keys=1)
    parts, section = evaluated(task, OracleScorer())
    assert "of 480 tokens memory, which holds 64, forgets the beginning" in caplog.text
    # A past of 464 tokens and the open segment; memory holds 64.
    assert {one["forgotten"] for one in parts.values()} == {464 - 64}
    gone = [one["depth"] for one in parts.values() if one["key_is_forgotten"]]
    assert gone == [0.0, 0.5] or gone == [0.0]
    assert "Of 480 tokens memory, which holds 64, has forgotten the first 400: the keys at depths 0" in section.rule


class TestReadAgain:
    @pytest.mark.parametrize(("distance", "second"), [(32, 32), (33, 48), (47, 48), (48, 48)])
    def test_a_passage_stands_at_its_distance_and_where_a_segment_begins(self, distance, second):
        passage, filler = np.arange(100, 116), np.arange(40)
        text = read_twice(passage, filler, distance=distance, segment_tokens=16)
        assert place_of_second(distance, 16) == second and len(text) == second + 16
        assert text[second:].tolist() == text[second - distance :][:16].tolist() == passage.tolist()
        rest = np.concatenate([text[: second - distance], text[second - distance + 16 : second]])
        assert rest.tolist() == np.resize(filler, second - 16).tolist()

    def test_a_passage_that_is_no_whole_segment_is_followed_by_filler(self):
        passage, filler = np.arange(100, 120), np.arange(40)
        assert read_once(passage, filler, segment_tokens=16).tolist() == [*passage, *range(12)]
        text = read_twice(passage, filler, distance=40, segment_tokens=16)
        assert text[48:].tolist() == [*passage, *range(12)] and text[8:28].tolist() == passage.tolist()

    def test_known_losses_come_back(self, make):
        def knows(before, token, condition):
            """1 for what is new; for what was read before 0.25 with memory, 1 without."""
            is_known = condition == MEMORY_ON and [before[-1], token] in (
                before[at : at + 2] for at in range(len(before) - 2)
            )
            return 0.25 if is_known else 1.0

        # Sentences of few words repeat pairs of tokens: what is known is asked of a passage without any.
        task = make(distances=(40, 64), passages=3, passage_tokens=16)
        items = task.items()
        for number, item in enumerate(items):
            for at, tokens in enumerate(item.content.tokens):
                tokens[:] = 300 + 100 * number + 20 * at + np.arange(16)
        scores = {item.name: task.score(item, OracleScorer(knows)) for item in items}
        figures = task.report(scores).figures["read_again"]
        assert {one["mean"] for one in figures["first"]["means"].values()} == {1.0}
        assert list(figures["again"]) == ["40", "64"]
        for distance in ("40", "64"):
            means = {name: one["mean"] for name, one in figures["again"][distance]["means"].items()}
            assert means == {name: 0.25 if name == MEMORY_ON else 1.0 for name in CONDITIONS}
            assert figures["again"][distance]["means"][MEMORY_ON]["num_items"] == 3
            assert figures["again_minus_first"][distance][MEMORY_ON]["mean"] == -0.75

    def test_passages_are_held_out_and_stand_nowhere_in_the_filler(self, tiny_run):
        store = TokenStore.open(tiny_run.data, "validation")
        source = of_stores([store], num_passages=6, passage_tokens=16, filler_tokens=1000)
        halves = [length // 2 for length in VALIDATION_TOKENS]
        assert source.filler.tolist() == [
            token for document, half in enumerate(halves) for token in store.tokens(document, 0, half)
        ]
        # Of the fourth document only 15 tokens are left: no passage. Then second passages of the others.
        expected = [(0, 40), (1, 50), (2, 32), (0, 56), (1, 66), (2, 48)]
        found = [passage.tolist() for passage in source.passages]
        assert found == [store.tokens(document, at, at + 16).tolist() for document, at in expected]
        assert len(of_stores([store], num_passages=1, passage_tokens=16, filler_tokens=50).filler) == 50

    def test_passages_of_several_stores_are_taken_in_turn(self, make, given, tiny_run):
        stores = [TokenStore.open(path, "validation") for path in (tiny_run.data, tiny_run.more)]
        source = of_stores(stores, num_passages=4, passage_tokens=16, filler_tokens=100)
        expected = [(0, 0, 40), (1, 0, 45), (0, 1, 50), (1, 1, 36)]
        found = [passage.tolist() for passage in source.passages]
        assert found == [stores[store].tokens(document, at, at + 16).tolist() for store, document, at in expected]
        firsts = [stores[0].tokens(0, 0, 40), stores[1].tokens(0, 0, 45), stores[0].tokens(1, 0, 15)]
        assert source.filler.tolist() == np.concatenate(firsts).tolist()
        mixed = DataConfig.model_validate({**tiny_run.mixture, "lanes": 1})
        of_run = Given(given.tokenizer, given.config.model_copy(update={"data": mixed}), 128)
        items = make(of_run, distances=(64,), passages=4, passage_tokens=16).items()
        assert [tokens.tolist() for item in items for tokens in item.content.tokens] == found
        items = Perplexity(PerplexityOptions(documents=4, context_tokens=32, scored_tokens=32), of_run).items()
        scored = [one.number for item in items for one in item.content]
        assert len(scored) == 4 and scored[2:] == [4, 5]  # the tiny run's first store has four documents

    def test_sentences_are_made_up_where_the_runs_text_cannot_be_used(self, make, given, tmp_path):
        options = {"distances": (64,), "passages": 2, "passage_tokens": 16}
        assert make(**options).items()[0].content.source.startswith("held-out documents of")
        gone = given.config.model_copy(update={"data": given.config.data.model_copy(update={"path": str(tmp_path)})})
        task = make(Given(given.tokenizer, gone, 128), **options)
        item = task.items()[0]
        assert (
            item.content.source == GENERATED and "from generated sentences" in evaluated(task, OracleScorer())[1].rule
        )
        assert [len(tokens) for tokens in item.content.tokens] == [16, 16] and len(item.content.filler) == 64

    def test_a_store_that_is_named_must_do(self, make, tiny_run, tmp_path):
        options = {"distances": (64,), "passages": 2, "passage_tokens": 16}
        with pytest.raises(DataError):
            make(data=(str(tmp_path),), **options).items()
        with pytest.raises(EvaluationError, match="reads one token store; got: a, b"):
            make(data=("a", "b"), **options).items()
        with pytest.raises(DataError, match=r"too short for passages that are read again; got: .* 0 passages of 64"):
            make(data=(str(tiny_run.data),), distances=(64,), passage_tokens=64).items()

    def test_made_up_text_is_the_same_every_time_and_another_for_another_seed(self, given):
        sizes = {"num_passages": 2, "passage_tokens": 32, "filler_tokens": 500}
        one, same, other = (made_up(given.tokens, seed=seed, **sizes) for seed in (0, 0, 1))
        assert np.array_equal(one.filler, same.filler) and not np.array_equal(one.filler, other.filler)
        assert len(one.filler) == 500 and not np.array_equal(one.passages[0], one.passages[1])

    def test_a_distance_within_the_passage_is_refused(self, make):
        with pytest.raises(EvaluationError, match="shorter than a passage, .*; got: 20 and recall.passage_tokens 32"):
            make(distances=(64, 20), passage_tokens=32).items()
        with pytest.raises(EvaluationError, match="got: 64 and recall.passage_tokens 1;"):
            make(distances=(64,), passage_tokens=1).items()


def test_nothing_to_do_is_refused(make):
    with pytest.raises(EvaluationError, match="recall has nothing to do"):
        make().items()


def test_names_are_of_their_own_and_a_limit_takes_the_first(make):
    options = {
        "lengths": LENGTHS,
        "depths": DEPTHS,
        "keys": 3,
        "distances": (64,),
        "passages": 3,
        "passage_tokens": 16,
    }
    names = [item.name for item in make(**options).items()]
    assert len(set(names)) == len(names) == 5 + 5 + 2
    assert [item.name for item in make(limit=2, **options).items()] == names[:2]
