"""Documents to train on, made of demonstrations as evaluation has them in memory and window.

A document is one set's demonstrations, or SQuAD's, one after another: those before help with each that comes. In some
documents nothing but those before can help: in-context learning's labels are other words (`relabelled`), SQuAD's
passages stand far from their questions.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

from eval.demonstrations import Tokenize, demonstration, in_order
from eval.labelled import Example, Form
from eval.relabelled import KINDS, Kind, relabelled
from eval.runner import EvaluationError
from eval.tasks.squad.form import Demonstration
from eval.tasks.squad.form import Form as SquadForm
from pipeline.data.made import Made

logger = logging.getLogger(__name__)
TRAIN, VALIDATION = "train", "validation"
_LEAST_SHOWN = 2
"""Demonstrations of a document: before the first one there is nothing to be remembered."""
ROUNDING = 1e-9
"""Shares are written in decimals: a tenth of ten documents is one, though 10 * 0.1 might be a little less."""


class Shown(NamedTuple):
    """What a document shows.

    Attributes:
        tokens: Its tokens.
        about: What it is.
        num_shown: Demonstrations.
    """

    tokens: list[int]
    about: str
    num_shown: int


class Source(Protocol):
    """What documents of one kind are made of."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def size(self) -> int:
        """How many demonstrations it has."""

    def document(self, tokenize: Tokenize, number: int, *, seed: Sequence[int], room: int) -> Shown:
        """A document of so many tokens at most; its number decides of what kind it is, the seed its order."""


@dataclass(frozen=True)
class Labelled:
    """Demonstrations of in-context learning.

    Attributes:
        name: Of the set.
        form: How it is asked.
        examples: What documents are made of.
        relabel: Share of the documents whose labels are other words.
        kinds: Which, in turns.
    """

    name: str
    form: Form
    examples: Sequence[Example]
    relabel: float = 0.0
    kinds: Sequence[Kind] = KINDS

    @property
    def size(self) -> int:
        """How many demonstrations it has."""
        return len(self.examples)

    def document(self, tokenize: Tokenize, number: int, *, seed: Sequence[int], room: int) -> Shown:
        """Demonstrations in the order of a draw, the first one drawn last."""
        form, about = self.form, self.name
        if is_one_of(number, self.relabel):
            kind = self.kinds[_num_before(number, self.relabel) % len(self.kinds)]
            form = relabelled(form, kind, [*seed, 1])
            about += f", labels {kind}: {', '.join(form.labels)}"
        pieces = _fitting((demonstration(tokenize, form, one) for one in in_order(self.examples, seed)), room)
        return Shown(list(chain.from_iterable(reversed(pieces))), about, len(pieces))


@dataclass(frozen=True)
class Answered:
    """Questions of SQuAD with their answers.

    Attributes:
        demonstrations: What documents are made of.
        passages_first: Share of the documents whose passages all stand before all questions, each once.
        name: Its name.
    """

    demonstrations: Sequence[Demonstration]
    passages_first: float = 0.0
    name: str = "SQuAD"

    @property
    def size(self) -> int:
        """How many demonstrations it has."""
        return len(self.demonstrations)

    def document(self, tokenize: Tokenize, number: int, *, seed: Sequence[int], room: int) -> Shown:
        """Demonstrations in the order of a draw, the first one drawn last; or their passages, then their questions."""
        form, order = SquadForm(tokenize), in_order(self.demonstrations, seed)
        if not is_one_of(number, self.passages_first):
            pieces = _fitting(map(form.shown, order), room)
            return Shown(list(chain.from_iterable(reversed(pieces))), self.name, len(pieces))
        seen: set[str] = set()

        def with_new_passages() -> Iterator[list[int]]:
            for one in order:
                yield form.shown(one, with_passage=one.passage.text not in seen)
                seen.add(one.passage.text)

        taken = order[: len(_fitting(with_new_passages(), room))]
        read = {one.passage.text: form.passage(one.passage) for one in taken}
        first = in_order(list(read.values()), [*seed, 1])
        asked = [form.shown(one, with_passage=False) for one in reversed(taken)]
        return Shown(list(chain.from_iterable([*first, *asked])), f"{self.name}, passages first", len(taken))


@dataclass(frozen=True)
class Wanted:
    """How many documents, and of what size.

    Attributes:
        documents: To train on, of each source.
        validation_documents: Of each source, made of what no document to train on has.
        document_tokens: Of each at most, one that ends it included.
        seed: Of everything.
    """

    documents: int
    validation_documents: int
    document_tokens: int
    seed: int

    @property
    def counts(self) -> Mapping[str, int]:
        """Documents of each source by split; none of a split without."""
        both = {TRAIN: self.documents, VALIDATION: self.validation_documents}
        return {split: count for split, count in both.items() if count}


def documents(tokenize: Tokenize, sources: Sequence[Source], wanted: Wanted, split: str) -> Iterator[Made]:
    """Documents of all sources in turns.

    Args:
        tokenize: The tokenizer.
        sources: Of the split.
        wanted: How many documents, and of what size.
        split: The split.

    Yields:
        The documents.

    Raises:
        EvaluationError: A document would have too few demonstrations.
    """
    room, count = wanted.document_tokens - 1, wanted.counts[split]
    warned: set[str] = set()
    for number in range(count):
        for source in sources:
            seed = (wanted.seed, zlib.crc32(source.name.encode()), split == VALIDATION, number)
            shown = source.document(tokenize, number, seed=list(map(int, seed)), room=room)
            if shown.num_shown < _LEAST_SHOWN:
                raise EvaluationError(
                    f"a document of {source.name} would have too few demonstrations",
                    got=f"{shown.num_shown} of the {source.size} for {split} in {wanted.document_tokens} tokens",
                    expected=f"{_LEAST_SHOWN} at least",
                    do="raise --document-tokens" if source.size >= _LEAST_SHOWN else "change --validation-share",
                )
            if shown.num_shown == source.size and source.name not in warned:
                warned.add(source.name)
                logger.warning(
                    "%s: all %d demonstrations for %s make a document of %d tokens only",
                    *(source.name, source.size, split, len(shown.tokens) + 1),
                )
            yield Made(shown.tokens, f"{shown.about}; {split} {number}")


def is_one_of(number: int, share: float) -> bool:
    """Whether a document, counted from 0, is of a share that is spread evenly over all."""
    return _num_before(number + 1, share) > _num_before(number, share)


def _num_before(number: int, share: float) -> int:
    return int(number * share + ROUNDING)


def _fitting(pieces: Iterable[list[int]], room: int) -> list[list[int]]:
    """The first pieces, as many as have room together."""
    taken: list[list[int]] = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        taken.append(piece)
    return taken
