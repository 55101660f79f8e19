"""In-context learning: labels of sentences, from a few demonstrations in the window and many more in memory.

Source: https://arxiv.org/abs/2306.07174, section 3.4.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field

from eval.demonstrations import Draw, Memory, Numbers, Pool, memory_tokens, pool_of, within_reach
from eval.labelled import FORMS, LabelledSet, known_sets, read_set
from eval.report import Section
from eval.runner import EvaluationError
from eval.scorer import BACKBONE, MEMORY_OFF, MEMORY_ON, OTHER_MEMORY, Row, Scorer, Tokens
from eval.task import Given, Item, Scores, Task, TaskOptions
from eval.tasks.in_context.report import SHUFFLED, in_context_section

logger = logging.getLogger(__name__)
AT_ONCE = 64
"""Test items of an item."""
OWN, WITH_SHUFFLED_LABELS, OTHER_SET = range(3)
"""Lanes of a past."""


class InContextOptions(TaskOptions):
    """What is asked, and after how many demonstrations; `limit` is the number of test items of a set."""

    sets: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(known_sets)] = tuple(FORMS)
    """Sets."""
    window_demonstrations: Numbers = (4, 20)
    """Demonstrations right before the sentence that is asked about."""
    memory_demonstrations: Numbers = (0, 200, 2000)
    """Further ones in memory, rounded up to whole segments."""
    seeds: Numbers = (1, 2, 3, 4, 5, 6)
    """Of the draws of demonstrations."""
    rule: Literal["labels", "prefix"] = "labels"
    """labels: the likeliest of the labels; prefix: the likeliest token begins the right one (the official rule)."""
    overlap: Literal["skip", "refuse"] = "skip"
    """What is done with demonstrations that are test items, too."""


class Ask(NamedTuple):
    """Test items of a set from one to before another, after so many demonstrations."""

    set: str
    seed: int
    memory: int
    window: int
    first: int
    end: int


@dataclass(frozen=True)
class Question:
    """A test item.

    Attributes:
        prompt: Its prompt, int64 `[any]`.
        asked: The prompt with each label, in their order, int64 `[any]`.
        num_scored: How many last tokens of each are scored.
        gold: Number of the right label.
    """

    prompt: Tokens
    asked: Sequence[Tokens]
    num_scored: Sequence[int]
    gold: int


class InContext(Task[InContextOptions]):
    """Labels of sentences (SST-2, MR, Subj, SST-5, MPQA) after a few demonstrations, with many more in memory."""

    name = "in_context"
    options_class = InContextOptions
    small: ClassVar[Mapping[str, Any]] = {
        "sets": ("SST-2", "MPQA"),
        "window_demonstrations": (2,),
        "memory_demonstrations": (0, 32),
        "seeds": (1,),
        "limit": 8,
    }
    needs_data = True

    def __init__(self, options: InContextOptions, given: Given) -> None:
        super().__init__(options, given)
        self._remembered: tuple[Any, tuple[Draw, Memory, Any]] | None = None

    def items(self) -> Sequence[Item]:
        """Test items of a set, `AT_ONCE` to an item; those after the same memory follow each other."""
        items = []
        for name in self._sets:
            count = len(self._questions[name])
            for seed in self.options.seeds:
                self._check(name, seed)
                for memory in self.options.memory_demonstrations:
                    for window in self.options.window_demonstrations:
                        for first in range(0, count, AT_ONCE):
                            ask = Ask(name, seed, memory, window, first, min(first + AT_ONCE, count))
                            items.append(Item(" ".join(f"{key} {value}" for key, value in ask._asdict().items()), ask))
        return items

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """How each test item is answered under every condition."""
        ask: Ask = item.content
        drawn, memory, past = self._past(ask, scorer)
        window, questions = drawn.window(ask.window), self._questions[ask.set][ask.first : ask.end]
        asked_under = self._conditions(ask, scorer)
        answer = self._prefixes if self.options.rule == "prefix" else self._choices
        longest_row = len(window) + max(len(one) for question in questions for one in question.asked)
        labelled, pool = self._sets[ask.set]
        return {
            **ask._asdict(),
            "split": labelled.split,
            "labels": labelled.form.labels,
            "gold": [question.gold for question in questions],
            "answers": answer(scorer, past, window, questions, asked_under),
            "memory_tokens": len(memory.lanes[OWN]),
            "remembered": len(memory.sizes),
            "within_memory": memory.num_fitting(memory_tokens(self.given)),
            "within_longest": memory.num_fitting(max(0, self.given.longest - longest_row)),
            "other": self._other(ask.set),
            "pool": {"size": len(pool.examples), "repeated": pool.num_repeated, "tested": pool.num_tested},
        }

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Accuracies by set, demonstrations and condition."""
        return in_context_section(list(scores.values()), rule=self.options.rule, longest=self.given.longest)

    @cached_property
    def _sets(self) -> dict[str, tuple[LabelledSet, Pool]]:
        refuse, found = self.options.overlap == "refuse", {}
        for name in self.options.sets:
            labelled = read_set(name, self.options.data)
            found[name] = labelled, pool_of(labelled, refuse=refuse)
        return found

    @cached_property
    def _questions(self) -> dict[str, list[Question]]:
        """Test items of every set, `limit` of them; in an order of their own, for files are sorted by label."""
        found = {}
        for name, (labelled, _) in self._sets.items():
            order = np.random.default_rng(0).permutation(len(labelled.test))[: self.options.limit]
            found[name] = [self._question(labelled, number) for number in order]
        return found

    def _question(self, labelled: LabelledSet, number: int) -> Question:
        form, example = labelled.form, labelled.test[number]
        prompt = f" {form.ask(example.text)}"
        tokens = self.given.tokens(prompt)
        asked = [self.given.tokens(prompt + form.answer(label)) for label in range(len(form.labels))]
        # A tokenizer may join the prompt's end and a label: all labels are scored from where the first one differs.
        same = min(_num_common(tokens, one) for one in asked)
        arrays = [np.array(one, dtype=np.int64) for one in asked]
        return Question(np.array(tokens), arrays, [len(one) - same for one in asked], example.label)

    def _other(self, name: str) -> str | None:
        """The set that lends its demonstrations as other memory: the next one that is asked in another way, if any."""
        names = list(self._sets)
        at = names.index(name)
        others = names[at + 1 :] + names[:at]
        prompt = FORMS[name].prompt
        return min(others, key=lambda other: FORMS[other].prompt == prompt, default=None)

    def _draw(self, name: str, seed: int) -> Draw:
        other, most = self._other(name), max(self.options.window_demonstrations)
        borrowed = None if other is None else self._sets[other][1]
        return Draw(self.given, self._sets[name][1], borrowed, seed=seed, num_window=most)

    def _check(self, name: str, seed: int) -> None:
        """Raises EvaluationError: there are too few demonstrations, or a prompt is too long."""
        options, pool = self.options, self._sets[name][1]
        most = max(options.window_demonstrations)
        wanted = most + max(options.memory_demonstrations)
        if wanted > len(pool.examples):
            raise EvaluationError(
                f"{name} has too few demonstrations",
                got=f"{len(pool.examples)}, without {pool.num_repeated} repeated and {pool.num_tested} tested ones",
                expected=f"{wanted}: the most in the window and in memory",
                do="lower --in_context.memory_demonstrations",
            )
        asked = max(len(one) for question in self._questions[name] for one in question.asked)
        drawn = self._draw(name, seed)
        context = self.given.config.backbone.context_tokens
        longest = context + len(drawn.window(most)) + asked
        if 0 < self.given.longest < longest:
            raise EvaluationError(
                f"a prompt of {name} with {most} demonstrations is too long",
                got=f"{longest} tokens, {context} of them left context",
                expected=f"at most {self.given.longest}, the backbone's longest window",
                do="lower --in_context.window_demonstrations",
            )

        room, most = memory_tokens(self.given), max(options.memory_demonstrations)
        if seed == options.seeds[0] and room and sum((memory := drawn.memory(most)).sizes[:-1]) > room:
            logger.warning(
                "%s: memory.tokens %d hold the newest %d of %d demonstrations; the others will be forgotten",
                *(name, room, memory.num_fitting(room), len(memory.sizes)),
            )

    def _past(self, ask: Ask, scorer: Scorer) -> tuple[Draw, Memory, Any]:
        """What was remembered last is kept, for the next item mostly follows the same."""
        key = ask.set, ask.seed, ask.memory
        if self._remembered is None or self._remembered[0] != key:
            drawn = self._draw(ask.set, ask.seed)
            memory = drawn.memory(ask.memory)
            self._remembered = None  # frees its memory
            past = scorer.remember(*within_reach(self.given, memory.lanes))
            self._remembered = key, (drawn, memory, past)
        return self._remembered[1]

    def _conditions(self, ask: Ask, scorer: Scorer) -> dict[str, tuple[str, int]]:
        """By name under what is answered: a condition of the scorer, and whose past."""
        names = [name for name in scorer.conditions if name != OTHER_MEMORY or self._other(ask.set) is not None]
        if not ask.memory:  # all others would be the same as one of these
            return {name: (name, OWN) for name in names if name in (BACKBONE, MEMORY_OFF, MEMORY_ON)}
        found = {name: (name, OWN) for name in names}
        if MEMORY_ON in found:
            found[SHUFFLED] = MEMORY_ON, WITH_SHUFFLED_LABELS
        return found

    @staticmethod
    def _choices(
        scorer: Scorer,
        past: Any,
        window: Tokens,
        questions: Sequence[Question],
        conditions: Mapping[str, tuple[str, int]],
    ) -> dict[str, list[list[float]]]:
        """By condition, of each question, each label: the sum of its tokens' losses, nats."""
        rows = [
            Row(np.concatenate([window, tokens]), num_scored)
            for question in questions
            for tokens, num_scored in zip(question.asked, question.num_scored, strict=True)
        ]
        found = {}
        for lane in {lane for _, lane in conditions.values()}:
            own = {name: condition for name, (condition, of) in conditions.items() if of == lane}
            losses = scorer.losses(past, rows, list(own.values()), lane=lane, other=OTHER_SET)
            for name, condition in own.items():
                sums = [float(one.sum()) for one in losses[condition]]
                each = len(questions[0].asked)
                found[name] = [sums[at : at + each] for at in range(0, len(sums), each)]
        return {name: found[name] for name in conditions}

    def _prefixes(
        self,
        scorer: Scorer,
        past: Any,
        window: Tokens,
        questions: Sequence[Question],
        conditions: Mapping[str, tuple[str, int]],
    ) -> dict[str, list[str]]:
        """By condition, of each question: the likeliest token after its prompt, without spaces around it."""
        prompts = [np.concatenate([window, question.prompt]) for question in questions]
        found = {}
        for name, (condition, lane) in conditions.items():
            written = scorer.greedy(
                past, prompts, condition, max_tokens=1, is_done=lambda _: True, lane=lane, other=OTHER_SET
            )
            found[name] = [self.given.tokenizer.decode(tokens).strip() for tokens in written]
        return found


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts have in common."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (first, second) in enumerate(pairs) if first != second), min(len(one), len(other)))
