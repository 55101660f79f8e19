"""What memory did to a prompt, as plain data: losses with and without it, the chunks read, the gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReadChunk:
    """A chunk that a token read in one memory layer."""

    text: str
    document: str
    """Name of the document that the chunk is from."""
    distance: int
    """From the token back to the chunk, in tokens."""
    score: float
    share: float
    """Of the token's attention in that layer, mean over all query heads, 0 to 1."""
    layer: int
    heads: tuple[int, ...]
    """The query heads that read it."""


@dataclass(frozen=True)
class SeenToken:
    """A token of the prompt."""

    text: str
    loss_with: float | None
    """Of predicting this token with memory, in nats; None for the first token, which nothing predicts."""
    loss_without: float | None
    chunks: Sequence[ReadChunk]
    left_out: int = 0
    """How many more chunks it read than `chunks` has, all of smaller shares."""


@dataclass(frozen=True)
class LayerGates:
    """How much of its attention every query head of a memory layer gives to memory."""

    layer: int
    weights: Sequence[float]
    """Weight of memory by query head, 0 to 1, mean over the prompt."""
    learnt: Sequence[float]
    """The learnt number `g` by query head."""


@dataclass(frozen=True)
class RememberedDocument:
    """A document in memory and how many of its tokens memory holds."""

    name: str
    tokens: int


@dataclass(frozen=True)
class RememberedText:
    """What memory holds."""

    names: Sequence[str]
    """Of the memories, such as the files that were composed."""
    documents: Sequence[RememberedDocument]


@dataclass(frozen=True)
class Inspection:
    """A prompt, read with and without memory."""

    title: str
    model: str
    memory: RememberedText
    fusion: Literal["gate", "joint"]
    tokens: Sequence[SeenToken]
    gates: Sequence[LayerGates]
    perplexity_with: float | None
    """Of the prompt's predicted tokens; None where there are none."""
    perplexity_without: float | None
