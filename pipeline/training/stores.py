"""The token stores of a run, opened and checked against its settings before any weight is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pipeline.checkpoint.folder import TOKEN_STORE
from pipeline.config.schema import Config
from pipeline.data.deal import check_documents
from pipeline.data.held_out import held_out_documents, with_split
from pipeline.data.store import TokenStore
from pipeline.distributed.launchers import local_rank
from pipeline.distributed.ranks import rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stores:
    """The token stores of a run.

    Attributes:
        train: What is trained on: a store for each source.
        shares: Of each its share of the tokens; they add up to 1.
        validation: Held-out documents of those sources that have any.
    """

    train: Sequence[TokenStore]
    shares: Sequence[float]
    validation: Sequence[TokenStore]

    @property
    def opened(self) -> list[TokenStore]:
        """All that there are."""
        return [*self.train, *self.validation]

    @property
    def identity(self) -> dict[str, Any]:
        """Says which tokens are trained on, and how they are mixed, as a checkpoint has it."""
        if len(self.train) == 1:
            return {TOKEN_STORE: self.train[0].identity}
        identities = [store.identity for store in self.train]
        return {TOKEN_STORE: identities, "shares of data.sources": list(self.shares)}

    def verify(self) -> None:
        """Reads the stores and checks that they are what was written; shows how far it is if that takes long.

        Raises:
            DataError: One is not, or cannot be read.
        """
        num_bytes = sum(store.num_bytes for store in self.opened)
        words = "checking the token store"
        with tqdm(total=num_bytes, desc=words, unit="B", unit_scale=True, delay=5, disable=rank() != 0) as bar:
            for store in self.opened:
                store.verify(progress=bar.update)

    def check_unchanged(self) -> None:
        """Checks on one rank of each machine that the stores are what they were when they were opened.

        Raises:
            DataError: One is not; on that rank only.
        """
        if local_rank(os.environ) == 0:
            for store in self.opened:
                store.check_unchanged()


def open_stores(config: Config) -> Stores:
    """Opens the stores of a run.

    Args:
        config: The settings.

    Returns:
        The open stores.

    Raises:
        DataError: One is missing or damaged, or does not fit the settings.
    """
    paths = [source.path for source in config.data.mixture]
    train = [TokenStore.open(path, "train") for path in paths]
    for path, store in zip(paths, train, strict=True):
        if not store.has_hashes:
            words = "%s was made without hashes: changes are not noticed; do: launch/prepare_data.py --add-hashes %s"
            logger.warning(words, path, path)
        check_documents(store.lengths, name=path, chunk_size=config.memory.chunk_size, num_lanes=config.data.lanes)
    validation = [TokenStore.open(path, "validation") for path in with_split(paths, "validation")]
    if validation:  # long enough for the evaluation at the end
        wanted = config.evaluation
        held_out_documents(validation, count=wanted.documents, min_tokens=wanted.context_tokens + wanted.scored_tokens)
    return Stores(train, list(config.data.shares.values()), validation)
