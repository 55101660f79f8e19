"""Rows that are run at once: padded, dealt to the ranks of a memory group, and their scores collected again.

Shapes: `B` texts at once on a rank, `T` tokens of the longest, `R` rows of the text that has most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.scorer import Row, Tokens
from pipeline.memory.exchange import Exchange


@dataclass(frozen=True)
class Batch:
    """Texts of one forward pass: this rank's, and all ranks'.

    Attributes:
        numbers: Of this rank's texts; the last ones may be there twice.
        all_numbers: Of the texts of the group.
        tokens: int64 `[B, T]`.
        shared: How many tokens all texts, of other passes, too, begin with alike.
    """

    numbers: Sequence[int]
    all_numbers: Sequence[int]
    tokens: Tensor
    shared: int

    def of_all_ranks(self, values: Tensor, exchange: Exchange) -> dict[int, Tensor]:
        """What the ranks of the group found for their texts, by number. Collective for the group."""
        gathered = exchange.all_gather(values, purpose="scores")().flatten(0, 1)
        return dict(zip(self.all_numbers, gathered, strict=False))


@dataclass(frozen=True)
class Inputs:
    """What is read of rows: all but the last token, which is only predicted; once, where rows begin alike so far.

    Attributes:
        rows: The rows.
        texts: The different ones, int64 `[any]` each.
        rows_of: Of each text, the numbers of its rows.
    """

    rows: Sequence[Row]
    texts: Sequence[Tokens]
    rows_of: Sequence[Sequence[int]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Inputs:
        """Those of rows."""
        by_text: dict[bytes, list[int]] = {}
        for number, row in enumerate(rows):
            assert 0 < row.num_scored < len(row.tokens), "the first token of a row has nothing before it"
            by_text.setdefault(row.tokens[:-1].tobytes(), []).append(number)
        return cls(rows, [rows[numbers[0]].tokens[:-1] for numbers in by_text.values()], list(by_text.values()))

    def scored(self, part: Batch) -> tuple[Tensor, Tensor]:
        """Where this rank's rows of a pass are scored: text, row of it and place, int64 `[3, n]`; and targets `[n]`."""
        places, targets = [], []
        for at, number in enumerate(part.numbers):
            for slot, row in enumerate(self.rows[one] for one in self.rows_of[number]):
                places += [(at, slot, place) for place in range(row.scored.start, row.scored.stop)]
                targets += row.tokens[-row.num_scored :].tolist()
        device = part.tokens.device
        return torch.tensor(places, device=device).T, torch.tensor(targets, device=device)

    def collect(self, part: Batch, where: Tensor, values: Tensor, exchange: Exchange) -> dict[int, np.ndarray]:
        """Scores of the rows of a pass, by number. Collective for the group.

        Args:
            part: The pass.
            where: As `scored` has it.
            values: What this rank found there, float32 `[n, ...]`.
            exchange: The group.

        Returns:
            float64 `[num_scored, ...]` each.
        """
        most = max(map(len, self.rows_of))
        found = values.new_zeros(len(part.tokens), most, part.tokens.shape[1], *values.shape[1:])
        found[tuple(where)] = values
        return {
            row: of_text[slot, self.rows[row].scored].double().cpu().numpy()
            for number, of_text in part.of_all_ranks(found, exchange).items()
            for slot, row in enumerate(self.rows_of[number])
        }


def batches(
    texts: Sequence[Tokens], exchange: Exchange, *, num_context: int, tokens_at_once: int, device: torch.device
) -> Iterator[Batch]:
    """Deals texts to the ranks of a group, as many as are run at once, padded on the right.

    Args:
        texts: int64 `[any]` each.
        exchange: The group, all of whose ranks are dealt as many.
        num_context: Tokens of left context before each.
        tokens_at_once: Tokens of texts, context included, on a rank.
        device: Where they go.

    Yields:
        This rank's texts.
    """
    size, longest, shared = exchange.size, most_tokens(texts), _shared(texts)
    at_once = max(1, tokens_at_once // (longest + num_context)) * size
    for first in range(0, len(texts), at_once):
        numbers = list(range(first, min(first + at_once, len(texts))))
        each = -(-len(numbers) // size)
        padded = numbers + numbers[-1:] * (each * size - len(numbers))
        own = padded[exchange.rank * each : (exchange.rank + 1) * each]
        tokens = torch.zeros(each, max(len(texts[number]) for number in numbers), dtype=torch.int64)
        for row, number in zip(tokens, own, strict=True):
            row[: len(texts[number])] = torch.from_numpy(np.asarray(texts[number], dtype=np.int64))
        yield Batch(own, numbers, tokens.to(device), shared)


def most_tokens(texts: Sequence[Tokens]) -> int:
    """Tokens of the longest text."""
    return max(len(text) for text in texts)


def _shared(texts: Sequence[Tokens]) -> int:
    """How many tokens texts begin with alike."""
    shortest = min(len(text) for text in texts)
    alike = np.stack([text[:shortest] for text in texts])
    differs = np.flatnonzero((alike != alike[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest
