"""Perplexity of held-out documents: the same tokens by the backbone alone, without, with and with foreign memory.

Shapes: `B` rows, one document each; `T` segment tokens; `N` context and scored tokens of a document.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from eval.report import (
    BACKBONE,
    CONDITIONS,
    MEMORY_OFF,
    MEMORY_ON,
    OTHER_MEMORY,
    DocumentLosses,
    PerplexityReport,
    summarise,
)
from pipeline.config.schema import Config
from pipeline.data.held_out import held_out_documents
from pipeline.data.store import TokenStore
from pipeline.errors import ConfigError
from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED
from pipeline.model.stream import Memory, Seen, Stream

logger = logging.getLogger(__name__)

PAIRS_PER_BATCH = 2  # 4 rows: more would make the bank larger and no step much faster


@torch.no_grad()
def evaluate(
    model: LongMem,
    store: TokenStore,
    config: Config,
    *,
    rank: int,
    world_size: int,
    progress: bool = False,
    conditions: Sequence[str] | None = None,
) -> PerplexityReport:
    """Scores held-out documents under up to four conditions, all on exactly the same tokens, in one pass.

    Of each document the first `evaluation.context_tokens` are read into memory, segment by segment, and the next
    `evaluation.scored_tokens` are scored and read in. The conditions of a scored segment: `backbone` alone with the
    same window; `memory_off`, the SideNet without memory; `memory_on`, with the document's own past; `other_memory`,
    with the past of another held-out document, equally long. Documents go two by two, in the order of the store, and
    borrow each other's memory; the last of an odd number borrows the first's.

    Each document has a lane of a bank of its own, made here: training memory is not touched. So `memory.scope`
    `group` is read as `lane`, and `document` is the same as `lane` (but for `other_memory`, where the borrowed
    chunks are visible on purpose).

    Collective: every rank must call it. All run the same number of forward passes, for a partitioned backbone;
    a rank without a document of its own repeats one that is not counted again.

    Args:
        model: The model.
        store: The held-out split.
        config: The run's settings.
        rank: This rank.
        world_size: Number of ranks that the documents are dealt to.
        progress: Whether this rank shows a progress bar.
        conditions: Some of `CONDITIONS`; None: all, or those without memory if `memory.enabled` is false.
            `other_memory` is left out, with a warning, where there is only one document.

    Returns:
        The report, the same on all ranks.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
        DataError: No document is long enough.
    """
    begun = time.perf_counter()
    check_evaluation(config)
    scored = score(model, store, config, rank=rank, world_size=world_size, progress=progress, conditions=conditions)
    gathered = _gather_objects((scored, time.perf_counter() - begun), world_size=world_size)
    return summarise(
        [one for documents, _ in gathered for one in documents],
        context_tokens=config.evaluation.context_tokens,
        segment_tokens=config.train.segment_tokens,
        seconds=max(seconds for _, seconds in gathered),
    )


def check_evaluation(config: Config) -> None:
    """Checks what an evaluation needs of the settings; also worth a call before a long training run.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
    """
    segment, problems = config.train.segment_tokens, []
    for name in ("context_tokens", "scored_tokens"):
        tokens = getattr(config.evaluation, name)
        if tokens % segment:
            below = tokens // segment * segment
            nearest = f"{below} or {below + segment}" if below else f"{segment}"
            problems.append(
                f"evaluation.{name} is not a multiple of train.segment_tokens; got: {tokens} and {segment}; "
                f"do: set evaluation.{name} to {nearest}"
            )
    if problems:
        raise ConfigError(problems)


@torch.no_grad()
def score(
    model: LongMem,
    store: TokenStore,
    config: Config,
    *,
    rank: int,
    world_size: int,
    progress: bool = False,
    conditions: Sequence[str] | None = None,
) -> list[DocumentLosses]:
    """One rank's part of `evaluate`: the losses of its documents.

    Collective: with a partitioned backbone every rank must call it together.

    Args:
        model: The model.
        store: The held-out split.
        config: The run's settings.
        rank: This rank.
        world_size: Number of ranks that the documents are dealt to.
        progress: Whether this rank shows a progress bar.
        conditions: As in `evaluate`.

    Returns:
        Its documents, each counted by one rank only.

    Raises:
        DataError: No document is long enough.
    """
    settings = config.evaluation
    num_tokens = settings.context_tokens + settings.scored_tokens
    documents = held_out_documents(store, count=settings.documents, min_tokens=num_tokens)
    chosen = _conditions(config, conditions, num_documents=len(documents))
    groups = _deal(documents, rank=rank, world_size=world_size)
    batches = [
        [row for group in groups[at : at + PAIRS_PER_BATCH] for row in group]
        for at in range(0, len(groups), PAIRS_PER_BATCH)
    ]
    num_segments = len(batches) * (num_tokens // config.train.segment_tokens)
    scored: list[DocumentLosses] = []
    with tqdm(total=num_segments, desc="evaluation", unit="segment", disable=not progress) as bar:
        for rows in batches:
            scored += _Batch(model, store, config, rows).score(chosen, after_segment=bar.update)
    return scored


@dataclass(frozen=True)
class _Row:
    """A document that a rank reads; `counted` is false where it only lends its memory or keeps the ranks in step."""

    document: int
    counted: bool


def _deal(documents: Sequence[int], *, rank: int, world_size: int) -> list[list[_Row]]:
    """A rank's pairs of documents: equally many on all ranks. Who lends to whom does not depend on the world size."""
    if len(documents) == 1:
        groups = [[_Row(documents[0], True)]]
    else:
        last = [[_Row(documents[-1], True), _Row(documents[0], False)]] if len(documents) % 2 else []
        groups = [
            [_Row(documents[at], True), _Row(documents[at + 1], True)] for at in range(0, len(documents) - 1, 2)
        ] + last
    filler = [replace(row, counted=False) for row in groups[0]]
    groups += [filler] * (-len(groups) % world_size)
    return groups[rank::world_size]


def _conditions(config: Config, conditions: Sequence[str] | None, *, num_documents: int) -> tuple[str, ...]:
    if conditions is None:
        conditions = CONDITIONS if config.memory.enabled else (BACKBONE, MEMORY_OFF)
    assert conditions and set(conditions) <= set(CONDITIONS), f"conditions are some of {CONDITIONS}"
    if OTHER_MEMORY in conditions and num_documents == 1:
        logger.warning("there is only one held-out document: the memory of another one is not tried")
        conditions = [name for name in conditions if name != OTHER_MEMORY]
    return tuple(conditions)


class _Batch:
    """Some documents, one a row, read in lockstep with a bank of their own."""

    def __init__(self, model: LongMem, store: TokenStore, config: Config, rows: Sequence[_Row]) -> None:
        settings = config.evaluation
        self.rows = rows
        self.segment_tokens, self.context_tokens = config.train.segment_tokens, settings.context_tokens
        num_tokens = settings.context_tokens + settings.scored_tokens
        # One token more, where the document has it: the target of the last one.
        pieces = [store.tokens(row.document, 0, num_tokens + 1) for row in rows]
        device = model.device
        self.tokens = torch.from_numpy(np.stack([piece[:num_tokens] for piece in pieces])).to(device)  # [B, N]
        self.targets = torch.full_like(self.tokens, IGNORED)
        for row, piece in enumerate(pieces):
            self.targets[row, : len(piece) - 1] = torch.from_numpy(piece[1:]).to(device)
        self.documents = torch.arange(len(rows), device=device)[:, None].expand(-1, self.segment_tokens)
        self.partners = torch.arange(len(rows), device=device) ^ 1
        bank = model.bank(len(rows), num_tokens=min(config.memory.tokens, num_tokens))
        # A row is one document: within it scope `document` hides nothing, and `group` would show it the others'.
        self.stream = Stream(model, bank, scope="lane")

    def score(self, conditions: Sequence[str], *, after_segment: Callable[[], object]) -> list[DocumentLosses]:
        """Reads the documents to the end.

        Args:
            conditions: What to score.
            after_segment: Called after each segment.

        Returns:
            The rows that count.
        """
        losses: dict[str, list[Tensor]] = {name: [] for name in conditions}
        for start in range(0, self.tokens.shape[1], self.segment_tokens):
            segment = slice(start, start + self.segment_tokens)
            seen = self.stream.feed(self.tokens[:, segment], self.documents)
            if start >= self.context_tokens:
                for name in conditions:
                    losses[name].append(self._losses(name, seen, self.targets[:, segment]).double().cpu())
            after_segment()
        whole = {name: torch.cat(pieces, dim=1).numpy() for name, pieces in losses.items()}
        counts = (self.targets[:, self.context_tokens :] != IGNORED).double().cpu().numpy()
        return [
            DocumentLosses(row.document, {name: whole[name][index] for name in conditions}, counts[index])
            for index, row in enumerate(self.rows)
            if row.counted
        ]

    def _losses(self, condition: str, seen: Seen, targets: Tensor) -> Tensor:
        """Losses of one segment, nats, float32 `[B, T]`."""
        if condition == BACKBONE:
            return self.stream.backbone_losses(seen, targets)
        memory: Mapping[str, Memory] = {MEMORY_OFF: "none", MEMORY_ON: "own", OTHER_MEMORY: self.partners}
        return self.stream.losses(seen, targets, memory=memory[condition])


def _gather_objects(
    mine: tuple[list[DocumentLosses], float], *, world_size: int
) -> list[tuple[list[DocumentLosses], float]]:
    if world_size == 1:
        return [mine]
    assert dist.is_initialized(), "several ranks need an initialised process group"
    gathered: list[tuple[list[DocumentLosses], float]] = [mine] * world_size
    dist.all_gather_object(gathered, mine)
    return gathered
