"""An inspection that no model made: a question about a made-up story, with the chunks that would answer it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

from pipeline.face.inspection import (
    Inspection,
    LayerGates,
    ReadChunk,
    RememberedDocument,
    RememberedText,
    SeenToken,
)

STORY = "The lighthouse at Orra.txt"
DOCUMENTS = (STORY, "Letters from the harbour.txt", "A short history of knots.txt")
LAYERS = (12, 18, 24)
HEADS = 9
PROMPT = (
    "The keeper of the lighthouse was called Ansel Brandt, and he had one rule: the lamp must burn until the gulls "
    "wake.\n\nThat autumn a stranger came up the path. She said that her name was Ottoline and that she mended clocks."
    " Ansel Brandt showed her the great brass clock of the tower, which had stopped at nineteen minutes past four on "
    "the night when the Meridian went down. \u201cNobody winds it,\u201d he said, \u201cbecause of the rule.\u201d\n\n"
    "She laughed, opened her case and took out a key no longer than a finger. It fitted."
)
CHANGES = {
    " Ansel": -3.1, " Brandt": -5.42, " Ottoline": -4.3, " clocks": -1.6, " gulls": -2.4, " lamp": -0.7,
    " nineteen": -3.8, " four": -1.2, " Meridian": -6.05, " brass": -0.9, " rule": -0.64, " keeper": -0.3,
    " lighthouse": -1.1, " stranger": 0.35, " path": 0.72, " laughed": 1.3, " finger": 2.15, " fitted": 0.2,
    " autumn": -0.15, " key": 0.55, " winds": -0.24,
}  # fmt: skip
PASSAGES = (
    " Ansel Brandt, keeper",
    " mended clocks, she",
    " the Meridian sank with",
    " the lamp, until gulls",
    " nineteen past\nfour",
    " said Ottoline, and",
    " Brandt's only rule",
    " of the brass clock",
    " up the long path",
    " a knot that holds",
)


def made_up_inspection() -> Inspection:
    """The same at every call."""
    chance = random.Random(7)
    texts = re.findall(r"\n\n| ?\w+| ?[^\w\s]", PROMPT)
    tokens = [_token(number, text, chance) for number, text in enumerate(texts)]
    predicted = [token for token in tokens if token.loss_with is not None]
    return inspection_of(
        tokens,
        perplexity_with=math.exp(sum(token.loss_with or 0.0 for token in predicted) / len(predicted)),
        perplexity_without=math.exp(sum(token.loss_without or 0.0 for token in predicted) / len(predicted)),
    )


def inspection_of(
    tokens: Sequence[SeenToken],
    *,
    title: str = "What LongMem remembers",
    document: str = STORY,
    perplexity_with: float | None = 11.8,
    perplexity_without: float | None = 19.6,
) -> Inspection:
    """The made-up memory and gates around some tokens."""
    chance = random.Random(3)
    sizes = (3268, 1904, 2210)
    gates = [
        LayerGates(
            layer=layer,
            weights=[round(min(0.98, chance.betavariate(1.2 + layer / 12, 2.5)), 3) for _ in range(HEADS)],
            learnt=[round(chance.gauss(0.2, 0.8), 3) for _ in range(HEADS)],
        )
        for layer in LAYERS
    ]
    return Inspection(
        title=title,
        model="SmolLM2-135M, SideNet of 30 layers",
        memory=RememberedText(
            names=["orra.memory"],
            documents=[
                RememberedDocument(name, size) for name, size in zip((document, *DOCUMENTS[1:]), sizes, strict=True)
            ],
        ),
        fusion="joint",
        tokens=tokens,
        gates=gates,
        perplexity_with=perplexity_with,
        perplexity_without=perplexity_without,
    )


def _token(number: int, text: str, chance: random.Random) -> SeenToken:
    if number == 0:
        return SeenToken(text, None, None, [])
    change = CHANGES.get(text, chance.gauss(0.0, 0.06))
    lost = max(0.05, chance.expovariate(0.6)) + max(0.0, -change)
    chunks = [_chunk(text.strip(), layer, chance) for layer in LAYERS for _ in range(chance.randint(3, 9))]
    return SeenToken(text, lost + change, lost, chunks)


def _chunk(word: str, layer: int, chance: random.Random) -> ReadChunk:
    place = chance.randrange(len(PASSAGES))
    fits = len(word) > 3 and word in PASSAGES[place]
    return ReadChunk(
        text=PASSAGES[place],
        document=DOCUMENTS[2] if place == len(PASSAGES) - 1 else DOCUMENTS[place % 2],
        distance=chance.randint(300, 7000),
        score=chance.gauss(14.0 if fits else 8.0, 2.0),
        share=chance.uniform(0.12, 0.34) if fits else min(0.6, chance.expovariate(50)),
        layer=layer,
        heads=tuple(sorted(chance.sample(range(HEADS), chance.randint(1, 5)))),
    )
