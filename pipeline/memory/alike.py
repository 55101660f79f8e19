"""Chunks whose keys are the same, bit for bit: they score the same, so that one of them is scored for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, with bits everywhere


class Kinds(NamedTuple):
    """Rows sorted into kinds that are the same.

    Attributes:
        firsts: The number of a row of each kind, int64 `[K]`.
        of_row: The kind of each row, int64 `[s]`.
    """

    firsts: Tensor
    of_row: Tensor


def kinds_of(rows: Tensor) -> Kinds:
    """Sorts rows into kinds, by a code of each, in the space of a few numbers a row.

    Rows of one kind are the same. Where two different rows happen to have one code, those that are the same as one of
    them may be several kinds.

    Args:
        rows: float32 `[s, D]`.

    Returns:
        The kinds.
    """
    columns = rows.view(torch.int32).unbind(-1)
    code = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in columns:
        code = code * _FACTOR + column  # wraps round
    order = code.argsort(stable=True)
    is_new = torch.zeros_like(order, dtype=torch.bool)
    for column in columns:
        in_order = column[order]
        is_new[1:] |= in_order[1:] != in_order[:-1]
    of_row = torch.empty_like(order)
    of_row[order] = is_new.cumsum(0)
    is_new[:1] = True
    return Kinds(order[is_new], of_row)
