"""A `Scorer` that knows the answers: what stands in a model's place where a scoring rule is tested, and only there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.scorer import CONDITIONS, OTHER_MEMORY, How, Likelihood, Losses, Row, Tokens

Knows = Callable[[list[int], int, str], float]
"""Loss in nats of a token that follows a text, under a condition."""
Writes = Callable[[list[int], str], list[int]]
"""What is written after a text, under a condition."""


class Texts(list[list[int]]):
    """What was read, by lane."""

    forgotten = 0


class OracleScorer:
    """Answers by rules instead of a model.

    Args:
        knows: The loss of a token.
        writes: What is written.
        segment_tokens: As of a model.
        longest: As of a model.
    """

    conditions = CONDITIONS

    def __init__(
        self,
        knows: Knows = lambda before, token, condition: 1.0,
        writes: Writes = lambda before, condition: [],
        *,
        segment_tokens: int = 16,
        longest: int = 10**6,
    ) -> None:
        self.knows, self.writes, self.segment_tokens, self.longest = knows, writes, segment_tokens, longest
        self.num_remembered = 0

    def remember(self, *lanes: Tokens) -> Any:
        """The texts themselves, cut as the protocol says."""
        self.num_remembered += 1
        length = min(len(lane) for lane in lanes) // self.segment_tokens * self.segment_tokens
        return Texts(list(map(int, lane[len(lane) - length :])) for lane in lanes)

    def losses(
        self, past: Any, rows: Sequence[Row], conditions: Sequence[str], *, lane: int = 0, other: int = 1
    ) -> dict[str, list[Losses]]:
        """As in `Scorer`; `knows` sees the past of the lane (of `other` under `OTHER_MEMORY`) and the row so far."""
        found: dict[str, list[Losses]] = {}
        for name in conditions:
            before = past[other if name == OTHER_MEMORY else lane]
            found[name] = [
                np.array(
                    [
                        self.knows([*before, *map(int, row.tokens[:place])], int(row.tokens[place]), name)
                        for place in range(len(row.tokens) - row.num_scored, len(row.tokens))
                    ]
                )
                for row in rows
            ]
        return found

    def likelihoods(
        self, past: Any, rows: Sequence[Row], condition: str, *, lane: int = 0, other: int = 1
    ) -> list[Likelihood]:
        """As in `Scorer`; the likeliest tokens are those that it writes."""
        losses = self.losses(past, rows, [condition], lane=lane, other=other)[condition]
        found = []
        for row, one in zip(rows, losses, strict=True):
            prompt, wanted = row.tokens[: -row.num_scored], row.tokens[-row.num_scored :].tolist()
            (written,) = self.greedy(
                past, [prompt], condition, max_tokens=len(wanted), is_done=lambda _: False, lane=lane, other=other
            )
            found.append(Likelihood(one, written == wanted))
        return found

    def greedy(
        self,
        past: Any,
        prompts: Sequence[Tokens],
        condition: str,
        *,
        max_tokens: int,
        is_done: Callable[[list[int]], bool],
        guesses: Sequence[Sequence[int]] | None = None,
        lane: int = 0,
        other: int = 1,
    ) -> list[list[int]]:
        """As in `Scorer`."""
        before = past[other if condition == OTHER_MEMORY else lane]
        found = []
        for prompt in prompts:
            written: list[int] = []
            for token in self.writes([*before, *map(int, prompt)], condition)[:max_tokens]:
                written.append(token)
                if is_done(written):
                    break
            found.append(written)
        return found

    def follow(
        self, texts: Sequence[Tokens], *, first_scored: int, num_tokens: int, hows: Mapping[str, How]
    ) -> dict[str, list[Losses]]:
        """As in `Scorer`."""
        found: dict[str, list[Losses]] = {}
        for name, how in hows.items():
            found[name] = []
            for text in texts:
                losses = np.zeros(num_tokens - first_scored)
                for place in range(first_scored, min(num_tokens, len(text) - 1)):
                    before = list(map(int, text[: place + 1]))
                    losses[place - first_scored] = self.knows(before, int(text[place + 1]), how.condition)
                found[name].append(losses)
        return found
