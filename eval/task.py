"""What a benchmark is: items, how one is scored, and what all say together. A new one is one file in `tasks/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from eval.report import Section
from eval.scorer import Scorer
from pipeline.config.kinds import Count
from pipeline.config.kinds import Section as Options
from pipeline.config.schema import Config

Scores = Mapping[str, Any]
"""What was found for an item: plain JSON, complete, so that a report can be made of nothing else."""


class TaskOptions(Options):
    """What every task can be asked: `--TASK.KEY VALUE`."""

    data: tuple[str, ...] = ()
    """Files or folders, or a hub name; empty: what the task has by itself."""
    limit: Count | None = None
    """Items scored, the first ones; null: all."""


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Given:
    """What a task is made of, before any weight is loaded.

    Attributes:
        tokenizer: The backbone's.
        config: The settings of the run that trained the model.
        longest: Tokens of the longest ordinary window that the backbone is tried with.
    """

    tokenizer: PreTrainedTokenizerBase
    config: Config
    longest: int

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, without special ones."""
        return tokens_of(self.tokenizer, text)


@dataclass(frozen=True)
class Item:
    """What is scored at once.

    Attributes:
        name: Its name, of its own within the task, and the same in every run.
        content: What the task makes of it.
    """

    name: str
    content: Any


AnyOptions = TypeVar("AnyOptions", bound=TaskOptions)


class Task(ABC, Generic[AnyOptions]):
    """A benchmark.

    Args:
        options: What was asked for, of the class `options_class`.
        given: Tokenizer and settings.

    Attributes:
        name: As on the command line.
        options_class: Its options.
        small: Options of `--limit small`: an answer within two minutes on two cores.
        needs_data: Whether it has none by itself.
        deterministic: Whether its scores are the same whenever and by however many ranks they are found; times are not.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[TaskOptions]] = TaskOptions
    small: ClassVar[Mapping[str, Any]] = {"limit": 4}
    needs_data: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True

    def __init__(self, options: AnyOptions, given: Given) -> None:
        self.options, self.given = options, given

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All that is to be scored, the same on all ranks, in the same order; `options.limit` of them.

        Items that read the same past should follow each other: it is remembered once.

        Returns:
            The items.

        Raises:
            LongMemError: The data cannot be used; says what was found. Called before any weight is loaded.
        """

    @abstractmethod
    def score(self, item: Item, scorer: Scorer) -> Scores:
        """Scores one item under every condition. Every rank of a memory group does it together.

        Args:
            item: The item.
            scorer: The model.

        Returns:
            The scores, plain JSON.
        """

    @abstractmethod
    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Says what all scores together mean.

        Args:
            scores: By name of the item, in the order of `items`.

        Returns:
            The task's part of the report.
        """
