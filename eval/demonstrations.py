"""Demonstrations of in-context learning: which may be shown, and those of one draw, in the window and in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, Field

from eval.labelled import Example, Form, LabelledSet, as_compared
from eval.runner import EvaluationError
from eval.scorer import Tokens
from eval.task import Given

logger = logging.getLogger(__name__)
Numbers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=10**6)], ...],
    Field(min_length=1),
    AfterValidator(lambda numbers: tuple(sorted(set(numbers)))),
]
"""An option of several numbers: each counts once, the smallest first."""
Tokenize = Callable[[str], list[int]]
"""Gives a text's tokens, without special ones."""
AnyOne = TypeVar("AnyOne")


@dataclass(frozen=True)
class Pool:
    """What demonstrations of a set are drawn from: no sentence twice, and none that is a test item.

    Attributes:
        form: How the set is asked.
        examples: The demonstrations.
        tested: The test items, as they are compared.
        num_repeated: How many were left out because they are there already.
        num_tested: How many were left out because they are test items.
    """

    form: Form
    examples: Sequence[Example]
    tested: frozenset[str]
    num_repeated: int
    num_tested: int


def pool_of(labelled: LabelledSet, *, refuse: bool) -> Pool:
    """The demonstrations of a set; of sentences that are there twice the first.

    Args:
        labelled: The set.
        refuse: Whether a test item among the demonstrations is an error; otherwise it is left out, with a warning.

    Returns:
        The demonstrations.

    Raises:
        EvaluationError: A test item is among them and may not be, or nothing but test items.
    """
    tested = frozenset(as_compared(one.text) for one in labelled.test)
    unique: dict[str, Example] = {}
    for one in labelled.train:
        unique.setdefault(as_compared(one.text), one)
    left = [one for text, one in unique.items() if text not in tested]
    also = [one.text for text, one in unique.items() if text in tested]
    if also and (refuse or not left):
        raise EvaluationError(
            f"test items of {labelled.name} are among its demonstrations",
            got=f"{len(also)} of {len(unique)}, such as {also[0][:80]!r}",
            do="leave them out with --in_context.overlap skip" if left else "name other data: nothing would be left",
        )
    if also:
        logger.warning("%s: %d demonstrations are test items, too, and were left out", labelled.name, len(also))
    return Pool(labelled.form, left, tested, len(labelled.train) - len(unique), len(also))


def in_order(examples: Sequence[AnyOne], seed: int | Sequence[int]) -> list[AnyOne]:
    """Examples in the order in which a seed draws them; in a text the first one drawn comes last."""
    return [examples[number] for number in np.random.default_rng(seed).permutation(len(examples))]


def demonstration(tokenize: Tokenize, form: Form, example: Example) -> list[int]:
    """A demonstration's tokens; those of several follow each other with nothing between them."""
    return tokenize(f" {form.demonstration(example)}")


@dataclass(frozen=True)
class Memory:
    """Demonstrations as memory reads them.

    Attributes:
        lanes: The demonstrations; the same with their labels shuffled among them; those of another set, if there is
            one. int64, of the same whole segments.
        sizes: Tokens of each demonstration, the last one first.
    """

    lanes: Sequence[Tokens]
    sizes: Sequence[int]

    def num_fitting(self, room: int) -> int:
        """How many demonstrations so many tokens hold, from the last one back."""
        return int((np.cumsum(self.sizes) <= room).sum())


class Draw:
    """Demonstrations in the order of one seed: the first ones are the window's, those after them memory's.

    So fewer are always among more, and none is in both.

    Args:
        given: Tokenizer and settings.
        pool: What is drawn from.
        other: What memory of another set is drawn from; None: there is none.
        seed: The seed.
        num_window: Demonstrations kept for the window.
    """

    def __init__(self, given: Given, pool: Pool, other: Pool | None, *, seed: int, num_window: int) -> None:
        self._given, self._pool, self._other, self._seed = given, pool, other, seed
        order = in_order(pool.examples, seed)
        self._window, self._memory = order[:num_window], order[num_window:]

    def window(self, num: int) -> Tokens:
        """Tokens of so many demonstrations, int64 `[any]`."""
        return text_of(self._tokens(self._pool.form, one) for one in reversed(self._window[:num]))

    def memory(self, num: int) -> Memory:
        """So many demonstrations, the last of which are the first drawn.

        They are rounded up to whole segments: what comes before them are more of the draw, the first one cut.
        """
        segment, form = self._given.config.train.segment_tokens, self._pool.form
        pieces = [self._tokens(form, one) for one in self._memory[:num]]
        total = sum(map(len, pieces))
        wanted = -(-total // segment) * segment
        for one in self._memory[num:]:
            if total >= wanted:
                break
            pieces.append(self._tokens(form, one))
            total += len(pieces[-1])
        length = min(wanted, total // segment * segment)
        shown = self._memory[: len(pieces)]
        labels = np.random.default_rng((self._seed, 1)).permutation([one.label for one in shown])
        shuffled = [self._tokens(form, one._replace(label=label)) for one, label in zip(shown, labels, strict=True)]
        lanes = [text_of(reversed(pieces)), text_of(reversed(shuffled))]
        if self._other is not None:
            lanes.append(self._foreign(length))
        return Memory([lane[len(lane) - length :] for lane in lanes], [len(piece) for piece in pieces])

    def _tokens(self, form: Form, example: Example) -> list[int]:
        return demonstration(self._given.tokens, form, example)

    def _foreign(self, length: int) -> Tokens:
        """Demonstrations of the other set, none a test item of this one; again from the first if they are too few."""
        assert self._other is not None
        allowed = [one for one in self._other.examples if as_compared(one.text) not in self._pool.tested]
        pieces: list[list[int]] = []
        total = 0
        for number in cycle(np.random.default_rng((self._seed, 2)).permutation(len(allowed))):
            if total >= length:
                break
            pieces.append(self._tokens(self._other.form, allowed[number]))
            total += len(pieces[-1])
        return text_of(pieces)


def text_of(pieces: Iterable[Sequence[int]]) -> Tokens:
    """Pieces of a text as one, int64 `[any]`."""
    return np.array([token for piece in pieces for token in piece], dtype=np.int64)


def within_reach(given: Given, lanes: Iterable[Tokens]) -> list[Tokens]:
    """The ends of texts that are to be remembered, as far back as anything sees them.

    What is beyond memory, the left context of its first segment, and the longest window, changes nothing.
    """
    segment = given.config.train.segment_tokens
    reach = max(memory_tokens(given) + given.config.backbone.context_tokens, given.longest)
    read = -(-reach // segment) * segment
    return [lane[max(0, len(lane) - read) :] for lane in lanes]


def memory_tokens(given: Given) -> int:
    """How many tokens memory has room for; 0 without memory."""
    memory = given.config.memory
    return memory.tokens if memory.enabled else 0
