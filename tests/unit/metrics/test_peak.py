"""The peak of a host's memory: what was held counts, also when it is gone again; what came before does not."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.metrics.peak import forget_peak, peak_bytes

HOST, MIB = torch.device("cpu"), 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what the peak was")


def hold(mib: int) -> None:
    torch.ones(mib * MIB // 4)


def grown_by(*sizes: int) -> float:
    """MiB that the peak lies above what was in use, after so many MiB were held one after the other."""
    before = forget_peak(HOST)
    for mib in sizes:
        hold(mib)
    peak = peak_bytes(HOST)
    assert before is not None and peak is not None
    return (peak - before) / MIB


def test_the_most_that_was_held_counts_though_it_is_gone():
    assert 195 < grown_by(200, 50) < 260


def test_a_peak_is_forgotten():
    hold(400)
    assert grown_by(50) < 150
