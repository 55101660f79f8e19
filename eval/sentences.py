"""Text that is made up where a task needs some and no data is at hand: random sentences, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from eval.scorer import Tokens

_ADJECTIVES = "old young tall quiet bitter golden hollow narrow distant careless silver frozen patient wooden"
NOUNS = (
    "captain harbour letter garden widow lantern river teacher orchard soldier bridge miller forest merchant "
    "tower daughter horse prisoner kitchen painter valley violin stranger doctor winter village island mirror"
)
_VERBS = "watched remembered followed painted found lost sold carried forgot visited feared repaired"
_PLACES = "near behind above before beyond under beside without"
_NAMES = "Anna Tobias Marguerite Henry Ludmila Oscar Beatrice Samuel Irene Gregor Clara Edmund"


def sentences(tokenize: Callable[[str], list[int]], num_tokens: int, *, seed: int) -> Tokens:
    """So many tokens of random sentences, int64 `[num_tokens]`."""
    draw, text = random.Random(f"passages {seed}"), np.zeros(0, dtype=np.int64)
    while len(text) < num_tokens:
        more = " ".join(_sentence(draw) for _ in range((num_tokens - len(text)) // 8 + 1))
        text = np.concatenate([text, np.array(tokenize(" " + more), dtype=np.int64)])
    return text[:num_tokens]


def _sentence(draw: random.Random) -> str:
    def one_of(words: str) -> str:
        return draw.choice(words.split())

    start = draw.choice([f"The {one_of(_ADJECTIVES)} {one_of(NOUNS)}", one_of(_NAMES), f"One {one_of(NOUNS)}"])
    end = draw.choice(["", f" {one_of(_PLACES)} the {one_of(NOUNS)}", f" and the {one_of(NOUNS)}"])
    return f"{start} {one_of(_VERBS)} the {one_of(_ADJECTIVES)} {one_of(NOUNS)}{end}."
