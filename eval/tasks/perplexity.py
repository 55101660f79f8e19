"""Perplexity of held-out documents: the same tokens by the backbone alone, without, with and with foreign memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from eval.held_out import DocumentLosses, PerplexityReport, summarise
from eval.in_step import in_step
from eval.model_scorer import ModelScorer
from eval.report import Section, Table
from eval.runner import Progress, run
from eval.scorer import OTHER_MEMORY, How, Scorer, Tokens
from eval.task import Item, Scores, Task, TaskOptions
from pipeline.config.kinds import Count, TokensOrZero
from pipeline.config.kinds import Tokens as TokenCount
from pipeline.config.schema import Config
from pipeline.config.world import held_out_lanes
from pipeline.data.held_out import held_out_documents
from pipeline.data.store import TokenStore
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import gather_objects
from pipeline.errors import ConfigError
from pipeline.model.longmem import LongMem

logger = logging.getLogger(__name__)


class PerplexityOptions(TaskOptions):
    """How documents are read and scored."""

    documents: Count = 8
    """Documents used."""
    context_tokens: TokensOrZero = 4096
    """Tokens of each document read into memory before any is scored."""
    scored_tokens: TokenCount = 1024
    """Tokens scored in each document, after the context."""


class Perplexity(Task[PerplexityOptions]):
    """Held-out documents of the run, or others."""

    name = "perplexity"
    options_class = PerplexityOptions
    small: ClassVar[Mapping[str, Any]] = {"documents": 4, "context_tokens": 3072, "scored_tokens": 512}

    def items(self) -> Sequence[Item]:
        """Documents of the store's validation split, by pairs that lend each other their memories."""
        options = self.options
        check_segments(options.context_tokens, options.scored_tokens, self.given.config.train.segment_tokens, self.name)
        path = options.data[0] if options.data else self.given.config.data.path
        store = TokenStore.open(path, "validation")
        self.num_tokens = options.context_tokens + options.scored_tokens
        at_once = held_out_lanes(options.documents, num_groups=1)  # the same items on any number of ranks
        found = document_items(store, count=options.documents, num_tokens=self.num_tokens, at_once=at_once)
        return found[: options.limit]

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """Per-token losses of some documents."""
        hows = {name: How(name) for name in scorer.conditions}
        return score_documents(item, scorer, self.options.context_tokens, self.num_tokens, hows)

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Means over tokens."""
        documents = losses_of(scores)
        report = summarise(
            documents,
            context_tokens=self.options.context_tokens,
            segment_tokens=self.given.config.train.segment_tokens,
            seconds=float("nan"),
        )
        rows = [[name, f"{one.loss_nats:.4f}", f"{one.perplexity:.2f}"] for name, one in report.conditions.items()]
        return Section(
            "Perplexity of held-out documents",
            f"{report.num_documents} documents, {report.num_tokens:,} tokens scored after {report.context_tokens:,}.",
            [Table("Held-out tokens", ["condition", "loss, nats", "perplexity"], rows)],
            figures=report.to_dict(),
        )


def evaluate(
    model: LongMem,
    store: TokenStore,
    config: Config,
    *,
    group: MemoryGroup,
    progress: bool = False,
    conditions: Sequence[str] | None = None,
) -> PerplexityReport:
    """Scores held-out documents under up to six conditions, all on exactly the same tokens.

    Of each document the first `evaluation.context_tokens` are read into memory, segment by segment, and the next
    `evaluation.scored_tokens` are scored and read in. The conditions of a scored segment: `backbone` alone with the
    same window (context and segment); `memory_off`, the SideNet without memory; `memory_on`, with the document's own
    past; `other_memory`, with its own recent window and what is retrieved from another held-out document, equally long;
    `window_only`, where nothing is retrieved: what retrieval is worth is `memory_on` against that. Then
    `longest_window`, the backbone alone with the longest ordinary window that it takes: the honest rival. Documents go
    two by two, in the order of the store, and borrow of each other; the last of an odd number borrows the first's.

    Each document has a lane of a bank of its own, made here and split over the ranks of a memory group, which read in
    turn as in training: training memory is not touched. So `memory.scope` `group` is read as `lane`, and `document` is
    the same as `lane` (but for `other_memory`, where the borrowed chunks are visible on purpose).

    Collective: every rank must call it.

    Args:
        model: The model.
        store: The held-out split.
        config: The run's settings.
        group: This rank's memory group; the documents are dealt to all of them.
        progress: Whether this rank shows a progress bar.
        conditions: Some of `CONDITIONS`; None: all that the model has. `other_memory` is left out, with a warning,
            where there is only one document, and `longest_window` where `evaluation.backbone_window_tokens` is 0.

    Returns:
        The report, the same on all ranks.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
        DataError: No document is long enough.
    """
    begun = time.perf_counter()
    scored = score(model, store, config, group=group, progress=progress, conditions=conditions)
    return summarise(
        scored,
        context_tokens=config.evaluation.context_tokens,
        segment_tokens=config.train.segment_tokens,
        seconds=max(gather_objects(time.perf_counter() - begun)),
    )


def score(
    model: LongMem,
    store: TokenStore,
    config: Config,
    *,
    group: MemoryGroup,
    progress: bool = False,
    conditions: Sequence[str] | None = None,
) -> list[DocumentLosses]:
    """The losses behind `evaluate`, of all ranks; arguments and errors are the same. Collective."""
    check_evaluation(config)
    wanted = config.evaluation
    num_tokens = wanted.context_tokens + wanted.scored_tokens
    at_once = held_out_lanes(wanted.documents, num_groups=group.num_groups)
    items = document_items(store, count=wanted.documents, num_tokens=num_tokens, at_once=at_once)
    bar = Progress("evaluation" if progress else None)
    with in_step(model) as (stepping, finish):
        scorer = ModelScorer(stepping, group, longest=wanted.backbone_window_tokens, on_read=bar.read)
        hows = {name: How(name) for name in conditions or scorer.conditions}
        score_item = partial(
            score_documents, scorer=scorer, context_tokens=wanted.context_tokens, num_tokens=num_tokens, hows=hows
        )
        return losses_of(run(items, score_item, group, finish=finish, progress=bar))


def check_evaluation(config: Config) -> None:
    """Checks what an evaluation needs of the settings; also worth a call before a long training run.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
    """
    wanted = config.evaluation
    check_segments(wanted.context_tokens, wanted.scored_tokens, config.train.segment_tokens, "evaluation")


def check_segments(context_tokens: int, scored_tokens: int, segment: int, section: str) -> None:
    """Raises ConfigError: context or scored tokens are not whole segments."""
    problems = []
    for name, tokens in (("context_tokens", context_tokens), ("scored_tokens", scored_tokens)):
        if tokens % segment:
            below = tokens // segment * segment
            nearest = f"{below} or {below + segment}" if below else f"{segment}"
            problems.append(
                f"{section}.{name} is not a multiple of train.segment_tokens; got: {tokens} and {segment}; "
                f"do: set {section}.{name} to {nearest}"
            )
    if problems:
        raise ConfigError(problems)


def document_items(store: TokenStore, *, count: int, num_tokens: int, at_once: int) -> list[Item]:
    """Held-out documents, two by two, so many an item. Raises DataError: none is long enough.

    The content of an item are documents' numbers and their tokens, `num_tokens` and one more where there is one; a
    document that only lends its memory has the number None.
    """
    documents = held_out_documents(store, count=count, min_tokens=num_tokens)
    if len(documents) == 1:
        logger.warning("there is only one held-out document: the memory of another one is not tried")
    rows: list[tuple[int | None, Tokens]] = [
        (document, store.tokens(document, 0, num_tokens + 1)) for document in documents
    ]
    if len(rows) % 2 and len(rows) > 1:
        rows.append((None, rows[0][1]))
    parts = [rows[at : at + at_once] for at in range(0, len(rows), at_once)]
    return [Item(" ".join(str(number) for number, _ in part if number is not None), part) for part in parts]


def score_documents(
    item: Item, scorer: Scorer, context_tokens: int, num_tokens: int, hows: Mapping[str, How]
) -> Scores:
    """Reads the documents of an item; of each the losses of all scored tokens by name of how it was read."""
    texts = [tokens for _, tokens in item.content]
    if len(texts) == 1:
        hows = {name: how for name, how in hows.items() if how.condition != OTHER_MEMORY}
    losses = scorer.follow(texts, first_scored=context_tokens, num_tokens=num_tokens, hows=hows)
    return {
        str(document): {
            "losses": {name: of_row[row].tolist() for name, of_row in losses.items()},
            "num_predicted": min(len(tokens) - 1, num_tokens) - context_tokens,
        }
        for row, (document, tokens) in enumerate(item.content)
        if document is not None
    }


def losses_of(scores: Mapping[str, Scores]) -> list[DocumentLosses]:
    """The documents of all items."""
    found = []
    for item in scores.values():
        for document, one in item.items():
            losses = {name: np.array(values) for name, values in one["losses"].items()}
            counts = np.zeros(len(next(iter(losses.values()))))
            counts[: one["num_predicted"]] = 1
            found.append(DocumentLosses(int(document), losses, counts))
    return found
