"""Held-out documents, of token stores, of files of text or of the hub, in pairs that lend each other their memories.

Shapes: `N` tokens of a document.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.scorer import OTHER_MEMORY, How, Losses, Scorer, Tokens
from eval.task import Item
from pipeline.config.schema import Config
from pipeline.data.files import find_files
from pipeline.data.held_out import held_out_documents, with_split
from pipeline.data.info import is_store
from pipeline.data.inputs import TEXT_FIELD, read_documents
from pipeline.data.store import TokenStore, check_tokenizer
from pipeline.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A document that is scored.

    Attributes:
        number: Its number, of its own; None: it only lends its memory.
        tokens: int64 `[N]`, what is read, and one more where there is one, the target of the last.
        source: Where it is from.
        length: Tokens of the whole of it.
    """

    number: int | None
    tokens: Tokens
    source: str
    length: int


def of_stores(stores: Sequence[TokenStore], *, count: int, num_tokens: int | None, min_tokens: int) -> list[Document]:
    """Documents of stores, chosen as in training.

    Args:
        stores: The split of each.
        count: How many.
        num_tokens: Tokens of each that are read; None: all.
        min_tokens: Tokens that it must have.

    Returns:
        The documents, in order of their numbers.

    Raises:
        DataError: None is long enough.
    """
    stop = None if num_tokens is None else num_tokens + 1
    return [
        Document(number, store.tokens(document, 0, stop), store.source(document), int(store.lengths[document]))
        for number, store, document in held_out_documents(stores, count=count, min_tokens=min_tokens)
    ]


def open_stores(paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, split: str) -> list[TokenStore]:
    """Opens a split of token stores. Raises DataError: one lacks it, or is none, or another tokenizer made it."""
    stores = [TokenStore.open(path, split) for path in paths]
    for store in stores:
        check_tokenizer(store, tokenizer)
    return stores


def data_of_run(config: Config, split: str) -> tuple[str, ...]:
    """Folders of those of a run's sources that have a split; of one alone whether it has or not."""
    paths = tuple(source.path for source in config.data.mixture)
    return paths if len(paths) == 1 else tuple(with_split(paths, split)) or paths


def of_data(
    data: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str,
    count: int,
    num_tokens: int | None,
    min_tokens: int,
) -> list[Document]:
    """Documents of what a user names: token stores; files and folders of text, JSON lines or Parquet; or a hub name.

    Args:
        data: Paths, or one name on the hub, with `:CONFIGURATION` behind it where it has several.
        tokenizer: The backbone's.
        split: Of the store or of the hub's data set.
        count: As in `of_stores`; of texts the first ones that are long enough.
        num_tokens: As there.
        min_tokens: As there.

    Returns:
        The documents.

    Raises:
        DataError: They cannot be read, or none is long enough.
    """
    if any(is_store(Path(one)) for one in data):
        stores = open_stores(data, tokenizer, split=split)
        return of_stores(stores, count=count, num_tokens=num_tokens, min_tokens=min_tokens)
    found: list[Document] = []
    longest = num_read = 0
    for number, (source, text) in enumerate(_texts(data, split)):
        tokens = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        longest, num_read = max(longest, len(tokens)), number + 1
        if len(tokens) >= min_tokens:
            stop = None if num_tokens is None else num_tokens + 1
            found.append(Document(number, tokens[:stop], source, len(tokens)))
        if len(found) == count:
            return found
    if not found:
        raise DataError(
            "no document is long enough to be evaluated",
            got=f"{', '.join(data)[:200]}: {num_read} documents, the longest of {longest} tokens",
            expected=f"{min_tokens} tokens",
            do="ask for less context or scored tokens, or name longer documents",
        )
    logger.warning("only %d of %d documents wanted have %d tokens or more", len(found), count, min_tokens)
    return found


def _texts(data: Sequence[str], split: str) -> Iterator[tuple[str, str]]:
    """Sources and texts."""
    if len(data) > 1 or Path(data[0]).expanduser().exists() or data[0].startswith((".", "/", "~")):
        for document in read_documents([str(path) for path in find_files(data)]):
            yield document.source, document.text
        return
    name, _, configuration = data[0].partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        first = next(iter(found))
    except Exception as error:  # of the hub, of the network, of a file: `datasets` raises whatever it met
        raise DataError(
            "the data set cannot be read",
            got=f"{data[0]} ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            expected="a path that exists, or a name on the Hugging Face hub",
            do="check the name, its split and the network",
        ) from error
    if not isinstance(first.get(TEXT_FIELD), str):
        raise DataError(
            f"the data set has no texts in a field {TEXT_FIELD!r}", got=f"{data[0]} with {', '.join(map(str, first))}"
        )
    for number, row in enumerate(found):
        yield f"{name}, {split} {number}", row[TEXT_FIELD]


def in_pairs(documents: Sequence[Document], *, at_once: int) -> list[Item]:
    """Items of an even number of documents, at most so many; the last of an odd number borrows of the first."""
    if len(documents) == 1:
        logger.warning("there is only one held-out document: the memory of another one is not tried")
    rows = list(documents)
    if len(rows) % 2 and len(rows) > 1:
        rows.append(replace(rows[0], number=None))
    parts = [rows[at : at + at_once] for at in range(0, len(rows), at_once)]
    return [Item(" ".join(str(one.number) for one in part if one.number is not None), part) for part in parts]


def read_in_pairs(
    documents: Sequence[Document], scorer: Scorer, context_tokens: int, hows: Mapping[str, How]
) -> Iterator[tuple[Document, dict[str, Losses], int]]:
    """Reads the documents of an item in order.

    Args:
        documents: Of one item.
        scorer: The model.
        context_tokens: Tokens of each that are read before any is scored.
        hows: By name, how; that of another memory is left out where there is no other.

    Yields:
        Each document with its losses by name, and how many of these count: those behind the end of a document that is
        shorter than its partners do not.
    """
    if len(documents) == 1:
        hows = {name: how for name, how in hows.items() if how.condition != OTHER_MEMORY}
    segment = scorer.segment_tokens
    counts = [len(one.tokens) - 1 for one in documents]
    # The last token of a text that ends with a segment is read without being followed by any.
    num_tokens = max(-(-count // segment) * segment for count in counts)
    # A shorter one is read again from its beginning: what it lends to others must be text.
    texts = [np.resize(one.tokens, max(len(one.tokens), num_tokens)) for one in documents]
    losses = scorer.follow(texts, first_scored=context_tokens, num_tokens=num_tokens, hows=hows)
    for row, one in enumerate(documents):
        if one.number is not None:
            yield one, {name: of_row[row] for name, of_row in losses.items()}, counts[row] - context_tokens


def check_segments(context_tokens: int, scored_tokens: int | None, segment: int, section: str) -> None:
    """Raises ConfigError: context or scored tokens are not whole segments."""
    problems = []
    for name, tokens in (("context_tokens", context_tokens), ("scored_tokens", scored_tokens or 0)):
        if tokens % segment:
            below = tokens // segment * segment
            nearest = f"{below} or {below + segment}" if below else f"{segment}"
            problems.append(
                f"{section}.{name} is not a multiple of train.segment_tokens; got: {tokens} and {segment}; "
                f"do: set {section}.{name} to {nearest}"
            )
    if problems:
        raise ConfigError(problems)
