"""Rows that are run at once: padded, dealt to the ranks of a memory group, and their scores collected again.

Shapes: `B` rows at once on a rank, `T` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.scorer import Row, Tokens
from pipeline.memory.exchange import Exchange
from pipeline.model.loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: this rank's, and all ranks'.

    Attributes:
        numbers: Of this rank's rows; the last ones may be there twice.
        all_numbers: Of the rows of the group.
        tokens: int64 `[B, T]`.
        shared: How many tokens all rows of the group begin with alike.
    """

    numbers: Sequence[int]
    all_numbers: Sequence[int]
    tokens: Tensor
    shared: int

    def targets(self, rows: Sequence[Row]) -> Tensor:
        """Of this rank's rows, int64 `[B, T]`; IGNORED where nothing is scored."""
        targets = torch.full_like(self.tokens, IGNORED)
        for target, number in zip(targets, self.numbers, strict=True):
            row = rows[number]
            assert 0 < row.num_scored < len(row.tokens), "the first token of a row has nothing before it"
            target[row.scored] = torch.from_numpy(row.tokens[-row.num_scored :]).to(target)
        return targets

    def scored(self, values: Tensor, rows: Sequence[Row], exchange: Exchange) -> list[Any]:
        """Values `[B, T, ...]` at the scored places of the group's rows, float64 `[num_scored, ...]`. Collective."""
        found = self.of_all_ranks(values, exchange)
        return [of_row[rows[number].scored].double().cpu().numpy() for number, of_row in found.items()]

    def of_all_ranks(self, values: Tensor, exchange: Exchange) -> dict[int, Tensor]:
        """What the ranks of the group found for their rows, by number. Collective for the group."""
        gathered = exchange.all_gather(values, purpose="scores")().flatten(0, 1)
        return dict(zip(self.all_numbers, gathered, strict=False))


def batches(
    texts: Sequence[Tokens], exchange: Exchange, *, num_context: int, tokens_at_once: int, device: torch.device
) -> Iterator[Batch]:
    """Deals rows to the ranks of a group, as many as are run at once, padded on the right.

    Args:
        texts: int64 `[any]` each.
        exchange: The group, all of whose ranks are dealt as many.
        num_context: Tokens of left context before each.
        tokens_at_once: Tokens of rows, context included, on a rank.
        device: Where they go.

    Yields:
        This rank's rows.
    """
    size, longest = exchange.size, most_tokens(texts)
    at_once = max(1, tokens_at_once // (longest + num_context)) * size
    for first in range(0, len(texts), at_once):
        numbers = list(range(first, min(first + at_once, len(texts))))
        each = -(-len(numbers) // size)
        padded = numbers + numbers[-1:] * (each * size - len(numbers))
        own = padded[exchange.rank * each : (exchange.rank + 1) * each]
        tokens = torch.zeros(each, max(len(texts[number]) for number in numbers), dtype=torch.int64)
        for row, number in zip(tokens, own, strict=True):
            row[: len(texts[number])] = torch.from_numpy(np.asarray(texts[number], dtype=np.int64))
        yield Batch(own, numbers, tokens.to(device), _shared([texts[number] for number in numbers]))


def most_tokens(texts: Sequence[Tokens]) -> int:
    """Tokens of the longest text."""
    return max(len(text) for text in texts)


def _shared(texts: Sequence[Tokens]) -> int:
    """How many tokens texts begin with alike."""
    shortest = min(len(text) for text in texts)
    alike = np.stack([text[:shortest] for text in texts])
    differs = np.flatnonzero((alike != alike[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest
