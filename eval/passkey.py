"""Passkey texts: a number hidden in a lot of irrelevant text, and asked for at the end.

Source: Mohtashami and Jaggi, Landmark Attention, https://arxiv.org/abs/2305.16300: the five lines of its prompt, the
range of the number, and its rule, the first integer in ten tokens. There the irrelevant text is cut by letters, here by
tokens, so that a text is exactly as long as was asked for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.runner import EvaluationError
from eval.scorer import Tokens

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 50_000
MAX_TOKENS = 10
_INTEGER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Passkey:
    """A text that ends with the question.

    Attributes:
        name: `LENGTH/DEPTH/TRIAL`.
        depth: Which part of the irrelevant text stands before the key, 0 to 1.
        key: The number.
        tokens: The text, int64 `[length]`.
        line: Places of the first token of the line that says the key, and of the one behind it.
        answer: Tokens of the right answer and of a full stop.
    """

    name: str
    depth: float
    key: int
    tokens: Tokens
    line: tuple[int, int]
    answer: Sequence[int]


class PasskeyMaker:
    """Makes the texts of one tokenizer.

    Args:
        tokenize: A text's tokens, without special ones. Lines are tokenized one by one.
    """

    def __init__(self, tokenize: Callable[[str], list[int]]) -> None:
        self._tokenize = tokenize
        self._garbage: list[int] = []

    def make(self, name: str, *, length: int, depth: float, key: int) -> Passkey:
        """Makes a text.

        Args:
            name: As in `Passkey`.
            length: Its tokens.
            depth: As in `Passkey`.
            key: As in `Passkey`.

        Returns:
            The text.

        Raises:
            EvaluationError: The lines that must be there have more tokens than that.
        """
        task = self._tokenize(TASK + "\n")
        line = self._tokenize("\n" + KEY_LINE.format(key=key) + "\n")
        question = self._tokenize("\n" + QUESTION)
        answered = self._tokenize("\n" + QUESTION + f" {key}.")
        num_garbage = length - len(task) - len(line) - len(question)
        if num_garbage < 0:
            raise EvaluationError(
                "recall.lengths has a length too short for a passkey",
                got=length,
                expected=f"{length - num_garbage} tokens or more",
                do="raise it",
            )
        before = round(depth * num_garbage)
        head = task + self._cut(before)
        text = head + line + self._cut(num_garbage - before) + question
        return Passkey(name, depth, key, np.array(text), (len(head), len(head) + len(line)), answered[len(question) :])

    def _cut(self, num_tokens: int) -> list[int]:
        """The irrelevant text from its beginning, so many tokens of it."""
        times = 1
        while len(self._garbage) < num_tokens:
            times = max(2 * times, num_tokens // 16)
            self._garbage = self._tokenize(" ".join([GARBAGE] * times))
        return self._garbage[:num_tokens]


def keys(count: int, *, seed: str) -> list[int]:
    """Different keys, uniform in 1 to 50,000. Raises EvaluationError: there are not so many."""
    if count > LARGEST_KEY:
        raise EvaluationError(
            "recall has more texts of a length than there are keys",
            got=count,
            expected=f"at most {LARGEST_KEY:,}",
            do="lower recall.keys",
        )
    return random.Random(seed).sample(range(1, LARGEST_KEY + 1), count)


def first_integer(text: str) -> int | None:
    """The first integer in a text; None: there is none."""
    found = _INTEGER.search(text)
    return None if found is None else int(found.group())


def is_decided(text: str, key: int, *, num_left: int = MAX_TOKENS, digits_a_token: int = LARGEST_KEY) -> bool:
    """Whether nothing that is written after a text can change whether its first integer is the key.

    Args:
        text: What was written.
        key: The key.
        num_left: Tokens that may still be written.
        digits_a_token: The most digits that a token has.

    Returns:
        Whether the answer is known: another integer, an end of the integer, or no room for what is missing of the key.
    """
    found, digits = _INTEGER.search(text), str(key)
    said = found.group().lstrip("0") if found else ""
    if found and (found.end() < len(text) or not digits.startswith(said)):
        return True
    return said != digits and num_left * digits_a_token < len(digits) - len(said)


def most_digits(vocabulary: Iterable[str]) -> int:
    """The most digits in a row that a token of a vocabulary has, at least 1."""
    return max((len(run) for token in vocabulary for run in _INTEGER.findall(token)), default=1)
