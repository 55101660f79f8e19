"""Choosing the held-out documents that an evaluation reads."""

from __future__ import annotations

import logging

import numpy as np

from pipeline.data.store import TokenStore
from pipeline.errors import DataError

logger = logging.getLogger(__name__)


def held_out_documents(store: TokenStore, *, count: int, min_tokens: int) -> list[int]:
    """Choose documents that are long enough; the same for the same store, and more keeps those of fewer.

    Args:
        store: The validation split.
        count: Number of documents wanted; with fewer long enough, all of those, and a warning.
        min_tokens: Tokens that a document must have: evaluation.context_tokens plus evaluation.scored_tokens.

    Returns:
        Document numbers, ascending.

    Raises:
        DataError: No document is long enough.
    """
    shuffled = np.random.default_rng(0).permutation(store.num_documents)
    chosen = shuffled[store.lengths[shuffled] >= min_tokens][:count]
    if len(chosen) == 0:
        raise DataError(
            f"no document of the split {store.split!r} is long enough to be evaluated",
            got=f"{store.path}, the longest of {store.num_documents} has {store.lengths.max()} tokens",
            expected=f"{min_tokens} tokens",
            do="lower evaluation.context_tokens or evaluation.scored_tokens, or hold out longer documents",
        )
    if len(chosen) < count:
        logger.warning("only %d of %d documents wanted have %d tokens or more", len(chosen), count, min_tokens)
    return sorted(int(document) for document in chosen)
