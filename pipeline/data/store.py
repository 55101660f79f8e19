"""The token store: an Arrow folder per split, one row a document, and store.json that says what is in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.hashes import check_hashes, check_sizes, hash_folder, hash_tokens
from pipeline.data.info import FORMAT_VERSION, INFO_FILE, PREPARE, SplitInfo, StoreInfo, read_info, write_info
from pipeline.data.text import home
from pipeline.data.tokenizer import TokenizerInfo, describe_tokenizer
from pipeline.errors import DataError, in_a_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORE_FEATURES = datasets.Features(tokens=datasets.List(datasets.Value("int32")), source=datasets.Value("string"))


class TokenStore:
    """One split of a token store, memory-mapped: only what is asked for is read from disk.

    Args:
        path: The folder of the store.
        split: Name of the split.
        info: What store.json says.
        column: The documents' tokens, ``list<int32>``.
        sources: The documents' sources, strings.

    Attributes:
        path: The folder of the store.
        split: Name of the split.
        info: What store.json says.
        lengths: Tokens of each document, int64 ``[num_documents]``.
    """

    def __init__(
        self, path: Path, split: str, *, info: StoreInfo, column: pa.ChunkedArray, sources: pa.ChunkedArray
    ) -> None:
        self.path = path
        self.split = split
        self.info = info
        self.lengths: npt.NDArray[np.int64] = list_lengths(column)
        self._column = column
        self._sources = sources
        self._num_ids = info.tokenizer.vocab_size
        self._files = self._stamps()

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> TokenStore:
        """Open one split of a store for reading.

        Args:
            path: The folder that launch/prepare_data.py made.
            split: ``train`` or ``validation``.

        Returns:
            The open split.

        Raises:
            DataError: The folder, its store.json or the split is missing, empty, damaged or of another version.
        """
        path = home(path)
        info = read_info(path)
        if split not in info.splits:
            raise DataError(
                f"the token store has no split {split!r}",
                got=f"{path} with {', '.join(sorted(info.splits))}",
                do="prepare the data again with --validation-documents or --validation",
            )
        if info.splits[split].num_documents == 0:
            raise DataError("the token store is empty", got=str(path / split), do=PREPARE)
        try:
            odd = [entry.name for entry in (path / split).iterdir() if not entry.is_file()]
            if odd:
                raise ValueError(f"{odd[0]} is no plain file")
            table = datasets.load_from_disk(str(path / split), keep_in_memory=False).data
            if table.schema.field("tokens").type.value_type != pa.int32():
                raise ValueError(f"tokens are {table.schema.field('tokens').type}, not lists of int32")
            tokens, sources = table.column("tokens"), table.column("source")
        except Exception as error:  # `datasets` raises whatever a foreign file leads it to
            raise DataError(
                "the token store is damaged: a split cannot be read",
                got=f"{path / split} ({in_a_line(error)})",
                do=PREPARE,
            ) from error
        store = cls(path, split, info=info, column=tokens, sources=sources)
        store._check_counts()
        check_sizes(path / split, info.splits[split].files)
        return store

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Reads some tokens of one document, and no others.

        Args:
            document: Its number.
            start: The first.
            stop: The one after the last; None: the end.

        Returns:
            The tokens, int64.

        Raises:
            DataError: A token is none of the vocabulary's.
        """
        stored: npt.NDArray[np.int32] = self._column[document].values.to_numpy(zero_copy_only=True)
        tokens = stored[start:stop].astype(np.int64)
        foreign = np.flatnonzero((tokens < 0) | (tokens >= self._num_ids))
        if len(foreign):
            raise DataError(
                "the token store holds a token that is not in the vocabulary",
                got=f"{tokens[foreign[0]]} in {self.path / self.split}, document {document} ({self.source(document)}), "
                f"token {start + foreign[0]}",
                expected=f"0 to {self._num_ids - 1}, as tokenizer ({self.info.tokenizer.name!r}) and backbone have",
                do=PREPARE,
            )
        return tokens

    def source(self, document: int) -> str:
        """Where the document came from: a file, with line or row where there are several in a file."""
        return str(self._sources[document].as_py())

    def check_unchanged(self) -> None:
        """Check that no file of this split was changed since it was opened; asks the file system only, reads nothing.

        Raises:
            DataError: A file was changed or is gone.
        """
        found = self._stamps()
        changed = sorted(name for name in self._files.keys() | found.keys() if self._files.get(name) != found.get(name))
        if changed:
            raise DataError(
                f"the token store {self.path} has changed since it was opened",
                got=f"other size or time of change, or gone: {', '.join(changed)}",
                do="put the store back as it was and start again, or start a new run.output_dir with the new one",
            )

    def limit_vocabulary(self, num_ids: int) -> None:
        """Have tokens refused that a model has no embedding of: a tokenizer may know more than it."""
        self._num_ids = min(self._num_ids, num_ids)

    @property
    def has_hashes(self) -> bool:
        """Whether the store was made with hashes."""
        return self.info.splits[self.split].tokens_sha256 is not None

    @cached_property
    def identity(self) -> str:
        """Says which tokens the documents have: equal stores of the same split have the same. Reads an old store."""
        return self.info.splits[self.split].tokens_sha256 or hash_tokens(self._column)

    @property
    def num_bytes(self) -> int:
        """Bytes that ``verify`` reads."""
        return sum(file.size for file in self.info.splits[self.split].files.values())

    def verify(self, *, progress: Callable[[int], object] = lambda _: None) -> None:
        """Read all files that have hashes, telling `progress` the bytes. Raises DataError: one was altered."""
        check_hashes(self.path / self.split, self.info.splits[self.split].files, progress=progress)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of the last change in ns of the files of this split; none if they are gone."""
        stamps = {}
        for path in (self.path / INFO_FILE, *(self.path / self.split).glob("*")):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                stamps[str(path.relative_to(self.path))] = (found.st_size, found.st_mtime_ns)
        return stamps

    def _check_counts(self) -> None:
        expected = self.info.splits[self.split]
        found = (self.num_documents, int(self.lengths.sum()))
        if found != (expected.num_documents, expected.num_tokens):
            raise DataError(
                "the token store is damaged: a split does not hold what store.json says",
                got=f"{found[0]} documents, {found[1]} tokens in {self.path / self.split}",
                expected=f"{expected.num_documents} documents, {expected.num_tokens} tokens",
                do=PREPARE,
            )
        if self.lengths.min() == 0:
            raise DataError("the token store has empty documents", got=str(self.path / self.split), do=PREPARE)


def write_store(folder: str | Path, splits: Mapping[str, datasets.Dataset], *, tokenizer: TokenizerInfo) -> StoreInfo:
    """Write a store; store.json is written last, so that a folder with one is whole.

    Args:
        folder: A folder that does not exist, or is empty.
        splits: By name, datasets with the columns of ``STORE_FEATURES`` and at least one row.
        tokenizer: The tokenizer that made the tokens.

    Returns:
        What was written to store.json.
    """
    folder = Path(folder)
    infos = {}
    for split, dataset in splits.items():
        assert len(dataset) > 0, f"the split {split} is empty"
        dataset.save_to_disk(str(folder / split))
        infos[split] = _describe(folder / split)
    info = StoreInfo(format_version=FORMAT_VERSION, tokenizer=tokenizer, splits=infos)
    write_info(folder, info)
    return info


def add_hashes(folder: str | Path) -> StoreInfo:
    """Add to a store that was made without hashes what its files are now.

    Args:
        folder: The folder of the store.

    Returns:
        What its store.json now says.

    Raises:
        DataError: It is no store, is damaged, or has hashes, which are not replaced.
    """
    folder = home(folder)
    info = read_info(folder)
    if not info.splits or any(counts.files for counts in info.splits.values()):
        raise DataError("the token store has hashes already", got=folder, do="prepare the data again if it was altered")
    for split in info.splits:
        TokenStore.open(folder, split)  # its counts are checked
    info = replace(info, splits={split: _describe(folder / split) for split in info.splits})
    write_info(folder, info)
    return info


def _describe(split: Path) -> SplitInfo:
    """Counts and hashes of a split that was written."""
    column = datasets.load_from_disk(str(split), keep_in_memory=False).data.column("tokens")
    return replace(_count(list_lengths(column)), tokens_sha256=hash_tokens(column), files=hash_folder(split))


def check_tokenizer(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer, usually the backbone's, made the store. Raises DataError, which names both, if not."""
    found, made_by = describe_tokenizer(tokenizer), store.info.tokenizer
    if found.identity != made_by.identity:
        raise DataError(
            f"the token store {store.path} was made with another tokenizer",
            got=f"{found.name!r} with {found.vocab_size} ids, identity {found.identity[:12]}",
            expected=f"{made_by.name!r} with {made_by.vocab_size} ids, identity {made_by.identity[:12]}",
            do="prepare the data again with --tokenizer set to the backbone, or change backbone.path",
        )


def list_lengths(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Length of each list; reads the offsets only, not the lists. Returns int64 ``[len(column)]``."""
    return np.asarray(pc.list_value_length(column).to_numpy(), dtype=np.int64)


def _count(lengths: npt.NDArray[np.int64]) -> SplitInfo:
    exponents = np.frexp(lengths)[1] - 1  # floor(log2(length)), exact below 2**53
    powers, counts = np.unique(exponents, return_counts=True)
    return SplitInfo(
        num_documents=len(lengths),
        num_tokens=int(lengths.sum()),
        min_document_tokens=int(lengths.min()),
        max_document_tokens=int(lengths.max()),
        length_histogram={str(2 ** int(power)): int(count) for power, count in zip(powers, counts, strict=True)},
    )
