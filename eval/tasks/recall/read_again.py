"""Passages that are read again some tokens later, in held-out text or in text that is made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from eval.scorer import Tokens
from eval.sentences import sentences
from pipeline.data.store import TokenStore
from pipeline.errors import DataError

GENERATED = "generated sentences"
Place = tuple[TokenStore, int, int]
"""Store, document, and a token of it."""


@dataclass(frozen=True)
class Source:
    """Where passages and what stands between their two readings come from.

    Attributes:
        name: For the reader of a report.
        identity: The same for the same text.
        passages: int64 `[P]` each.
        filler: Text in which none of them stands, int64 `[any]`.
    """

    name: str
    identity: str
    passages: Sequence[Tokens]
    filler: Tokens


def place_of_second(distance: int, segment_tokens: int) -> int:
    """Where a passage is read again, which is where a segment begins: the first one that leaves room for the first."""
    return -(-distance // segment_tokens) * segment_tokens


def read_once(passage: Tokens, filler: Tokens, *, segment_tokens: int) -> Tokens:
    """A passage, and after it filler to the end of a segment; int64 `[any]`."""
    return np.concatenate([passage, np.resize(filler, -len(passage) % segment_tokens)])


def read_twice(passage: Tokens, filler: Tokens, *, distance: int, segment_tokens: int) -> Tokens:
    """A text in which a passage is read again.

    Args:
        passage: int64 `[P]`.
        filler: What stands before the first reading, between both and after the second; repeated where it ends.
        distance: Tokens from the beginning of the first reading to that of the second; at least `P`.
        segment_tokens: Tokens of a segment.

    Returns:
        int64 `[place_of_second + P]`, made whole segments.
    """
    lead = place_of_second(distance, segment_tokens) - distance
    between = np.resize(filler, lead + distance - len(passage))
    second = read_once(passage, filler, segment_tokens=segment_tokens)
    return np.concatenate([between[:lead], passage, between[lead:], second])


def of_stores(stores: Sequence[TokenStore], *, num_passages: int, passage_tokens: int, filler_tokens: int) -> Source:
    """Passages from the second halves of documents, filler from the first halves, of stores in turn.

    Args:
        stores: The split of each.
        num_passages: How many.
        passage_tokens: `P`.
        filler_tokens: Tokens of filler; there are fewer where first halves end.

    Returns:
        The source; passages are of as many documents as there are.

    Raises:
        DataError: The documents are too short.
    """
    places = _in_turn([_places(store, passage_tokens) for store in stores])
    path = ", ".join(str(store.path) for store in stores)
    if len(places) < num_passages:
        raise DataError(
            "held-out documents are too short for passages that are read again",
            got=f"{path}: second halves with {len(places)} passages of {passage_tokens} tokens",
            expected=f"{num_passages} passages",
            do="lower recall.passages or recall.passage_tokens, or name another store with --data recall=STORE",
        )
    passages = [store.tokens(document, at, at + passage_tokens) for store, document, at in places[:num_passages]]
    halves = _in_turn(
        [[(store, one, int(tokens) // 2) for one, tokens in enumerate(store.lengths)] for store in stores]
    )
    filler = np.zeros(0, dtype=np.int64)
    for store, document, half in halves:
        filler = np.concatenate([filler, store.tokens(document, 0, min(half, filler_tokens - len(filler)))])
        if len(filler) == filler_tokens:
            break
    identity = "+".join(store.identity[:12] for store in stores)
    return Source(f"held-out documents of {path}", identity, passages, filler)


def _places(store: TokenStore, passage_tokens: int) -> list[Place]:
    """Where passages begin: the first one of each document, then the second ones."""
    halves = [int(length) // 2 for length in store.lengths]
    return [
        (store, document, halves[document] + number * passage_tokens)
        for number in range(max(halves) // passage_tokens)
        for document in range(store.num_documents)
        if (number + 1) * passage_tokens <= halves[document]
    ]


def _in_turn(of_stores: Sequence[Sequence[Place]]) -> list[Place]:
    return [one for turn in zip_longest(*of_stores) for one in turn if one is not None]


def made_up(
    tokenize: Callable[[str], list[int]], *, num_passages: int, passage_tokens: int, filler_tokens: int, seed: int
) -> Source:
    """Random sentences.

    Args:
        tokenize: A text's tokens.
        num_passages: How many.
        passage_tokens: `P`.
        filler_tokens: Tokens of filler.
        seed: Of the sentences.

    Returns:
        The source.
    """
    wanted = num_passages * passage_tokens + filler_tokens
    text = sentences(tokenize, wanted, seed=seed)
    passages = [text[at * passage_tokens :][:passage_tokens] for at in range(num_passages)]
    return Source(GENERATED, "generated", passages, text[num_passages * passage_tokens :])
