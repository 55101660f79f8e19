"""What training evaluates itself with: the task `perplexity` on the run's own held-out documents, by token.

The same items, scorer and runner as `launch/evaluate.py`; the report is the small table that a run prints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from eval.documents import check_segments, in_pairs, of_stores, read_in_pairs
from eval.held_out import DocumentLosses, PerplexityReport, summarise
from eval.in_step import in_step
from eval.model_scorer import ModelScorer
from eval.runner import Progress, run
from eval.scorer import How
from eval.task import Item, Scores
from pipeline.config.schema import Config
from pipeline.config.world import held_out_lanes
from pipeline.data.store import TokenStore
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import gather_objects
from pipeline.model.longmem import LongMem


def evaluate(
    model: LongMem,
    stores: Sequence[TokenStore],
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
    two by two, in the order of the stores, and borrow of each other; the last of an odd number borrows the first's.

    Each document has a lane of a bank of its own, made here and split over the ranks of a memory group, which read in
    turn as in training: training memory is not touched. So `memory.scope` `group` is read as `lane`, and `document` is
    the same as `lane` (but for `other_memory`, where the borrowed chunks are visible on purpose).

    Collective: every rank must call it.

    Args:
        model: The model.
        stores: The held-out split of each source that has one.
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
    scored = score(model, stores, config, group=group, progress=progress, conditions=conditions)
    return summarise(
        scored,
        context_tokens=config.evaluation.context_tokens,
        segment_tokens=config.train.segment_tokens,
        seconds=max(gather_objects(time.perf_counter() - begun)),
    )


def score(
    model: LongMem,
    stores: Sequence[TokenStore],
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
    documents = of_stores(stores, count=wanted.documents, num_tokens=num_tokens, min_tokens=num_tokens)
    items = in_pairs(documents, at_once=held_out_lanes(wanted.documents, num_groups=group.num_groups))
    bar = Progress("evaluation" if progress else None)
    with in_step(model) as (stepping, finish):
        scorer = ModelScorer(stepping, group, longest=wanted.backbone_window_tokens, on_read=bar.read)
        hows = {name: How(name) for name in conditions or scorer.conditions}

        def score_item(item: Item) -> Scores:
            read = read_in_pairs(item.content, scorer, wanted.context_tokens, hows)
            return {str(one.number): _counted(one.number or 0, losses, count) for one, losses, count in read}

        return [
            one for item in run(items, score_item, group, finish=finish, progress=bar).values() for one in item.values()
        ]


def _counted(number: int, losses: Mapping[str, np.ndarray], count: int) -> DocumentLosses:
    counts = np.zeros(len(next(iter(losses.values()))))
    counts[:count] = 1
    return DocumentLosses(number, losses, counts)


def check_evaluation(config: Config) -> None:
    """Checks what an evaluation needs of the settings; also worth a call before a long training run.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
    """
    wanted = config.evaluation
    check_segments(wanted.context_tokens, wanted.scored_tokens, config.train.segment_tokens, "evaluation")
