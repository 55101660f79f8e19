"""What held-out documents lost: means over their tokens with standard errors, as plain JSON and as a small table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.report import aligned, plain
from eval.scorer import (
    BACKBONE,
    CONDITIONS,
    LABELS,
    LONGEST_WINDOW,
    MEMORY_OFF,
    MEMORY_ON,
    OTHER_MEMORY,
    WINDOW_ONLY,
)
from eval.statistics import Float64Array, mean_and_exponential

PAIRS = (
    (MEMORY_ON, MEMORY_OFF),
    (MEMORY_ON, BACKBONE),
    (MEMORY_ON, OTHER_MEMORY),
    (MEMORY_ON, WINDOW_ONLY),
    (OTHER_MEMORY, WINDOW_ONLY),
    (MEMORY_ON, LONGEST_WINDOW),
)


@dataclass(frozen=True)
class DocumentLosses:
    """The scored tokens of one document under all conditions.

    Attributes:
        document: Its number in the store.
        losses: Condition to the loss of each token, nats, float64 `[scored_tokens]`; 0 where nothing is predicted.
        counts: 1 where a token is predicted, else 0 (at the last token of the document), float64 `[scored_tokens]`.
    """

    document: int
    losses: Mapping[str, Float64Array]
    counts: Float64Array


@dataclass(frozen=True)
class ConditionResult:
    """One condition.

    Attributes:
        loss_nats: Mean loss of a token.
        loss_standard_error: Of the mean; None where there is only one unit.
        perplexity: `exp(loss_nats)`.
        perplexity_standard_error: `perplexity * loss_standard_error`.
    """

    loss_nats: float
    loss_standard_error: float | None
    perplexity: float
    perplexity_standard_error: float | None


@dataclass(frozen=True)
class PairedDifference:
    """One condition against another on the same tokens.

    Attributes:
        first: The condition that is looked at.
        second: The one that it is held against.
        loss_nats: Mean over tokens of the loss under `first` minus that under `second`; below 0: `first` is better.
        loss_standard_error: Of that mean; None where there is only one unit.
        perplexity_ratio: `exp(loss_nats)`: perplexity under `first` divided by that under `second`.
        perplexity_ratio_standard_error: `perplexity_ratio * loss_standard_error`.
    """

    first: str
    second: str
    loss_nats: float
    loss_standard_error: float | None
    perplexity_ratio: float
    perplexity_ratio_standard_error: float | None


@dataclass(frozen=True)
class PerplexityReport:
    """Loss and perplexity of held-out tokens; every condition scores the same tokens.

    Standard errors take documents as the independent units, for tokens of one document resemble each other. With
    `S_i` the sum of the losses (for a pair: of their differences) of unit `i`, `N_i` its tokens and `n` units,

        mean = sum_i S_i / sum_i N_i
        standard error = sqrt(n / (n - 1) * sum_i (S_i - mean * N_i)^2) / sum_i N_i

    which for units of equal size is the standard deviation of their means divided by `sqrt(n)`. Those of perplexities
    and their ratios follow to first order. With one document its segments are the units (`unit` says so); they are
    not independent, which makes the standard error too small.

    Attributes:
        conditions: By name, in the order of `CONDITIONS`; those that were asked for and could be had.
        differences: `memory_on` against each of the others.
        unit: `document` or `segment`.
        num_documents: Documents scored.
        num_tokens: Tokens predicted, under each condition.
        context_tokens: Tokens of each document read into memory before the scored ones.
        tokens_per_second: Tokens read by all ranks, context included, per second of the whole evaluation.
    """

    conditions: Mapping[str, ConditionResult]
    differences: Sequence[PairedDifference]
    unit: str
    num_documents: int
    num_tokens: int
    context_tokens: int
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON.

        Returns:
            The fields by name; a number that is not finite is None.
        """
        content: dict[str, Any] = plain(asdict(self))
        return content

    def table(self, *, markdown: bool = False) -> str:
        """The report for a reader.

        Args:
            markdown: Markdown tables instead of aligned text.

        Returns:
            Lines without a line break at the end.
        """
        conditions = [["held-out tokens", "loss (nats)", "s.e.", "perplexity", "s.e."]]
        for name, result in self.conditions.items():
            loss = [_number(result.loss_nats, "{:.4f}"), _number(result.loss_standard_error, "{:.4f}")]
            perplexity = [_number(result.perplexity, "{:.2f}"), _number(result.perplexity_standard_error, "{:.2f}")]
            conditions.append([LABELS[name], *loss, *perplexity])
        differences = [["paired difference", "loss (nats)", "s.e.", "perplexity", "s.e."]]
        for pair in self.differences:
            loss = [_number(pair.loss_nats, "{:+.4f}"), _number(pair.loss_standard_error, "{:.4f}")]
            ratio = [_number(pair.perplexity_ratio, "{:.1%}"), _number(pair.perplexity_ratio_standard_error, "{:.1%}")]
            label = f"{LABELS[pair.first][:3]} - {LABELS[pair.second][:3]}, perplexity as ratio"
            differences.append([label, *loss, *ratio])
        blocks = [conditions, differences] if self.differences else [conditions]
        summary = (
            f"{self.num_documents} documents, {self.num_tokens:,} tokens scored, each document after "
            f"{self.context_tokens:,} tokens of context; standard errors by {self.unit}; "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )
        return "\n\n".join([*aligned(blocks, markdown=markdown), summary])


def summarise(
    documents: Sequence[DocumentLosses], *, context_tokens: int, segment_tokens: int, seconds: float
) -> PerplexityReport:
    """Works out a report; the order of the documents does not matter.

    Args:
        documents: The documents of all ranks, each once, all with the same conditions and scored tokens.
        context_tokens: Tokens of each read into memory before the scored ones.
        segment_tokens: Tokens of a segment, the unit when there is only one document.
        seconds: Time that the evaluation took.

    Returns:
        The report.
    """
    documents = sorted(documents, key=lambda one: one.document)  # the same sums to the last bit on every rank
    unit = "document" if len(documents) > 1 else "segment"
    length = len(documents[0].counts) if len(documents) > 1 else segment_tokens
    counts = np.stack([one.counts for one in documents]).reshape(-1, length)
    names = [name for name in CONDITIONS if name in documents[0].losses]
    losses = {name: np.stack([one.losses[name] for one in documents]).reshape(-1, length) for name in names}
    num_read = len(documents) * (context_tokens + len(documents[0].counts))
    return PerplexityReport(
        conditions={name: ConditionResult(*mean_and_exponential(losses[name], counts)) for name in names},
        differences=[
            PairedDifference(first, second, *mean_and_exponential(losses[first] - losses[second], counts))
            for first, second in PAIRS
            if first in losses and second in losses
        ],
        unit=unit,
        num_documents=len(documents),
        num_tokens=int(counts.sum()),
        context_tokens=context_tokens,
        tokens_per_second=num_read / seconds,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
