"""How passages, questions and answers of SQuAD are written, in windows, in memory and in documents to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from eval.demonstrations import Tokenize
from eval.tasks.squad.file import Passage, Question


class Demonstration(NamedTuple):
    """A question with its passage and an answer."""

    passage: Passage
    question: Question
    answer: str


def demonstrations_of(passages: Sequence[Passage]) -> list[Demonstration]:
    """All questions of passages, each with its first answer, or none if it cannot be answered."""
    return [
        Demonstration(passage, question, question.answers[0] if question.answers else "")
        for passage in passages
        for question in passage.questions
    ]


@dataclass(frozen=True)
class Form:
    """Tokens of the pieces of a text, which follow each other with nothing between them.

    Attributes:
        tokenize: The tokenizer.
    """

    tokenize: Tokenize

    def shown(self, one: Demonstration, *, with_passage: bool = True) -> list[int]:
        """A demonstration."""
        passage = self.passage(one.passage) if with_passage else []
        answer = f" {one.answer}" if one.answer else ""
        return [*passage, *self.asked(one.question), *self.tokenize(f"{answer}\n\n")]

    def passage(self, passage: Passage) -> list[int]:
        """A passage."""
        return self.tokenize(f"Passage: {passage.text.strip()}\n")

    def asked(self, question: Question) -> list[int]:
        """A question, up to its answer."""
        return self.tokenize(f"Question: {question.text}\nAnswer:")
