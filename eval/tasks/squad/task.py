"""SQuAD: answers that the model writes, the passage in the window or in memory, after some demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from eval.demonstrations import Numbers, in_order, memory_tokens, text_of, within_reach
from eval.labelled import as_compared
from eval.report import Section
from eval.runner import EvaluationError
from eval.scorer import BACKBONE, MEMORY_OFF, MEMORY_ON, Scorer, Tokens
from eval.task import Given, Item, Scores, Task, TaskOptions
from eval.tasks.squad.file import Passage, Question, answerable, read_passages, without_articles
from eval.tasks.squad.form import Demonstration, Form, demonstrations_of
from eval.tasks.squad.report import squad_section
from pipeline.config.kinds import Count
from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)
KEPT_APART = 4
"""Of so many passages of a file one is kept for demonstrations, where there is no other file for them."""


class SquadOptions(TaskOptions):
    """How questions are asked; `limit` is the number of questions. Data: the file, and one of demonstrations."""

    passage: Literal["window", "memory"] = "window"
    """Where passages are: before their questions, or in memory, before all demonstrations there."""
    window_demonstrations: Annotated[int, Field(ge=0, le=1000)] = 3
    """Questions with answers right before the one that is asked."""
    memory_demonstrations: Numbers = (0, 200)
    """Further ones in memory, with their passages."""
    unanswerable: Literal["asked", "left_out"] = "asked"
    """What is done with questions of version 2.0 that have no answer, in demonstrations too."""
    leave_out: tuple[str, ...] = ()
    """Titles of articles that the model was trained on, which are neither asked about nor shown."""
    seeds: Numbers = (1,)
    """Of the draws of demonstrations."""
    answer_tokens: Count = 32
    """Tokens that are written at most; the first new line ends an answer."""


@dataclass(frozen=True)
class Ask:
    """Questions on one passage, after so many demonstrations in memory."""

    seed: int
    memory: int
    passage: Passage
    questions: Sequence[Question]


class Squad(Task[SquadOptions]):
    """Questions of SQuAD 1.1 or 2.0, answered by what the model writes."""

    name = "squad"
    options_class = SquadOptions
    small: ClassVar[Mapping[str, Any]] = {
        "passage": "memory",
        "memory_demonstrations": (4,),
        "unanswerable": "left_out",
        "answer_tokens": 12,
        "limit": 4,
    }
    needs_data = True

    def __init__(self, options: SquadOptions, given: Given) -> None:
        super().__init__(options, given)
        self._form = Form(given.tokens)
        self._remembered: tuple[Any, tuple[int, Any]] | None = None

    def items(self) -> Sequence[Item]:
        """The questions on one passage an item; those after the same memory follow each other."""
        tested, _ = self._passages
        items, left = [], self.options.limit
        asked: list[tuple[int, Passage, Sequence[Question]]] = []
        for number, passage in tested:
            questions = passage.questions[:left]
            left = None if left is None else left - len(questions)
            if questions:
                asked.append((number, passage, questions))
        for seed in self.options.seeds:
            self._check(seed, [(passage, one) for _, passage, questions in asked for one in questions])
            for memory in self.options.memory_demonstrations:
                for number, passage, questions in asked:
                    name = f"seed {seed} memory {memory} passage {number} questions {len(questions)}"
                    items.append(Item(name, Ask(seed, memory, passage, questions)))
        return items

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """What is written under every condition."""
        ask: Ask = item.content
        window, further = self._drawn(ask.seed)
        num_tokens, past = self._past(ask, window, further, scorer)
        before = [self._form.shown(one, with_passage=self._in_window) for one in window]
        passage = self._form.passage(ask.passage) if self._in_window else []
        prompts = [text_of([*before, passage, self._form.asked(question)]) for question in ask.questions]
        conditions = scorer.conditions
        if self._in_window and not ask.memory:  # nothing is remembered: all others are the same as one of these
            conditions = tuple(name for name in conditions if name in (BACKBONE, MEMORY_OFF, MEMORY_ON))
        answers: dict[str, list[str]] = {}
        written: list[list[int]] | None = None
        for name in conditions:  # what was written under another condition is a good guess
            written = scorer.greedy(
                past, prompts, name, max_tokens=self.options.answer_tokens, is_done=self._is_done, guesses=written
            )
            answers[name] = [self._answer(tokens) for tokens in written]
        return {
            "seed": ask.seed,
            "memory": ask.memory,
            "memory_tokens": num_tokens,
            "forgotten": max(0, num_tokens - room) if (room := memory_tokens(self.given)) else 0,
            "ids": [question.id for question in ask.questions],
            "references": [list(question.answers) for question in ask.questions],
            "answers": answers,
        }

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Exact match and F1 by condition and number of demonstrations."""
        options = self.options
        return squad_section(
            list(scores.values()),
            passage=options.passage,
            window=options.window_demonstrations,
            answer_tokens=options.answer_tokens,
            other="the same demonstrations with their answers shuffled" if self._in_window else "another passage",
            leaves_out=options.unanswerable == "left_out",
            has_passages_apart=len(self.options.data) == 1,
        )

    @property
    def _in_window(self) -> bool:
        return self.options.passage == "window"

    @cached_property
    def _passages(self) -> tuple[list[tuple[int, Passage]], list[Passage]]:
        """Passages that are asked about, with their numbers in the file, in an order of their own; and others."""
        if len(self.options.data) > 2:
            raise ConfigError(
                [f"squad reads a file and one of demonstrations; got: {', '.join(self.options.data)}"[:400]]
            )
        own = self._read(self.options.data[0], self.options.leave_out)
        order = [int(number) for number in np.random.default_rng(0).permutation(len(own))]
        apart = order[: -(-len(own) // KEPT_APART)] if len(self.options.data) == 1 else []
        tested = [(number, own[number]) for number in order if number not in set(apart)]
        shown = [own[number] for number in apart] if apart else self._read(self.options.data[1])
        shown = [one for one in shown if one.title not in self.options.leave_out]
        texts = {as_compared(passage.text) for _, passage in tested}
        left = [passage for passage in shown if as_compared(passage.text) not in texts]
        if not tested or not left:
            raise EvaluationError(
                "the passages of the demonstrations are those that are asked about",
                got=f"{len(tested)} passages asked about, {len(shown)} for demonstrations, {len(left)} of them others",
                expected="at least one other",
                do="give another file of demonstrations as the second --data squad=FILE",
            )
        return tested, left

    def _read(self, path: str, leave_out: Sequence[str] = ()) -> list[Passage]:
        passages = without_articles(read_passages(path), leave_out)
        if not passages:
            raise EvaluationError(
                f"{path}: no article is left to ask about",
                got=f"--squad.leave_out {', '.join(leave_out)}",
                do="leave out fewer, or give a file of other articles",
            )
        if self.options.unanswerable == "asked":
            return passages
        kept = answerable(passages)
        if not kept:
            raise EvaluationError(
                f"{path}: no question has an answer", do="leave out --squad.unanswerable left_out, or give another file"
            )
        return kept

    @cached_property
    def _demonstrations(self) -> list[Demonstration]:
        return demonstrations_of(self._passages[1])

    def _drawn(self, seed: int) -> tuple[list[Demonstration], list[Demonstration]]:
        """Demonstrations of the window, and all others in the order in which memory has them, the last one first."""
        order, most = in_order(self._demonstrations, seed), self.options.window_demonstrations
        return order[:most], order[most:]

    def _check(self, seed: int, questions: Sequence[tuple[Passage, Question]]) -> None:
        """Raises EvaluationError: there are too few demonstrations, or a prompt is too long."""
        window, further = self._drawn(seed)
        wanted = self.options.window_demonstrations + max(self.options.memory_demonstrations)
        if len(window) + len(further) < wanted:
            raise EvaluationError(
                "squad has too few demonstrations",
                got=len(window) + len(further),
                expected=f"{wanted}: in the window and in memory",
                do="lower --squad.memory_demonstrations, or give another file of them as the second --data squad=FILE",
            )
        before = sum(len(self._form.shown(one, with_passage=self._in_window)) for one in window)
        longest, question = max(
            (
                before + len(self._form.asked(question)) + (len(self._form.passage(passage)) if self._in_window else 0),
                question.id,
            )
            for passage, question in questions
        )
        context = self.given.config.backbone.context_tokens
        longest += context + self.options.answer_tokens
        if 0 < self.given.longest < longest:
            raise EvaluationError(
                f"the prompt of question {question[:80]} is too long",
                got=f"{longest} tokens, {context} of them left context and {self.options.answer_tokens} the answer",
                expected=f"at most {self.given.longest}, the backbone's longest window",
                do="lower --squad.window_demonstrations, or set --squad.passage memory",
            )
        ask = Ask(seed, max(self.options.memory_demonstrations), questions[0][0], [])
        length, room = len(self._lanes(ask, window, further)[0]), memory_tokens(self.given)
        if 0 < room < length and seed == self.options.seeds[0]:
            what = "the oldest demonstrations" if self._in_window else "the passages and the oldest demonstrations"
            logger.warning("memory.tokens %d hold the newest of %d tokens; %s will be forgotten", room, length, what)

    def _past(
        self, ask: Ask, window: Sequence[Demonstration], further: Sequence[Demonstration], scorer: Scorer
    ) -> tuple[int, Any]:
        """Tokens in memory, and the past. What was remembered last is kept, for the next item may follow the same."""
        key = ask.seed, ask.memory, None if self._in_window else ask.passage.text
        if self._remembered is None or self._remembered[0] != key:
            self._remembered = None  # frees its memory
            lanes = self._lanes(ask, window, further)
            self._remembered = key, (len(lanes[0]), scorer.remember(*within_reach(self.given, lanes)))
        return self._remembered[1]

    def _lanes(
        self, ask: Ask, window: Sequence[Demonstration], further: Sequence[Demonstration]
    ) -> tuple[Tokens, Tokens]:
        """Memory, and what is compared with it, of as many whole segments.

        With passages in memory: the passage that is asked about, then the demonstrations, then the window's passages;
        and the same with a passage of another article (or at least another one) in its place. Otherwise the
        demonstrations; and the same with their answers shuffled. What comes before all that are further demonstrations
        that fill the first segment.
        """
        shown, rest = further[: ask.memory], further[ask.memory :]
        own = [self._form.shown(one) for one in reversed(shown)]
        if self._in_window:
            answers = np.random.default_rng((ask.seed, 1)).permutation(len(shown))
            shuffled = [one._replace(answer=shown[at].answer) for one, at in zip(shown, answers, strict=True)]
            lanes = [own, [self._form.shown(one) for one in reversed(shuffled)]]
        else:
            own += [self._form.passage(one.passage) for one in window]
            tested = [passage for _, passage in self._passages[0]]
            at = tested.index(ask.passage)
            others = [*tested[at + 1 :], *tested[:at], *self._passages[1]]
            other = min(others, key=lambda passage: passage.title == ask.passage.title)  # the next of another article
            lanes = [[self._form.passage(ask.passage), *own], [self._form.passage(other), *own]]
        texts = [text_of(lane) for lane in lanes]
        segment = self.given.config.train.segment_tokens
        length = -(-len(texts[0]) // segment) * segment
        filling: list[list[int]] = []
        for one in cycle(rest or further or window):
            if sum(map(len, filling)) + min(map(len, texts)) >= length:
                break
            filling.insert(0, self._form.shown(one))
        first, second = (np.concatenate([text_of(filling), text])[-length:] if length else text for text in texts)
        return first, second

    def _is_done(self, written: list[int]) -> bool:
        return written[-1] == self.given.tokenizer.eos_token_id or "\n" in self.given.tokenizer.decode(written)

    def _answer(self, written: list[int]) -> str:
        text = str(self.given.tokenizer.decode(written, skip_special_tokens=True))
        return text.lstrip(" ").partition("\n")[0].strip()
