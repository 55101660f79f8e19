"""Choosing the held-out documents that an evaluation reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from pipeline.data.info import read_info
from pipeline.data.store import TokenStore
from pipeline.data.text import home
from pipeline.errors import DataError

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """A held-out document.

    Attributes:
        number: Counted through all stores.
        store: Where it is.
        document: Its number there.
    """

    number: int
    store: TokenStore
    document: int


def with_split(paths: Sequence[str], split: str) -> list[str]:
    """Those of some token stores that have a split; the others are named in a warning.

    Args:
        paths: Folders of the stores.
        split: Name of the split.

    Returns:
        Their folders.

    Raises:
        DataError: One is no token store.
    """
    found = []
    for path in paths:
        if split in read_info(home(path)).splits:
            found.append(path)
        else:
            logger.warning("%s has no %s split: there will be no held-out evaluation of it", path, split)
    return found


def held_out_documents(stores: Sequence[TokenStore], *, count: int, min_tokens: int) -> list[HeldOut]:
    """Choose documents that are long enough; the same for the same stores, and more keeps those of fewer.

    They are taken from the stores in turn, whatever is trained on most: what is measured of each source is then about
    as exact, and none is left out while there are as many documents as sources.

    Args:
        stores: The validation split of each source.
        count: Number of documents wanted; with fewer long enough, all of those, and a warning.
        min_tokens: Tokens that a document must have: evaluation.context_tokens plus evaluation.scored_tokens.

    Returns:
        The documents, ascending.

    Raises:
        DataError: No document of any store is long enough.
    """
    first, of_stores = 0, []
    for store in stores:
        shuffled = np.random.default_rng(0).permutation(store.num_documents)
        enough = [int(document) for document in shuffled if store.lengths[document] >= min_tokens]
        if not enough and len(stores) > 1:
            logger.warning("no held-out document of %s has %d tokens: none is evaluated", store.path, min_tokens)
        of_stores.append([HeldOut(first + document, store, document) for document in enough])
        first += store.num_documents
    chosen = [one for turn in zip_longest(*of_stores) for one in turn if one is not None][:count]
    if not chosen:
        longest = max(stores, key=lambda store: int(store.lengths.max()))
        raise DataError(
            f"no document of the split {longest.split!r} is long enough to be evaluated",
            got=f"{longest.path}, the longest of {longest.num_documents} has {longest.lengths.max()} tokens",
            expected=f"{min_tokens} tokens",
            do="lower evaluation.context_tokens or evaluation.scored_tokens, or hold out longer documents",
        )
    if len(chosen) < count:
        logger.warning("only %d of %d documents wanted have %d tokens or more", len(chosen), count, min_tokens)
    return sorted(chosen, key=lambda one: one.number)
