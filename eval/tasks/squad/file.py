"""SQuAD, versions 1.1 and 2.0: its files, and how an answer is scored.

Source: https://arxiv.org/abs/1606.05250, https://arxiv.org/abs/1806.03822; the rules are those of the official
evaluation script of 2.0, which are those of 1.1 wherever a question has an answer.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, in_a_line

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Question:
    """A question on a passage.

    Attributes:
        id: Its id.
        text: The question.
        answers: The right ones; none if it cannot be answered.
    """

    id: str
    text: str
    answers: Sequence[str]


@dataclass(frozen=True)
class Passage:
    """A passage.

    Attributes:
        title: Of its article.
        text: The passage.
        questions: On it.
    """

    title: str
    text: str
    questions: Sequence[Question]


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, without ASCII punctuation and articles, one space between words."""
    bare = answer.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if an answer is one of the right ones, else 0."""
    return max(float(normalised(answer) == normalised(one)) for one in _compared(references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, with the right answer where it is highest."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in _compared(references))


def _compared(references: Sequence[str]) -> Sequence[str]:
    """An unanswerable question is rightly answered with nothing."""
    return [one for one in references if normalised(one)] or [""]


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    same = (Counter(said) & Counter(right)).total()
    return 2 * same / (len(said) + len(right))


def read_passages(path: str) -> list[Passage]:
    """Reads a file of SQuAD.

    Args:
        path: The file.

    Returns:
        Its passages that have questions.

    Raises:
        DataError: It cannot be read, is of another format, or has no question.
    """
    try:
        whole = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as a file of SQuAD", got=in_a_line(error), expected="JSON in UTF-8"
        ) from error
    passages = []
    for article in _list(whole, "data", path):
        title = _text(article, "title", path) if isinstance(article, Mapping) and "title" in article else ""
        for paragraph in _list(article, "paragraphs", path):
            asked = [_question(one, path) for one in _list(paragraph, "qas", path)]
            if asked:
                passages.append(Passage(title, _text(paragraph, "context", path), asked))
    if not passages:
        raise DataError(f"{path} is empty", got="no question", expected="at least one", do="name another file")
    ids = Counter(one.id for passage in passages for one in passage.questions)
    repeated = [one for one, count in ids.items() if count > 1]
    if repeated:
        raise DataError(f"{path} has questions of the same id", got=", ".join(repeated[:3])[:200])
    return passages


def answerable(passages: Sequence[Passage]) -> list[Passage]:
    """Passages without the questions that have no answer; those without any other are left out."""
    kept = [replace(one, questions=[asked for asked in one.questions if asked.answers]) for one in passages]
    return [one for one in kept if one.questions]


def of_articles(passages: Sequence[Passage], titles: Iterable[str]) -> list[Passage]:
    """The passages of some articles, by their titles. Raises DataError: there is no such article."""
    wanted, there = set(titles), {one.title for one in passages}
    if unknown := sorted(wanted - there):
        raise DataError(
            f"there is no article {unknown[0][:80]!r}",
            got=f"{len(there)} articles, such as {', '.join(sorted(there)[:5])}"[:300],
            do="give titles as the file has them",
        )
    return [one for one in passages if one.title in wanted]


def without_articles(passages: Sequence[Passage], titles: Iterable[str]) -> list[Passage]:
    """The passages of all other articles. Raises DataError: there is no article of such a title."""
    left_out = {one.title for one in of_articles(passages, titles)}
    return [one for one in passages if one.title not in left_out]


def _question(one: Any, path: str) -> Question:
    found = Question(
        _text(one, "id", path),
        _text(one, "question", path).strip(),
        [_text(answer, "text", path) for answer in _list(one, "answers", path)],
    )
    if one.get("is_impossible", False):
        return Question(found.id, found.text, [])
    if not found.answers:
        raise DataError(
            f"{path}: question {found.id[:80]} has no answer",
            got="an empty list of answers",
            expected='an answer, or "is_impossible": true, as in version 2.0',
        )
    return found


def _list(value: Any, key: str, path: str) -> list[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, list):
        raise _foreign(value, key, path)
    return found


def _text(value: Any, key: str, path: str) -> str:
    found = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(found, str):
        raise _foreign(value, key, path)
    return found


def _foreign(value: Any, key: str, path: str) -> DataError:
    keys = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
    return DataError(
        f"{path} is not of SQuAD's format",
        got=f"{keys} where {key} should be"[:300],
        expected="data: [{paragraphs: [{context, qas: [{id, question, answers: [{text}]}]}]}]",
        do="give a JSON file of version 1.1 or 2.0",
    )
