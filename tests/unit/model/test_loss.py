"""Cross-entropy in pieces, against float64 autograd."""

from __future__ import annotations

import pytest
import torch

from pipeline.model.loss import IGNORED, Head, token_losses

FP32_TOLERANCE = 1e-5  # sums over 40 logits of size 1
TOKENS, HIDDEN, VOCABULARY = 11, 6, 40


@pytest.mark.parametrize("piece_tokens", [1, 4, 11, 64])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_losses_and_gradient(piece_tokens: int, has_bias: bool, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_(True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator) if has_bias else None
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[[2, 10]] = IGNORED
    each = torch.randn(TOKENS, generator=generator)  # not the same gradient for every token

    losses = token_losses(hidden, targets, Head(weight, bias, softcap), piece_tokens=piece_tokens)
    (losses * each).sum().backward()

    exact = hidden.detach().double().requires_grad_(True)
    logits = exact @ weight.double().T + (0 if bias is None else bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.zeros(TOKENS, dtype=torch.float64)
    for token in range(TOKENS):
        if targets[token] != IGNORED:
            expected[token] = -torch.log(torch.exp(logits[token, targets[token]]) / torch.exp(logits[token]).sum())
    (expected * each).sum().backward()

    assert losses[2] == losses[10] == 0
    torch.testing.assert_close(losses.double(), expected, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    assert hidden.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    assert torch.equal(hidden.grad[2], torch.zeros(HIDDEN))


def test_no_gradient_into_the_head_and_none_where_none_is_wanted() -> None:
    weight = torch.randn(VOCABULARY, HIDDEN).requires_grad_(True)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    losses = token_losses(torch.randn(TOKENS, HIDDEN), targets, Head(weight), piece_tokens=4)
    assert not losses.requires_grad
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_(True)
    token_losses(hidden, targets, Head(weight), piece_tokens=4).sum().backward()
    assert weight.grad is None


def test_all_ignored_is_zero_without_nan() -> None:
    hidden = torch.randn(3, HIDDEN).requires_grad_(True)
    losses = token_losses(hidden, torch.full((3,), IGNORED), Head(torch.randn(VOCABULARY, HIDDEN)), piece_tokens=2)
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros(3))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros(3, HIDDEN))


def test_whole_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Head.logits

    def logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return original(head, hidden)

    monkeypatch.setattr(Head, "logits", logits)
    hidden, targets = torch.randn(TOKENS, HIDDEN), torch.zeros(TOKENS, dtype=torch.int64)
    token_losses(hidden, targets, Head(torch.randn(VOCABULARY, HIDDEN)), piece_tokens=4)
    assert seen == [4, 4, 3]


def test_bf16_logits_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, 64, generator=generator).bfloat16()
    weight = torch.randn(3 * VOCABULARY, 64, generator=generator).bfloat16()
    bias = torch.randn(3 * VOCABULARY, generator=generator).bfloat16()
    logits = Head(weight, bias, vocabulary_at_once=50).logits(hidden)
    exact = hidden.double() @ weight.double().T + bias.double()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    rounded = torch.nn.functional.linear(hidden, weight, bias).double()
    assert float((rounded - exact).abs().max()) > 100 * FP32_TOLERANCE  # what bf16 logits would be off by


def test_the_weight_of_a_token_is_not_rounded_to_bf16() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, 512, generator=generator).bfloat16()
    head = Head(torch.randn(VOCABULARY, 512, generator=generator).bfloat16())
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def gradient(weight: float) -> torch.Tensor:
        tokens = hidden.clone().requires_grad_(True)
        (token_losses(tokens, targets, head, piece_tokens=4) * weight).sum().backward()
        assert tokens.grad is not None
        return tokens.grad.double()

    weight = 3.0075  # bf16 knows 3 and 3.0156
    of_one = gradient(1.0)
    found = float((gradient(weight) * of_one).sum() / (of_one**2).sum())
    assert abs(found - weight) < 1e-3
