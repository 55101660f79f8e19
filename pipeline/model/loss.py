"""Cross-entropy through a frozen LM head, without ever holding all logits.

Shapes: `N` tokens, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # target of a token at which nothing is predicted


@dataclass(frozen=True)
class Head:
    """The LM head while it is whole.

    Attributes:
        weight: `[V, E]`.
        bias: `[V]` or None.
        softcap: Logits are `softcap * tanh(logits / softcap)`; None: as they are.
        vocabulary_at_once: Rows of a bf16 or fp16 weight that a CPU makes float32 at once.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    vocabulary_at_once: int = 8192

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some tokens.

        Args:
            hidden: `[..., E]`.

        Returns:
            float32 `[..., V]`.
        """
        logits = self._products(hidden)
        if self.bias is not None:
            logits += self.bias
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _products(self, hidden: Tensor) -> Tensor:
        """Sums in float32 that are never rounded to the weight's type: bf16 keeps three digits of a logit."""
        if self.weight.dtype == torch.float32:
            return torch.nn.functional.linear(hidden, self.weight)
        if hidden.is_cuda:
            products = torch.mm(hidden.flatten(0, -2), self.weight.T, out_dtype=torch.float32)
            return products.unflatten(0, hidden.shape[:-1])
        logits = hidden.new_empty(*hidden.shape[:-1], len(self.weight), dtype=torch.float32)
        for first in range(0, len(self.weight), self.vocabulary_at_once):
            rows = slice(first, first + self.vocabulary_at_once)
            logits[..., rows] = torch.nn.functional.linear(hidden.float(), self.weight[rows].float())
        return logits


def token_losses(hidden: Tensor, targets: Tensor, head: Head, *, piece_tokens: int) -> Tensor:
    """Cross-entropy of every token.

    The gradient with respect to `hidden` is worked out together with the loss, piece by piece, so that the head is
    needed once and logits are never computed twice; hence only one backward pass is possible, and none into the head.

    Args:
        hidden: `[N, E]`.
        targets: int64 `[N]`; IGNORED where nothing is predicted.
        head: The LM head; not differentiated.
        piece_tokens: Tokens whose logits are held at once.

    Returns:
        Losses in nats, float32 `[N]`; 0 where the target is IGNORED.
    """
    losses: Tensor = _TokenLosses.apply(hidden, targets, head, piece_tokens)
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, piece_tokens: int) -> Tensor:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for first in range(0, len(targets), piece_tokens):
            piece = slice(first, first + piece_tokens)
            logits = head.logits(hidden[piece])
            target, counted = targets[piece].clamp_min(0)[:, None], targets[piece] != IGNORED
            log_sum_exp = logits.logsumexp(dim=-1, keepdim=True)
            losses[piece] = torch.where(counted, (log_sum_exp - logits.gather(-1, target))[:, 0], 0.0)
            if gradient is not None:
                slope = None if head.softcap is None else 1 - (logits / head.softcap) ** 2  # of the tanh
                wrong = logits.sub_(log_sum_exp).exp_()  # softmax; the logits are not needed any more
                wrong.scatter_add_(-1, target, torch.full_like(log_sum_exp, -1.0))
                if slope is not None:
                    wrong.mul_(slope)
                wrong.mul_(counted[:, None])
                gradient[piece] = wrong.to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # One number a token: dLoss/dhidden is linear in the gradient of each token's own loss.
        return (gradient * grads[0][:, None]).to(gradient.dtype), None, None, None
