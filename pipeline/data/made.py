"""A token store of documents that are made rather than read: the same store, the same care for its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from pipeline.data.ending import StopSignals
from pipeline.data.place import agree, publish, work_folder
from pipeline.data.prepare import Prepared
from pipeline.data.room import system_errors_in_words
from pipeline.data.store import STORE_FEATURES, write_store
from pipeline.data.text import home
from pipeline.data.tokenizer import describe_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_PER_TOKEN = 8
"""A token is written twice, as it is made and as the store."""


class Made(NamedTuple):
    """A document.

    Attributes:
        tokens: Its tokens, without one that ends it.
        source: What it was made of.
    """

    tokens: Sequence[int]
    source: str


def prepare_made(
    make: Callable[[PreTrainedTokenizerBase], Mapping[str, Iterator[Made]]],
    *,
    tokenizer: str | Path,
    output: str | Path,
    num_tokens: int,
    append_eos: bool = True,
    overwrite: bool = False,
    stop: StopSignals | None = None,
) -> Prepared:
    """Makes a token store of documents.

    Args:
        make: Gives the documents by split, one at least in each, none empty.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        output: Folder of the store.
        num_tokens: Of all documents at most: says how much room is needed where there is too little.
        append_eos: End each document with the tokenizer's end-of-text token, if it has one.
        overwrite: Replace a store that exists already.
        stop: The signals that end this process; None: they do what they do without.

    Returns:
        What was written.

    Raises:
        LongMemError: The documents cannot be made, or tokenizer or output are wrong. Nothing has been written then.
    """
    stop = stop or StopSignals()
    output = home(output).absolute()
    with work_folder(agree(output, overwrite=overwrite), overwrite=overwrite, stop=stop) as (place, work):
        loaded = load_tokenizer(tokenizer)
        end = [loaded.eos_token_id] if append_eos and loaded.eos_token_id is not None else []
        with system_errors_in_words(work, needed=num_tokens * _BYTES_PER_TOKEN):
            splits = {
                split: _write(work / f"{split}.arrow", documents, end, label=f"Making {split}")
                for split, documents in make(loaded).items()
            }
            info = write_store(work / "store", splits, tokenizer=describe_tokenizer(loaded))
        stop.too_late()
        publish(place, work, work / "store")
    return Prepared(output=output, info=info, dropped={})


def _write(path: Path, documents: Iterator[Made], end: Sequence[int], *, label: str) -> datasets.Dataset:
    """Writes documents as they come, so that no more than a few are held at once."""
    with ArrowWriter(path=str(path), features=STORE_FEATURES, writer_batch_size=16) as writer:
        for one in tqdm(documents, desc=label, unit="document"):
            writer.write({"tokens": np.array([*one.tokens, *end], dtype=np.int32), "source": one.source})
        writer.finalize()
    return datasets.Dataset.from_file(str(path))
