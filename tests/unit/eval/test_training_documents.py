"""Documents of demonstrations: as evaluation writes them, without what it asks about."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from eval.demonstrations import Draw, Pool
from eval.labelled import FORMS, Example, as_compared, as_compared_over_sets, sets_in
from eval.options import take_options
from eval.relabelled import relabelled, symbols
from eval.runner import EvaluationError
from eval.task import Given
from eval.tasks.in_context.task import InContext, InContextOptions
from eval.tasks.squad.file import read_passages
from eval.tasks.squad.form import demonstrations_of
from eval.tasks.squad.task import Squad, SquadOptions
from eval.training_documents import (
    TRAIN,
    VALIDATION,
    Answered,
    Labelled,
    Source,
    Wanted,
    documents,
    is_one_of,
)
from eval.training_sources import labelled_sources, squad_sources
from pipeline.errors import DataError
from tests.labelled_files import write_set
from tests.squad_files import ship, write_squad
from tests.tiny_config import tiny_config
from tests.tiny_tokenizer import save_tiny_tokenizer

EXAMPLES = [Example(f"film {number}", number % 2) for number in range(40)]
NO_LIMIT = 10**6
WANTED = Wanted(documents=4, validation_documents=2, document_tokens=200, seed=3)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), tiny_config(), 10**6)


@pytest.fixture
def ships(tmp_path):
    """A file of two articles of three passages."""
    articles = {"Old": [ship(number) for number in range(3)], "New": [ship(number) for number in range(3, 6)]}
    return write_squad(tmp_path / "squad.json", **articles)


def text_of(given, shown):
    return given.tokenizer.decode(shown.tokens)


def test_a_document_by_hand(given):
    """The first one drawn comes last; nothing but a space is between them, and before the first."""
    three = [Example("so dull", 0), Example("a joy", 1), Example("not bad", 1)]
    assert np.random.default_rng([0]).permutation(3).tolist() == [2, 0, 1]
    shown = Labelled("MR", FORMS["MR"], three).document(given.tokens, 0, seed=[0], room=NO_LIMIT)
    assert text_of(given, shown) == (
        " Review: a joy Sentiment: positive. Review: so dull Sentiment: negative. Review: not bad Sentiment: positive."
    )
    assert (shown.about, shown.num_shown) == ("MR", 3)


def test_a_document_is_what_evaluation_has_in_memory_and_then_in_the_window(given):
    drawn = Draw(given, Pool(FORMS["Subj"], EXAMPLES, frozenset(), 0, 0), None, seed=5, num_window=4)
    shown = Labelled("Subj", FORMS["Subj"], EXAMPLES).document(given.tokens, 0, seed=[5], room=NO_LIMIT)
    read = [*drawn.memory(20).lanes[0], *drawn.window(4)]
    assert shown.num_shown == 40 and shown.tokens[-len(read) :] == read


def test_the_next_demonstration_is_written_as_what_is_asked(given, tmp_path):
    write_set(tmp_path, "MR", EXAMPLES, [("a new film", 1)])
    options = InContextOptions(data=(str(tmp_path),), sets=("MR",), memory_demonstrations=(0,))
    (question,) = InContext(options, given)._questions["MR"]
    both = [Example("a new film", 1), Example("an old one", 0)]
    seed = next([n] for n in range(9) if np.random.default_rng([n]).permutation(2)[0] == 0)
    shown = Labelled("MR", FORMS["MR"], both).document(given.tokens, 0, seed=seed, room=NO_LIMIT)
    asked = [*question.asked[question.gold], *given.tokens(".")]
    assert shown.tokens[-len(asked) :] == asked


def test_questions_are_what_evaluation_has_in_memory_and_then_in_the_window(given, ships):
    task = Squad(SquadOptions(data=(ships,), memory_demonstrations=(0,), window_demonstrations=1), given)
    window, further = task._drawn(1)
    ask = task.items()[0].content
    memory, _ = task._lanes(type(ask)(1, len(further), ask.passage, []), window, further)
    read = [*memory, *task._form.shown(window[0])]
    shown = Answered(task._demonstrations).document(given.tokens, 0, seed=[1], room=NO_LIMIT)
    assert len(memory) and (read[-len(shown.tokens) :] == shown.tokens)


def test_passages_and_questions_by_hand(given, tmp_path):
    path = write_squad(tmp_path / "one.json", Ships=[ship(1), ship(2)])
    answered = demonstrations_of(read_passages(path))
    assert np.random.default_rng([0]).permutation(4).tolist() == [2, 0, 1, 3]
    (why_2, why_1) = ("Question: Why?\nAnswer:\n\n",) * 2
    (which_1, which_2) = (f"Question: Which ship is {one}?\nAnswer: Ship {one}\n\n" for one in (1, 2))
    (ship_1, ship_2) = (f"Passage: Ship {one} is red.\n" for one in (1, 2))
    plain, first = (
        Answered(answered, passages_first).document(given.tokens, 0, seed=[0], room=NO_LIMIT)
        for passages_first in (0.0, 1.0)
    )
    assert text_of(given, plain) == ship_2 + why_2 + ship_1 + why_1 + ship_1 + which_1 + ship_2 + which_2
    after = why_2 + why_1 + which_1 + which_2
    assert text_of(given, first) in (ship_1 + ship_2 + after, ship_2 + ship_1 + after)
    assert (plain.about, first.about, first.num_shown) == ("SQuAD", "SQuAD, passages first", 4)


@pytest.mark.parametrize("passages_first", [0.0, 1.0])
def test_as_many_whole_demonstrations_as_have_room(given, ships, passages_first):
    sources: list[Source] = [
        Answered(demonstrations_of(read_passages(ships)), passages_first),
        Labelled("MR", FORMS["MR"], EXAMPLES),
    ]
    for source in sources:
        room = len(source.document(given.tokens, 0, seed=[2], room=150).tokens)
        counts = [source.document(given.tokens, 0, seed=[2], room=at).num_shown for at in (room - 1, room, 150)]
        assert room <= 150 and counts[1] == counts[2] == counts[0] + 1
        assert source.document(given.tokens, 0, seed=[2], room=NO_LIMIT).num_shown == source.size


def words_by_label(given, tokens, prompt):
    """What a document calls the labels of `EXAMPLES`, by their numbers."""
    found = defaultdict(set)
    for number, word in re.findall(prompt.format(r"film (\d+)") + r" (\w+)\.", given.tokenizer.decode(tokens)):
        found[int(number) % 2].add(word)
    return found


def test_relabelled_documents_are_of_one_mind(given):
    form = FORMS["MR"]
    source = Labelled("MR", form, EXAMPLES, relabel=0.5)
    kinds = []
    for number in range(12):
        shown = source.document(given.tokens, number, seed=[number], room=NO_LIMIT)
        found = words_by_label(given, shown.tokens, form.prompt)
        assert len(found[0]) == len(found[1]) == 1 and found[0] != found[1]
        (no,), (yes,) = found[0], found[1]
        kinds.append(shown.about)
        if number % 2 == 0:
            assert (no, yes) == form.labels and shown.about == "MR"
        elif number % 4 == 1:
            assert (no, yes) == form.labels[::-1] and shown.about == "MR, labels permuted: positive, negative"
        else:
            assert not {no, yes} & {one for each in FORMS.values() for one in each.labels}
            assert shown.about == f"MR, labels symbols: {no}, {yes}"
    assert len(set(kinds)) == 5  # as they are, changed places, three pairs of symbols


@pytest.mark.parametrize("name", FORMS)
def test_other_words_for_labels(name):
    form = FORMS[name]
    for seed in range(50):
        permuted, others = (relabelled(form, kind, seed).labels for kind in ("permuted", "symbols"))
        assert sorted(permuted) == sorted(form.labels) and permuted != form.labels
        assert len(set(others)) == len(form.labels) and any(set(others) <= set(kind) for kind in symbols())
        assert relabelled(form, "symbols", seed).labels == others


def test_no_symbol_is_a_label():
    """One syllable would be: bad."""
    numbers, nouns, syllables = symbols()
    assert (numbers[0], numbers[-1], len(numbers)) == ("0", "999", 1000) and "captain" in nouns
    assert "baf" in syllables and "bad" not in syllables and len(syllables) == 14 * 5 * 14 - 1


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 1), (0.25, 2), (0.5, 5), (0.7, 7), (1.0, 10)])
def test_a_share_of_ten_is_spread_evenly(share, expected):
    chosen = [is_one_of(number, share) for number in range(10)]
    assert sum(chosen) == expected and sum(chosen[:5]) in (expected // 2, -(-expected // 2))


@pytest.fixture
def data(tmp_path):
    """MR has test items of its own and of two other sets among its demonstrations, in other writing too."""
    known = [("A  good FILM .", 1), ("it is n't -lrb- that -rrb- caf\u00e9 .", 0), ("no , thanks", 0)]
    write_set(tmp_path, "MR", [*EXAMPLES, *known], [("a good film .", 1)])
    write_set(
        tmp_path, "Subj", [*EXAMPLES[:20], ("a good film.", 1), ("me too", 1)], [("it isn't (that) caf\u0439.", 0)]
    )
    write_set(tmp_path, "SST-5", [(f"me {number}", 1) for number in range(30)], [("No, thanks", 0), ("me, 29", 0)])
    return [str(tmp_path)]


def sentences(source):
    return {one.text for one in source.examples}


def test_no_test_item_of_any_set_is_in_any_document(given, data, caplog):
    with caplog.at_level(logging.INFO):
        sources = labelled_sources(data, ["MR", "Subj"], held_out=0.2, seed=1)
    assert "MR: 1 demonstrations are test items" in caplog.text
    assert "MR: 2 more are test items of other sets, or in other writing, and were left out" in caplog.text
    left = [sentences(one) | sentences(two) for one, two in zip(sources[TRAIN], sources[VALIDATION], strict=True)]
    assert left == [{one.text for one in EXAMPLES}, {"me too", *(one.text for one in EXAMPLES[:20])}]
    tested = {"a good film .", "it isn't (that) caf\u0439.", "no, thanks", "me, 29"}
    texts = [
        given.tokenizer.decode(one.tokens)
        for split, of_split in sources.items()
        for one in documents(given.tokens, of_split, WANTED, split)
    ]
    shown = [one for text in texts for one in re.findall(r"(?:Review|Input): (.*?) (?:Sentiment|Type):", text)]
    assert len(texts) == 12 and len(shown) > 60
    assert not {as_compared(one) for one in shown} & {as_compared(one) for one in tested}
    assert not {as_compared_over_sets(one) for one in shown} & {as_compared_over_sets(one) for one in tested}


def test_what_is_held_out_is_so_of_all_sets(data):
    sources = labelled_sources(data, ["MR", "Subj"], held_out=0.2, seed=1)
    train, held_out = (set().union(*map(sentences, sources[split])) for split in (TRAIN, VALIDATION))
    assert not train & held_out and len(held_out) == 9  # a fifth of 41, rounded up
    other = labelled_sources(data, ["MR", "Subj"], held_out=0.2, seed=2)
    assert set().union(*map(sentences, other[VALIDATION])) != held_out
    assert list(labelled_sources(data, ["MR"], held_out=0.0, seed=1)) == [TRAIN]


def test_sets_in_data(data):
    assert sets_in(data) == ["MR", "Subj", "SST-5"]
    assert sets_in(["MPQA=someone/mpqa", *data]) == ["MR", "Subj", "SST-5", "MPQA"]
    assert sets_in(["hub"]) == list(FORMS) and sets_in(["nowhere"]) == []


def test_the_same_seed_gives_the_same_documents_and_another_one_others(given, data, ships):
    def made(seed):
        parts: list[Mapping[str, Sequence[Source]]] = [
            labelled_sources(data, ["MR", "Subj"], held_out=0.2, seed=seed, relabel=0.5),
            squad_sources(ships, tested=None, articles=["Old"], held_out=0.4, seed=seed, passages_first=0.5),
        ]
        wanted = replace(WANTED, seed=seed)
        return {
            split: list(documents(given.tokens, [one for part in parts for one in part[split]], wanted, split))
            for split in wanted.counts
        }

    one, again, other = made(1), made(1), made(2)
    assert one == again and {split: len(found) for split, found in one.items()} == {TRAIN: 12, VALIDATION: 6}
    for split in one:
        of_mr = [
            {tuple(found.tokens) for found in each[split] if found.source.startswith("MR")} for each in (one, other)
        ]
        assert [len(each) for each in of_mr] == [WANTED.counts[split]] * 2 and not of_mr[0] & of_mr[1]
    assert [found.source.partition(",")[0] for found in one[VALIDATION]][:2] == [
        "MR; validation 0",
        "Subj; validation 0",
    ]
    assert one[TRAIN][5].source == "SQuAD, passages first; train 1"
    assert all(len(found.tokens) < WANTED.document_tokens for found in one[TRAIN])


def test_articles_that_evaluation_asks_about_are_not_taken(tmp_path, ships):
    def texts(**options):
        (source,) = squad_sources(ships, **{"tested": None, "articles": [], "held_out": 0.0, "seed": 1, **options})[
            TRAIN
        ]
        return {one.passage.text for one in source.demonstrations}

    assert texts(articles=["New"]) == {f"Ship {number} is red." for number in (3, 4, 5)}
    shouted = {**ship(4), "context": "SHIP 4  is red."}
    other = write_squad(tmp_path / "other.json", Old=[ship(77)], Other=[shouted])
    assert texts(tested=other) == {"Ship 3 is red.", "Ship 5 is red."}
    with pytest.raises(EvaluationError, match="no passage of .* is left to train on; got: 3 passages of 1 articles"):
        texts(tested=other, articles=["Old"])
    with pytest.raises(DataError, match="there is no article 'Newer'; got: 2 articles, such as New, Old"):
        texts(articles=["New", "Newer"])
    unanswerable = {"context": "x", "qas": ship(1)["qas"][1:]}
    bare = write_squad(tmp_path / "bare.json", Bare=[unanswerable], Other=[ship(2)])
    with pytest.raises(EvaluationError, match="all of which evaluation asks about, or without an answer"):
        squad_sources(bare, tested=None, articles=["Bare"], held_out=0.0, seed=1, with_unanswerable=False)


def test_evaluation_leaves_out_the_articles_that_were_trained_on(given, ships):
    (source,) = squad_sources(ships, tested=None, articles=["New"], held_out=0.0, seed=1)[TRAIN]
    words = ["--squad.leave_out", "New", "--squad.memory_demonstrations", "0"]
    options, _ = take_options([Squad], words, data=[ships], limit=None)
    task = Squad(cast(SquadOptions, options["squad"]), given)
    tested, shown = task._passages
    asked = {passage.text for _, passage in tested} | {passage.text for passage in shown}
    assert len(asked) == 3 and not asked & {one.passage.text for one in source.demonstrations}
    with pytest.raises(DataError, match="there is no article 'new'"):
        Squad(SquadOptions(data=(ships,), leave_out=("new",)), given).items()
    with pytest.raises(EvaluationError, match="no article is left to ask about; got: --squad.leave_out New, Old"):
        Squad(SquadOptions(data=(ships,), leave_out=("New", "Old")), given).items()
    both = Squad(SquadOptions(data=(ships, ships), leave_out=("New",)), given)
    with pytest.raises(EvaluationError, match="3 passages asked about, 3 for demonstrations, 0 of them others"):
        both.items()


def test_a_split_without_sentences_is_said_in_words(given, data, tmp_path):
    splits = labelled_sources(data, ["MR"], held_out=1e-12, seed=1)
    with pytest.raises(EvaluationError, match="too few demonstrations; got: 0 of the 0 for validation"):
        list(documents(given.tokens, splits[VALIDATION], WANTED, VALIDATION))
    write_set(tmp_path / "all", "MR", EXAMPLES[:5], [("a film", 1)])
    write_set(tmp_path / "all", "Subj", [("you", 1)], EXAMPLES[:5])
    with pytest.raises(EvaluationError, match="nothing is left of MR to train on; got: 5 sentences, all of them test"):
        labelled_sources([str(tmp_path / "all")], ["MR"], held_out=0.2, seed=1)


def test_documents_that_cannot_be_made(given, caplog):
    def made(examples, split=TRAIN, tokens=200):
        source = Labelled("MR", FORMS["MR"], examples)
        return list(documents(given.tokens, [source], Wanted(1, 1, tokens, 1), split))

    with pytest.raises(
        EvaluationError, match="of MR would have too few demonstrations; got: 1 of the 40 for train in 40"
    ):
        made(EXAMPLES, tokens=40)
    with pytest.raises(EvaluationError, match="got: 0 of the 0 for validation .*; do: change --validation-share"):
        made([], VALIDATION)
    assert len(made(EXAMPLES)) == 1 and not caplog.records
    source = Labelled("MR", FORMS["MR"], EXAMPLES[:3])
    list(documents(given.tokens, [source], WANTED, TRAIN))
    assert caplog.text.count("MR: all 3 demonstrations for train make a document of") == 1
