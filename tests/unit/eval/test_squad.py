"""SQuAD: the official rules on cases by hand, its files, and a scorer that knows the answers."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest

from eval.report import markdown
from eval.runner import EvaluationError
from eval.scorer import BACKBONE, CONDITIONS, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON, OTHER_MEMORY
from eval.squad_file import exact_match, f1, normalised, read_passages
from eval.task import Given
from eval.tasks.squad import Squad, SquadOptions
from pipeline.errors import ConfigError, DataError
from tests.oracle_scorer import OracleScorer
from tests.tiny_config import tiny_config
from tests.tiny_tokenizer import save_tiny_tokenizer

SEGMENT = 16


def paragraph(number, *, questions=2, impossible=1):
    asked: list[dict[str, Any]] = [
        {"id": f"{number}-{one}", "question": f"Who is {one} of {number}?", "answers": [{"text": f"the Man {one}"}]}
        for one in range(questions)
    ]
    for one in range(impossible):
        asked.append({"id": f"{number}-no{one}", "question": "Why?", "answers": [], "is_impossible": True})
    return {"context": f"In {number} the men are many.", "qas": asked}


def article(title, *paragraphs):
    return {"title": title, "paragraphs": list(paragraphs)}


def whole(*articles):
    return {"version": "v2.0", "data": list(articles)}


FILE = whole(article("A", *(paragraph(number) for number in range(5))), article("B", *map(paragraph, range(5, 10))))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), tiny_config(), 10**6)


@pytest.fixture
def make(given, tmp_path):
    """Takes files and options, gives the task."""

    def made(*contents, given=given, **options):
        paths = []
        for number, content in enumerate(contents or (FILE,)):
            path = tmp_path / f"file{number}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
            paths.append(str(path))
        return Squad(SquadOptions(data=tuple(paths), **{"memory_demonstrations": (0,), **options}), given)

    return made


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre and another", "theatre and another"),
        ("U.S.A.", "usa"),
        ("a-b", "ab"),
        ("“quoted”", "“quoted”"),
        ("the", ""),
        ("", ""),
    ],
)
def test_what_is_compared(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("answer", "references", "match", "overlap"),
    [
        ("The Normans.", ["Normans"], 1.0, 1.0),
        ("10th century", ["in the 10th century", "10th and 11th centuries"], 0.0, 0.8),  # 2 of 2 and 2 of 3 words
        ("b b c", ["b c d"], 0.0, 2 / 3),  # b counts once
        ("Paris", ["London", "paris"], 1.0, 1.0),
        ("Paris", ["London"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("the", [], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
        ("x", ["the", "x"], 1.0, 1.0),
        ("", ["the", "x"], 0.0, 0.0),  # an answer of nothing but articles is not compared with
    ],
)
def test_the_official_rules(answer, references, match, overlap):
    assert exact_match(answer, references) == match
    assert f1(answer, references) == pytest.approx(overlap)


def test_files_of_both_versions(tmp_path):
    path = tmp_path / "file.json"
    for content in (FILE, whole(article("A", paragraph(1, impossible=0), {"context": "Unasked.", "qas": []}))):
        path.write_text(json.dumps(content))
        found = read_passages(str(path))
        assert found[0].questions[0].answers == ["the Man 0"] and found[0].title == "A"
        assert len(found) == (10 if content is FILE else 1)
    path.write_text(json.dumps(FILE))
    assert [one.answers for one in read_passages(str(path))[0].questions] == [["the Man 0"], ["the Man 1"], []]


def with_question(**keys):
    return whole(article("A", {"context": "x", "qas": [{"id": "1", "question": "?", "answers": [], **keys}]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a file of SQuAD; got: JSONDecodeError"),
        ({"questions": [], "version": 1}, "format; got: the keys questions, version where data should be"),
        ([1], "got: list where data should be"),
        (whole({"title": "A"}), "got: the keys title where paragraphs should be"),
        (
            whole(article("A", {"text": "x", "qas": [paragraph(1)["qas"][0]]})),
            "the keys text, qas where context should",
        ),
        (whole(article("A", {"context": "x", "qas": [{"id": "1", "question": "?"}]})), "id, question where answers"),
        (with_question(), "question 1 has no answer; got: an empty list.*is_impossible"),
        (with_question(answers=["x"]), "got: str where text should be"),
        (with_question(id=1), "where id should be"),
        (whole(), "is empty; got: no question"),
        (whole(article("A", paragraph(1), paragraph(1))), "questions of the same id; got: 1-0"),
    ],
)
def test_bad_files(make, content, message):
    with pytest.raises(DataError, match=message):
        make(content).items()


def test_a_file_that_is_not_there_or_no_text(make, tmp_path, given):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for name in ("nowhere", "bytes"):
        with pytest.raises(DataError, match="cannot be read"):
            Squad(SquadOptions(data=(str(tmp_path / name),)), given).items()
    with pytest.raises(ConfigError, match="squad reads a file and one of demonstrations"):
        make(FILE, FILE, FILE).items()


def test_demonstrations_are_of_other_passages_than_the_questions(make):
    task = make()
    tested, shown = task._passages
    assert len(tested) == 7 and len(shown) == 3
    assert not {passage.text for _, passage in tested} & {passage.text for passage in shown}
    task = make(FILE, whole(article("C", paragraph(1), paragraph(77))))
    tested, shown = task._passages
    assert len(tested) == 10 and [passage.text for passage in shown] == ["In 77 the men are many."]
    with pytest.raises(EvaluationError, match="are those that are asked about; got: 10 .*, 10 for dem.*, 0 of them"):
        make(FILE, FILE).items()
    with pytest.raises(EvaluationError, match="those that are asked about; got: 0 passages asked about, 1 for"):
        make(whole(article("A", paragraph(1)))).items()


def test_demands_that_cannot_be_met(make, given, caplog):
    with pytest.raises(EvaluationError, match="too few demonstrations; got: 9; expected: 10"):
        make(memory_demonstrations=(7,)).items()
    with pytest.raises(EvaluationError, match="the prompt of question .* is too long; got: .* at most 50"):
        make(given=Given(given.tokenizer, given.config, 50)).items()
    with caplog.at_level(logging.WARNING):
        make(passage="memory").items()
    assert "memory.tokens 32 hold the newest" in caplog.text and "the passages and the oldest" in caplog.text


def test_items(make):
    few, more = make(limit=4, seeds=(1, 2)).items(), make(limit=7, seeds=(1,), memory_demonstrations=(0, 2)).items()
    assert [len(item.content.questions) for item in few] == [3, 1] * 2
    assert [len(item.content.questions) for item in more] == [3, 3, 1] * 2
    assert few[0].name == more[0].name and few[1].name not in {item.name for item in more}
    assert len(make().items()) == 7


def test_questions_without_answer_may_be_left_out(make):
    task = make(unanswerable="left_out")
    assert len([one for item in task.items() for one in item.content.questions]) == 14
    assert all(one.answer for drawn in task._drawn(1) for one in drawn)
    assert "no answer were left out" in scored(task, OracleScorer())[1].rule
    with pytest.raises(EvaluationError, match="no question has an answer"):
        make(whole(article("A", paragraph(1, questions=0), paragraph(2, questions=0))), unanswerable="left_out").items()


def scored(task, scorer):
    scores = {item.name: task.score(item, scorer) for item in task.items()}
    scores = json.loads(json.dumps(scores))
    return scores, task.report(scores)


def means(section, figure, memory=0):
    found = section.figures["by_memory_demonstrations"][str(memory)][figure]["means"]
    return {name: one["mean"] for name, one in found.items()}


def answers(given, said):
    """Writes what is said of a question, then a line of its own."""

    def writes(before, condition):
        question = given.tokenizer.decode(before).rsplit("Question: ", 1)[1].partition("\n")[0]
        return given.tokens(f" {said(question, condition)}\nQuestion: Who")

    return writes


def right(question, condition):
    return f"Man {question.split()[2]}!" if question.startswith("Who") else ""


def test_a_scorer_that_knows_has_all_and_one_that_says_nothing_the_unanswerable(make, given):
    _, section = scored(make(), OracleScorer(writes=answers(given, right)))
    for figure in ("exact match", "F1"):
        assert means(section, figure) == {name: 100.0 for name in (BACKBONE, MEMORY_OFF, MEMORY_ON)}
    _, section = scored(make(), OracleScorer(writes=answers(given, lambda question, condition: "")))
    assert means(section, "exact match")[MEMORY_ON] == pytest.approx(100 / 3)
    kinds = section.figures["by_memory_demonstrations"]["0"]["answerable"]
    assert kinds["yes"]["F1"][MEMORY_ON] == 0.0 and kinds["no"]["F1"][MEMORY_ON] == 100.0
    assert (kinds["yes"]["questions"], kinds["no"]["questions"]) == (14, 7)


def test_a_known_part_is_right_by_condition_and_number_of_demonstrations(make, given):
    """Memory answers all; without it one of three questions has the right words among others."""

    def said(question, condition):
        if condition in (MEMORY_ON, LONGEST_WINDOW) or not question.startswith("Who"):
            return right(question, condition)
        return "Man 0 or 1" if question.startswith("Who is 0") else "nobody"

    scores, section = scored(
        make(memory_demonstrations=(0, 2), seeds=(1, 2)), OracleScorer(writes=answers(given, said))
    )
    assert means(section, "exact match", 2) == {
        name: 100.0 if name in (MEMORY_ON, LONGEST_WINDOW) else pytest.approx(100 / 3) for name in CONDITIONS
    }
    assert means(section, "F1", 2)[BACKBONE] == pytest.approx(100 * (2 * 2 / (2 + 4) + 0 + 1) / 3)
    found = section.figures["by_memory_demonstrations"]["2"]["exact match"]
    assert found["memory_on_minus"][BACKBONE]["mean"] == pytest.approx(200 / 3)
    assert found["means"][BACKBONE]["num_items"] == 21  # questions, not questions and seeds
    assert [plot.name for plot in section.plots] == ["exact-match", "f1"]
    assert section.plots[0].lines["(f) backbone alone, longest window"][1] == [pytest.approx(100 / 3), 100.0]
    assert "answers shuffled" in markdown({}, {"squad": section}) and not section.missing
    assert all(one["forgotten"] == max(0, one["memory_tokens"] - 32) for one in scores.values())


def test_an_answer_ends_with_its_line_the_text_or_enough_tokens(make, given):
    task = make(limit=1, answer_tokens=6)
    end = given.tokenizer.eos_token_id
    cases = [
        (given.tokens(" yes\nno"), "yes"),
        ([*given.tokens(" yes"), end, *given.tokens(" no")], "yes"),
        (given.tokens("\nyes"), ""),
        (given.tokens(" yesyesyesyes"), given.tokenizer.decode(given.tokens(" yesyesyesyes")[:6]).strip()),
    ]
    for tokens, expected in cases:

        def writes(before, condition, tokens=tokens):
            return tokens

        scores, _ = scored(task, OracleScorer(writes=writes))
        assert next(iter(scores.values()))["answers"][MEMORY_ON] == [expected]


@pytest.mark.parametrize("num", [0, 2])
def test_passages_in_memory(make, given, num):
    task = make(passage="memory", memory_demonstrations=(num,), window_demonstrations=2, limit=1)
    ask = task.items()[0].content
    window, further = task._drawn(1)
    lanes = task._lanes(ask, window, further)
    own, other = (given.tokenizer.decode(lane) for lane in lanes)
    assert {len(lane) % SEGMENT for lane in lanes} == {0} and len(lanes[0]) == len(lanes[1]) > 0
    assert f"Passage: {ask.passage.text}\n" in own and ask.passage.text not in other
    titles = {passage.text: passage.title for _, passage in task._passages[0]}
    (seen,) = (text for text in titles if f"Passage: {text}\n" in other and text not in own)
    assert titles[seen] != ask.passage.title
    after = own.split(f"Passage: {ask.passage.text}\n")[1]
    assert after.count("Question:") == num and after.count("Passage:") == num + 2
    assert after.endswith(f"Passage: {window[1].passage.text}\n")
    prompts = []

    def writes(before, condition):
        prompts.append(before)
        return []

    scorer = OracleScorer(writes=writes)
    scored(task, scorer)
    row = given.tokenizer.decode(prompts[0][-(len(prompts[0]) - len(lanes[0])) :])
    assert row.count("Question:") == 3 and "Passage:" not in row and row.endswith("Answer:")
    assert scorer.num_remembered == 1


def test_demonstrations_in_memory_with_passages_in_the_window(make, given):
    task = make(memory_demonstrations=(3,), limit=4)
    items = task.items()
    window, further = task._drawn(1)
    own, shuffled = task._lanes(items[0].content, window, further)
    assert len(own) == len(shuffled) and len(own) % SEGMENT == 0
    texts = [given.tokenizer.decode(lane).rsplit("Passage: ", 3)[1:] for lane in (own, shuffled)]
    assert [one.partition("Answer:")[0] for one in texts[0]] == [one.partition("Answer:")[0] for one in texts[1]]
    assert sorted(one.partition("Answer:")[2] for one in texts[0]) == sorted(
        one.partition("Answer:")[2] for one in texts[1]
    )
    scorer = OracleScorer(writes=lambda before, condition: [])
    scores, section = scored(task, scorer)
    assert scorer.num_remembered == 1 and len(scores) == 2
    assert set(next(iter(scores.values()))["answers"]) == set(CONDITIONS)
    assert "(d) memory of the same demonstrations with their answers shuffled" in str(section.tables[0].rows)
    assert OTHER_MEMORY in means(section, "F1", 3)


def test_no_demonstration_is_in_the_window_and_in_memory(make):
    window, further = make()._drawn(1)
    assert len(window) == 3 and not {one.question.id for one in window} & {one.question.id for one in further}
    assert [one.question.id for one in make()._drawn(2)[0]] != [one.question.id for one in window]
    assert np.all([one.answer == "" for one in further if not one.question.answers])
