"""Position rules and rotary embeddings by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.positions import PositionEncoding, PositionRule

FP32_TOLERANCE = 1e-6  # cosines of small angles


@pytest.mark.parametrize(
    ("text", "rule", "limit"),
    [
        ("none", PositionRule("none"), -1),
        ("true", PositionRule("true"), math.inf),
        ("fixed:300", PositionRule("fixed", 300), -1),
        ("clamp:512", PositionRule("clamp", 512), 512),
    ],
)
def test_parse(text: str, rule: PositionRule, limit: float) -> None:
    assert PositionRule.parse(text) == rule
    assert rule.near_limit == limit


def test_rotation_by_hand() -> None:
    """A quarter turn of the pair (0, 2), half a turn of (1, 3), the rest untouched; the factor on what is turned."""
    encoding = PositionEncoding(torch.tensor([math.pi / 2, math.pi]), attention_scaling=2.0)
    found = encoding.rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([[-6.0, -4.0, 2.0, -8.0, 5.0]]), atol=FP32_TOLERANCE, rtol=1e-6)


def test_only_the_difference_of_positions_counts() -> None:
    encoding = PositionEncoding(torch.tensor([1.0, 0.3]))
    q, k = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([1.5, 0.2, -0.7, 1.0])
    near = encoding.rotate(q, torch.tensor(5)) @ encoding.rotate(k, torch.tensor(2.5))
    far = encoding.rotate(q, torch.tensor(0)) @ encoding.rotate(k, torch.tensor(-2.5))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


def test_without_frequencies_nothing_is_rotated() -> None:
    x = torch.randn(3, 4)
    assert PositionEncoding(slopes=torch.ones(2)).rotate(x, torch.arange(3)) is x


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_a_far_query_meets_unrotated_keys_as_if_they_were_rotated(scaling: float) -> None:
    """With a partial rotation and YaRN's factor, which belongs on the turned part of the query and of the key."""
    encoding = PositionEncoding(torch.tensor([1.0, 0.3]), attention_scaling=scaling)
    q, k = torch.randn(6), torch.randn(6)
    for rule in (PositionRule("fixed", 9), PositionRule("clamp", 9)):
        expected = encoding.rotate(q, torch.tensor(9)) @ encoding.rotate(k, torch.tensor(0))
        torch.testing.assert_close(rule.far_query(q, encoding) @ k, expected, atol=1e-5, rtol=1e-5)
    assert PositionRule("none").far_query(q, encoding) is q


def test_dtype_stays() -> None:
    encoding = PositionEncoding(torch.tensor([1.0, 0.3]))
    assert encoding.rotate(torch.randn(2, 4).bfloat16(), torch.arange(2)).dtype == torch.bfloat16
