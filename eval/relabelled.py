"""Labels that are true in one document only: to be known they must be looked up in what was read before.

Source: https://arxiv.org/abs/2305.08298 (symbol tuning).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from eval.labelled import FORMS, Form
from eval.sentences import NOUNS

Kind = Literal["permuted", "symbols"]
KINDS: tuple[Kind, ...] = ("permuted", "symbols")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def relabelled(form: Form, kind: Kind, seed: int | Sequence[int]) -> Form:
    """A set's form with other words for its labels.

    Args:
        form: The form.
        kind: permuted: its own words, at least two of which have changed places; symbols: numbers, nouns or syllables,
            none of which is a label of any set.
        seed: Chooses them.

    Returns:
        The form; a sentence keeps the number of its label.
    """
    draw = np.random.default_rng(seed)
    if kind == "symbols":
        return replace(form, labels=_symbols(draw, len(form.labels)))
    labels = form.labels
    while labels == form.labels:
        labels = tuple(form.labels[number] for number in draw.permutation(len(form.labels)))
    return replace(form, labels=labels)


def symbols() -> list[list[str]]:
    """What may stand for labels, by kind: numbers, nouns and syllables, none of which is a label of any set."""
    taken = {label for form in FORMS.values() for label in form.labels}
    kinds = (
        [str(number) for number in range(1000)],
        NOUNS.split(),
        [first + vowel + last for first in _CONSONANTS for vowel in _VOWELS for last in _CONSONANTS],
    )
    return [[one for one in kind if one not in taken] for kind in kinds]


def _symbols(draw: np.random.Generator, count: int) -> tuple[str, ...]:
    """Different ones of one kind."""
    kinds = symbols()
    kind = kinds[draw.integers(len(kinds))]
    return tuple(kind[number] for number in draw.choice(len(kind), size=count, replace=False))
