"""Intervals against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from eval.controls import compare, missing
from eval.scorer import BACKBONE, CONDITIONS, MEMORY_OFF, MEMORY_ON
from eval.statistics import interval


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(values)
    error = values.std() / len(values) ** 0.5  # the bootstrap's own: without Bessel's correction
    half = norm.ppf(0.975) * error
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)
    assert found.num_items == 400


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    hits = [1.0] * 30 + [0.0] * 70
    found = interval(hits)
    # A resample of n hits and misses has Binomial(n, share) hits.
    exact = binom.ppf([0.025, 0.975], 100, 0.3) / 100
    assert found.mean == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.0101)  # one hit more or less


def test_items_count_by_their_sizes():
    assert interval([10.0, 1.0], [5.0, 1.0]).mean == pytest.approx(11 / 6)
    always = interval([6.0, 2.0, 4.0], [3.0, 1.0, 2.0])  # two a token in each
    assert (always.low, always.high) == pytest.approx((2.0, 2.0))


def test_one_item_has_no_interval():
    found = interval([2.0], [4.0])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    assert found.text("{:.2f}") == "0.50"


def test_differences_are_paired():
    on, off = [1.0, 5.0, 9.0], [2.0, 6.0, 10.0]  # items differ much, differences not at all
    found = compare({MEMORY_ON: on, MEMORY_OFF: off})
    difference = found.differences[MEMORY_OFF]
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert (found.means[MEMORY_ON].high or 0) > 6
    assert set(found.differences) == {MEMORY_OFF}


def test_a_table_states_items_and_says_what_it_lacks():
    found = compare({BACKBONE: [0.0, 1.0], MEMORY_ON: [1.0, 1.0]})
    table = found.table("Share", "share right", form="{:.2f}")
    assert [row[0] for row in table.rows] == ["(a) backbone alone, same window", "(c) memory on"]
    assert [row[-1] for row in table.rows] == ["2", "2"]
    assert table.rows[0][2].startswith("+0.50 [") and table.rows[1][2] == "-"
    assert len(missing(found.means)) == len(CONDITIONS) - 2
