"""Perplexity of held-out documents: the same tokens by the backbone alone, without, with and with foreign memory.

Shapes: `B` rows, one document each; `T` segment tokens; `G` ranks of a memory group; `N` context and scored tokens of a
document, and after them what fills the last `G` segments up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.report import (
    BACKBONE,
    CONDITIONS,
    LONGEST_WINDOW,
    MEMORY_OFF,
    MEMORY_ON,
    OTHER_MEMORY,
    WINDOW_ONLY,
    DocumentLosses,
    PerplexityReport,
    summarise,
    whole_documents,
)
from pipeline.config.schema import Config
from pipeline.config.world import PAIRS_AT_ONCE
from pipeline.data.held_out import held_out_documents
from pipeline.data.store import TokenStore
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import gather_objects
from pipeline.errors import ConfigError
from pipeline.memory.exchange import exchange_of
from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED
from pipeline.model.stream import Context, Memory, Seen, Stream

logger = logging.getLogger(__name__)
EVERYTHING = 10**10  # a backbone that says nothing of the longest text that it was made for


@torch.no_grad()
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

    Collective: every rank must call it. All run the same number of forward passes, for a partitioned backbone;
    a group without a document of its own repeats one that is not counted again.

    Args:
        model: The model.
        store: The held-out split.
        config: The run's settings.
        group: This rank's memory group; the documents are dealt to all of them.
        progress: Whether this rank shows a progress bar.
        conditions: Some of `CONDITIONS`; None: all, or those without memory if `memory.enabled` is false.
            `other_memory` is left out, with a warning, where there is only one document, `window_only` where
            there is no window, and `longest_window` where `evaluation.backbone_window_tokens` is 0.

    Returns:
        The report, the same on all ranks.

    Raises:
        ConfigError: Context or scored tokens are not whole segments.
        DataError: No document is long enough.
    """
    begun = time.perf_counter()
    check_evaluation(config)
    scored = score(model, store, config, group=group, progress=progress, conditions=conditions)
    gathered = gather_objects((scored, time.perf_counter() - begun))
    return summarise(
        whole_documents(part for parts, _ in gathered for part in parts),
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
    group: MemoryGroup,
    progress: bool = False,
    conditions: Sequence[str] | None = None,
) -> list[DocumentLosses]:
    """One rank's part of `evaluate`: the losses of its segments of its memory group's documents.

    Collective: every rank of the memory group must call it together, with a partitioned backbone every rank.

    Args:
        model: The model.
        store: The held-out split.
        config: The run's settings.
        group: As in `evaluate`.
        progress: Whether this rank shows a progress bar.
        conditions: As in `evaluate`.

    Returns:
        The group's documents, each counted by one group only; 0 where another rank of the group has read.

    Raises:
        DataError: No document is long enough.
    """
    settings = config.evaluation
    num_tokens = settings.context_tokens + settings.scored_tokens
    documents = held_out_documents(store, count=settings.documents, min_tokens=num_tokens)
    chosen = _conditions(config, conditions, num_documents=len(documents))
    pairs = _deal(documents, group=group.number, num_groups=group.num_groups)
    batches = [
        [row for pair in pairs[at : at + PAIRS_AT_ONCE] for row in pair] for at in range(0, len(pairs), PAIRS_AT_ONCE)
    ]
    num_segments = len(batches) * -(-num_tokens // (group.size * config.train.segment_tokens))  # of this rank
    scored: list[DocumentLosses] = []
    with tqdm(total=num_segments, desc="evaluation", unit="segment", disable=not progress) as bar:
        for rows in batches:
            scored += _Batch(model, store, config, rows, group, chosen).score(after_segment=bar.update)
    return scored


@dataclass(frozen=True)
class _Row:
    """A document that a group reads; `counted` is false where it only lends its memory or keeps the ranks in step."""

    document: int
    counted: bool


def _deal(documents: Sequence[int], *, group: int, num_groups: int) -> list[list[_Row]]:
    """A group's pairs of documents: equally many in all groups. Who lends to whom does not depend on their number."""
    if len(documents) == 1:
        pairs = [[_Row(documents[0], True)]]
    else:
        last = [[_Row(documents[-1], True), _Row(documents[0], False)]] if len(documents) % 2 else []
        pairs = [
            [_Row(documents[at], True), _Row(documents[at + 1], True)] for at in range(0, len(documents) - 1, 2)
        ] + last
    filler = [replace(row, counted=False) for row in pairs[0]]
    pairs += [filler] * (-len(pairs) % num_groups)
    return pairs[group::num_groups]


def _conditions(config: Config, conditions: Sequence[str] | None, *, num_documents: int) -> tuple[str, ...]:
    if conditions is None:
        conditions = CONDITIONS if config.memory.enabled else (BACKBONE, MEMORY_OFF, LONGEST_WINDOW)
        without = {
            WINDOW_ONLY: config.memory.window_tokens == 0,
            LONGEST_WINDOW: config.evaluation.backbone_window_tokens == 0,
        }
        conditions = [name for name in conditions if not without.get(name)]
    assert conditions and set(conditions) <= set(CONDITIONS), f"conditions are some of {CONDITIONS}"
    if OTHER_MEMORY in conditions and num_documents == 1:
        logger.warning("there is only one held-out document: the memory of another one is not tried")
        conditions = [name for name in conditions if name != OTHER_MEMORY]
    return tuple(conditions)


class _Batch:
    """Some documents, one a row, read in lockstep by the ranks of a memory group with a bank of their own."""

    def __init__(
        self,
        model: LongMem,
        store: TokenStore,
        config: Config,
        rows: Sequence[_Row],
        group: MemoryGroup,
        conditions: Sequence[str],
    ) -> None:
        settings, self.segment_tokens, device = config.evaluation, config.train.segment_tokens, model.device
        self.rows, self.conditions, self.stride = rows, conditions, group.size * self.segment_tokens
        num_tokens = settings.context_tokens + settings.scored_tokens
        self.scored = slice(settings.context_tokens, num_tokens)
        self.longest = longest_window(model.backbone.model.config, settings.backbone_window_tokens)
        # The group's segments end together: what fills them up lies behind all that is read, and has no target.
        length = -(-num_tokens // self.stride) * self.stride
        self.tokens = torch.zeros(len(rows), length, dtype=torch.int64, device=device)  # [B, N]
        self.targets = torch.full_like(self.tokens, IGNORED)
        for row, tokens, targets in zip(rows, self.tokens, self.targets, strict=True):
            # One token more, where the document has it: the target of the last one.
            piece = torch.from_numpy(store.tokens(row.document, 0, num_tokens + 1)).to(device)
            tokens[:num_tokens], targets[: len(piece) - 1] = piece[:num_tokens], piece[1:]
        self.documents = torch.arange(len(rows), device=device)[:, None].expand(-1, self.segment_tokens)
        self.partners = torch.arange(len(rows), device=device) ^ 1
        bank = None
        if {MEMORY_ON, OTHER_MEMORY, WINDOW_ONLY} & set(conditions):
            remembered = min(config.memory.tokens, num_tokens)
            bank = model.bank(len(rows), num_tokens=remembered, group_size=group.size)
        # A row is one document: within it scope `document` hides nothing, and `group` would show it the others'.
        # An exchange of its own: what an evaluation sends is no part of a training step's traffic.
        self.stream = Stream(model, bank, exchange=exchange_of(group.process_group), scope="lane")

    def score(self, *, after_segment: Callable[[], object]) -> list[DocumentLosses]:
        """Reads the documents to the end, this rank its segments of them.

        Args:
            after_segment: Called after each segment.

        Returns:
            The rows that count.
        """
        own = self.stream.turn.holds(torch.arange(self.scored.start, self.scored.stop))
        losses = {name: torch.zeros(len(self.rows), len(own), dtype=torch.float64) for name in self.conditions}
        first = self.stream.turn.rank * self.segment_tokens
        for start in range(first, self.tokens.shape[1], self.stride):
            segment = slice(start, start + self.segment_tokens)
            before = slice(start - min(self.stream.model.settings.context_tokens, start), start)
            context = Context(self.tokens[:, before], self.documents[:, :1].expand(-1, before.stop - before.start))
            seen = self.stream.feed(self.tokens[:, segment], self.documents, context)
            # Scoring is a matter of the whole group, though some of its segments may lie before what is scored.
            if start - first + self.stride > self.scored.start:
                for name in (one for one in self.conditions if one != LONGEST_WINDOW):
                    found = self._losses(name, seen, self.targets[:, segment])
                    if self.scored.start <= start < self.scored.stop:
                        at = start - self.scored.start
                        losses[name][:, at : at + self.segment_tokens] = found
            after_segment()
        if LONGEST_WINDOW in losses:
            self._score_longest_window(losses[LONGEST_WINDOW])
        counts = ((self.targets[:, self.scored] != IGNORED).cpu() & own).double()  # [B, scored]
        return [
            DocumentLosses(row.document, {name: losses[name][index].numpy() for name in losses}, counts[index].numpy())
            for index, row in enumerate(self.rows)
            if row.counted
        ]

    def _losses(self, condition: str, seen: Seen, targets: Tensor) -> Tensor:
        """Losses of one segment, nats, float32 `[B, T]`."""
        if condition == BACKBONE:
            return self.stream.backbone_losses(seen, targets)
        memory: Mapping[str, Memory] = {MEMORY_OFF: "none", WINDOW_ONLY: "window"}
        # The window stays the row's own: what is borrowed is what retrieval gives.
        borrowed = self.partners if condition == OTHER_MEMORY else None
        return self.stream.losses(seen, targets, memory=memory.get(condition, "own"), retrieve_from=borrowed)

    def _score_longest_window(self, into: Tensor) -> None:
        """Losses by the backbone alone with all that it can take before each token, `[B, scored]`.

        The ranks of a group share the rows; each reads as many, one at a time, for a partitioned backbone.
        """
        group, scored = self.stream.turn, self.scored
        rows = range(group.rank, -(-len(self.rows) // group.size) * group.size, group.size)
        length = scored.stop - scored.start if scored.stop <= self.longest else self.segment_tokens
        for row in rows:
            one = slice(row % len(self.rows), row % len(self.rows) + 1)
            for start in range(scored.start, scored.stop, length):
                stop = min(start + length, scored.stop)
                before = min(start, max(0, self.longest - (stop - start)))
                tokens = self.tokens[one, start - before : stop]
                encoding = self.stream.model.encode(tokens, None, num_context=before)
                found = self.stream.model.backbone_losses(encoding, self.targets[one, start:stop])
                if row < len(self.rows):
                    into[one, start - scored.start : stop - scored.start] = found.to(into)


def longest_window(config: Any, wanted: int | None) -> int:
    """Tokens of the longest ordinary window that a backbone is tried with; None: as many as it was made for."""
    most = getattr(config, "max_position_embeddings", None) or EVERYTHING
    return most if wanted is None else min(most, wanted)
