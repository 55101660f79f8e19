"""What tasks ask of a model: read a past into memory, then score what may follow it, or write on, under any condition.

Shapes: `T` tokens of a row, `P` tokens that were remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]

BACKBONE, MEMORY_OFF, MEMORY_ON, OTHER_MEMORY = "backbone", "memory_off", "memory_on", "other_memory"
WINDOW_ONLY, LONGEST_WINDOW = "window_only", "longest_window"
LABELS: Mapping[str, str] = {
    BACKBONE: "(a) backbone alone, same window",
    MEMORY_OFF: "(b) memory off",
    MEMORY_ON: "(c) memory on",
    OTHER_MEMORY: "(d) memory of another document",
    WINDOW_ONLY: "(e) window only, nothing retrieved",
    LONGEST_WINDOW: "(f) backbone alone, longest window",
}
CONDITIONS = tuple(LABELS)


@dataclass(frozen=True)
class Row:
    """A text that follows a past: a prompt, and what is scored.

    Attributes:
        tokens: int64 `[T]`.
        num_scored: How many of its last tokens are scored; less than `T`, for the first has nothing before it.
    """

    tokens: Tokens
    num_scored: int

    @property
    def scored(self) -> slice:
        """The places that predict what is scored."""
        return slice(len(self.tokens) - 1 - self.num_scored, len(self.tokens) - 1)


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of the scored tokens of a row.

    Attributes:
        losses: Nats, float64 `[num_scored]`.
        is_likeliest: Whether each of them is the likeliest one at its place: what greedy decoding would write.
    """

    losses: Losses
    is_likeliest: bool


@dataclass(frozen=True)
class How:
    """How a text is read on, beside its condition.

    Attributes:
        condition: One of `CONDITIONS`.
        memory_tokens: How far back memory reaches, at most the model's `memory.tokens`; None: so far.
        window_tokens: The recent window; None: the model's `memory.window_tokens`. With `LONGEST_WINDOW` that of
            the backbone alone; None: the longest.
    """

    condition: str
    memory_tokens: int | None = None
    window_tokens: int | None = None


class Scorer(Protocol):
    """What tasks ask of a model. In a memory group every rank asks the same together and is told the same.

    Attributes:
        segment_tokens: Tokens of a segment; a past is of whole ones.
        longest: Tokens of the longest ordinary window of the backbone.
        conditions: Those of `CONDITIONS` that this model has.
    """

    segment_tokens: int
    longest: int
    conditions: tuple[str, ...]

    def remember(self, *lanes: Tokens) -> Any:
        """Reads texts into memory, each into a lane; they are cut on the left to the same whole segments.

        Args:
            *lanes: int64 `[any]` each; may be empty.

        Returns:
            The past; its `forgotten` says how many tokens of each text memory has no room for.
        """
        ...

    def losses(
        self, past: Any, rows: Sequence[Row], conditions: Sequence[str], *, lane: int = 0, other: int = 1
    ) -> dict[str, list[Losses]]:
        """Losses of the scored tokens of rows, each of which follows the past; nothing is remembered.

        Args:
            past: What they follow.
            rows: The rows.
            conditions: Under what; of `conditions`.
            lane: Whose past it is.
            other: The lane that `OTHER_MEMORY` retrieves from.

        Returns:
            By condition, of each row: nats, float64 `[num_scored]`.
        """
        ...

    def likelihoods(
        self, past: Any, rows: Sequence[Row], condition: str, *, lane: int = 0, other: int = 1
    ) -> list[Likelihood]:
        """As `losses` under one condition, and whether the scored tokens are what the model itself would write.

        Args:
            past: As in `losses`.
            rows: As in `losses`.
            condition: Under what.
            lane: As in `losses`.
            other: As in `losses`.

        Returns:
            Of each row.
        """
        ...

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
        """What the model writes after each prompt, the likeliest token at a time.

        Args:
            past: What the prompts follow.
            prompts: int64 `[any]` each, at least one token.
            condition: Under what.
            max_tokens: Written at most.
            is_done: Whether a text that was written is long enough.
            guesses: What each may well write: one pass finds how much of it is so. Changes nothing but the time.
            lane: As in `losses`.
            other: As in `losses`.

        Returns:
            What was written for each prompt.
        """
        ...

    def follow(
        self, texts: Sequence[Tokens], *, first_scored: int, num_tokens: int, hows: Mapping[str, How]
    ) -> dict[str, list[Losses]]:
        """Reads documents in order, segment by segment, each into its own lane, and scores the tokens of a stretch.

        Args:
            texts: The documents, an even number of them (text `i` lends its memory to text `i ^ 1`) or one; each has
                at least `num_tokens` tokens, and may have one more, the target of the last.
            first_scored: Place of the first token that predicts a scored one; a multiple of `segment_tokens`.
            num_tokens: Place behind the last one that does, a multiple of `segment_tokens`.
            hows: Names, and what each means.

        Returns:
            By name, of each text: nats, float64 `[num_tokens - first_scored]`; 0 where a text has no next token.
        """
        ...


def split(tokens: Sequence[int] | Tokens, segment_tokens: int) -> tuple[Tokens, Tokens]:
    """Cuts a text into a past of whole segments and a rest that rows begin with.

    Args:
        tokens: The text.
        segment_tokens: Tokens of a segment.

    Returns:
        The past and the rest, which has 1 to `segment_tokens` tokens (none if there is no text): what follows it is
        predicted from it.
    """
    whole = np.asarray(tokens, dtype=np.int64)
    at = max(0, len(whole) - 1) // segment_tokens * segment_tokens
    return whole[:at], whole[at:]
