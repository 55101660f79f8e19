"""Means with their uncertainty: what is repeated independently are documents and items, never tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

Float64Array = npt.NDArray[np.float64]
Numbers = Sequence[float] | Float64Array
RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where it may well lie.

    Attributes:
        mean: The mean over all items.
        low: Lower end of the 95 % interval; None where there is only one item.
        high: Upper end.
        num_items: Items that were resampled.
    """

    mean: float
    low: float | None
    high: float | None
    num_items: int

    def text(self, form: str = "{:.3f}") -> str:
        """As a cell of a table: `mean [low, high]`."""
        if self.low is None or self.high is None:
            return form.format(self.mean)
        return f"{form.format(self.mean)} [{form.format(self.low)}, {form.format(self.high)}]"


def interval(sums: Numbers, sizes: Numbers | None = None) -> Interval:
    """Mean over items, and its 95 % interval by bootstrap over items (percentiles of 2,000 resamples, seed 0).

    For a paired difference give the differences of each item.

    Args:
        sums: Sum of the values of each item.
        sizes: How many values each item has; None: one.

    Returns:
        The sum of all divided by their number, with its interval.
    """
    values = np.asarray(sums, dtype=np.float64)
    weights = np.ones_like(values) if sizes is None else np.asarray(sizes, dtype=np.float64)
    assert len(values) == len(weights) > 0 and weights.sum() > 0, "nothing was scored"
    mean = float(values.sum() / weights.sum())
    if len(values) < 2:
        return Interval(mean, None, None, len(values))

    def ratio(values: Any, weights: Any, axis: int = -1) -> Any:
        return values.sum(axis=axis) / weights.sum(axis=axis)

    found = bootstrap(
        (values, weights),
        ratio,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        paired=True,
        vectorized=True,
        method="percentile",
        batch=max(1, 2**22 // len(values)),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


def mean_and_exponential(values: Float64Array, counts: Float64Array) -> tuple[float, float | None, float, float | None]:
    """Mean over counted tokens with its standard error; units, not tokens, are independent of each other.

    With `S_i` the sum of the values of unit `i`, `N_i` its tokens and `n` units,

        mean = sum_i S_i / sum_i N_i
        standard error = sqrt(n / (n - 1) * sum_i (S_i - mean * N_i)^2) / sum_i N_i

    Args:
        values: `[units, tokens]`.
        counts: 1 where a token counts, else 0, of the same shape.

    Returns:
        Mean and standard error, then both for the exponential of the mean; errors are None where there is one unit.
    """
    sums, sizes = values.sum(axis=1), counts.sum(axis=1)
    total = sizes.sum()
    assert total > 0, "no token has a successor to predict"
    mean = sums.sum() / total
    with np.errstate(over="ignore"):  # a diverged model has perplexity inf
        exponential = float(np.exp(mean))
    num_units = len(sums)
    if num_units < 2:
        return float(mean), None, exponential, None
    squares = ((sums - mean * sizes) ** 2).sum()
    error = float(math.sqrt(num_units / (num_units - 1) * squares) / total)
    return float(mean), error, exponential, exponential * error
