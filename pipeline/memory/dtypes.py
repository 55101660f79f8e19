"""What keys and values are stored as: narrower floats, or whole numbers of eight bits with a scale for each token."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_FP16 = torch.finfo(torch.float16).max
_LARGEST_INT8 = 127


def within(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """What fits a floating dtype: in fp16, whose largest number is 65,504, what is larger becomes that."""
    return numbers.clamp(-_LARGEST_FP16, _LARGEST_FP16) if dtype == torch.float16 else numbers


@torch.no_grad()
def quantized(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Stores each token of each head as whole numbers, in units of a 127th of its largest.

    Scales of fp16 would be as good (errors of SmolLM2's keys and values the same in five digits) and save 2 bytes of
    68 (`D = 64`), but they end at 65,504, and at 6e-8.

    Args:
        numbers: Any floating dtype, `[Hkv, ..., D]`.

    Returns:
        int8 of the same shape, and the scales, float32 `[Hkv, ...]`: a number is off by at most half a scale,
        and by float32's rounding.

    Raises:
        ValueError: A number is not finite.
    """
    whole = torch.empty(numbers.shape, dtype=torch.int8, device=numbers.device)
    scales = torch.empty(numbers.shape[:-1], dtype=torch.float32, device=numbers.device)
    for head, own in enumerate(numbers):  # one at a time: float32 of all would be four times what is kept
        scales[head] = own.abs().amax(dim=-1).float() / _LARGEST_INT8
        units = scales[head][..., None]
        parts = own.float() / torch.where(units > 0, units, 1)
        whole[head] = parts.round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    if not bool(scales.isfinite().all()):
        raise ValueError("it holds numbers that are not finite")
    return whole, scales


@torch.no_grad()
def dequantized(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantized` stands for, in a floating dtype, one head at a time."""
    found = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    for head, own in enumerate(numbers):
        found[head] = within(own.float() * scales[head][..., None], dtype)
    return found
