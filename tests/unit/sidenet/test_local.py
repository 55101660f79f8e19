"""The log-sum-exp of local attention and its gradients, against dense float64."""

from __future__ import annotations

import pytest
import torch

from pipeline.sidenet import local as local_module
from pipeline.sidenet.local import LocalAttention, local_log_sum_exp
from tests.reference_lm import Attention, local_logits

FP32_TOLERANCE = 1e-5  # sums of a few dozen exponentials of size 1
HEADS, KV_HEADS, DIM = 4, 2, 6
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("block_tokens", [1, 5, 128])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_documents", [False, True])
def test_value_and_gradients(
    block_tokens: int,
    slopes: list[float] | None,
    window: int | None,
    has_documents: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_module, "_BLOCK_TOKENS", block_tokens)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, HEADS, 13, DIM, generator=generator).requires_grad_(True)
    key = torch.randn(2, KV_HEADS, 13, DIM, generator=generator).requires_grad_(True)
    documents = torch.tensor([[1] * 4 + [2] * 9, [3] * 13]) if has_documents else None
    grad = torch.randn(2, HEADS, 13, generator=generator)
    local = LocalAttention(0.7, None if slopes is None else torch.tensor(slopes), window, documents)
    found = local_log_sum_exp(query, key, local)
    found.backward(grad)

    exact_query, exact_key = (x.detach().double().requires_grad_(True) for x in (query, key))
    shared = exact_key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = local_logits(exact_query, shared, Attention(0.7, slopes=slopes, window=window), documents)
    expected = torch.logsumexp(logits, dim=-1)
    expected.backward(grad.double())
    torch.testing.assert_close(found.double(), expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    for mine, theirs in ((query, exact_query), (key, exact_key)):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


def test_the_first_token_sees_itself_only() -> None:
    query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    found = local_log_sum_exp(query, key, LocalAttention(0.5))
    torch.testing.assert_close(found[0, 0], torch.tensor([2.0, 2.0 + 0.6931472]))


def test_half_precision_comes_back_as_fp32_with_gradients_in_its_own_dtype() -> None:
    query = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    found = local_log_sum_exp(query, torch.randn(1, 1, 3, 4, dtype=torch.bfloat16), LocalAttention(0.5))
    found.sum().backward()
    assert found.dtype == torch.float32
    assert query.grad is not None
    assert query.grad.dtype == torch.bfloat16
