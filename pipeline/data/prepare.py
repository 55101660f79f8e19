"""From raw text to a token store: read, check, tokenize in parallel, hold out, write whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from multiprocess.util import get_temp_dir

from pipeline.data.ending import StopSignals, workers_end_with_this_process
from pipeline.data.files import find_files
from pipeline.data.info import StoreInfo
from pipeline.data.inputs import read_documents
from pipeline.data.place import agree, publish, work_folder
from pipeline.data.room import check_room, system_errors_in_words
from pipeline.data.store import STORE_FEATURES, list_lengths, write_store
from pipeline.data.text import home, readable
from pipeline.data.tokenizer import describe_tokenizer, load_tokenizer
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TEXT_FEATURES = datasets.Features(
    text=datasets.Value("large_string"),
    source=datasets.Value("string"),
    num_nul=datasets.Value("int64"),
    error=datasets.Value("string"),
)
_BATCH_DOCUMENTS = 4  # documents may be whole books: little is held at once, and the progress bar moves


@dataclass(frozen=True)
class Dropped:
    """What of one input set did not go into the store.

    Attributes:
        empty: Documents without any text but white space, or without any token.
        short: Documents with fewer tokens than asked for.
        nul: NUL characters, of all documents together.
    """

    empty: int
    short: int
    nul: int = 0


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        output: The folder of the store.
        info: What its store.json says.
        dropped: What was left out, by set of inputs (``train``, and ``validation`` if it has inputs of its own).
        unreadable: Files and folders that could not be read and were left out, a line each.
    """

    output: Path
    info: StoreInfo
    dropped: dict[str, Dropped]
    unreadable: tuple[str, ...] = ()


def prepare(
    inputs: Sequence[str | Path],
    *,
    tokenizer: str | Path,
    output: str | Path,
    validation_inputs: Sequence[str | Path] = (),
    validation_documents: int = 0,
    min_tokens: int = 1,
    append_eos: bool = True,
    num_workers: int = 1,
    seed: int = 1234,
    overwrite: bool = False,
    skip_unreadable: bool = False,
    drop_nul: bool = False,
    stop: StopSignals | None = None,
) -> Prepared:
    """Make a token store from files of text.

    Args:
        inputs: Files, and folders that are searched to any depth.
        tokenizer: Folder or hub name of the backbone's tokenizer.
        output: Folder of the store.
        validation_inputs: Files and folders held out; files that ``inputs`` also name are held out, not trained on.
        validation_documents: Number of documents held out by a seeded choice; 0 for none.
        min_tokens: Documents with fewer tokens (end-of-text token included) are dropped.
        append_eos: End each document with the tokenizer's end-of-text token, if it has one.
        num_workers: Processes that read and tokenize; the result does not depend on it.
        seed: Seed of the choice of held-out documents.
        overwrite: Replace a store that exists already.
        skip_unreadable: Leave out what cannot be read; else that is an error.
        drop_nul: Drop NUL characters; else they are an error.
        stop: The signals that end this process; None: they do what they do without.

    Returns:
        What was written.

    Raises:
        DataError: Anything is wrong with inputs, tokenizer or output. Nothing has been written then.
    """
    stop = stop or StopSignals()
    unreadable: list[str] | None = [] if skip_unreadable else None
    output = home(output).absolute()
    with work_folder(agree(output, overwrite=overwrite), overwrite=overwrite, stop=stop) as (place, work):
        held_out_files = find_files(validation_inputs, left_out=unreadable)
        files = {"train": _without(find_files(inputs, left_out=unreadable), held_out_files)}
        if held_out_files:
            files["validation"] = held_out_files
        needed = check_room([path for paths in files.values() for path in paths], work)
        loaded = load_tokenizer(tokenizer)
        with system_errors_in_words(work, needed=needed), workers_end_with_this_process():
            if num_workers > 1:  # the sockets of its workers, which only an orderly end of the interpreter removes
                sockets = get_temp_dir()
                stop.on_signal(lambda: shutil.rmtree(sockets, ignore_errors=True))
            texts = {
                split: _read(split, paths, work, drop_nul=drop_nul, num_workers=num_workers)
                for split, paths in files.items()
            }
            _check_held_out_count(validation_documents, num_documents=len(texts["train"].documents))
            splits, dropped = {}, {}
            for split, read in texts.items():
                rows = _tokenize(split, read.documents, loaded, append_eos=append_eos, num_workers=num_workers)
                splits[split], lost = _drop_short(split, rows, min_tokens)
                dropped[split] = Dropped(empty=read.num_empty + lost.empty, short=lost.short, nul=read.num_nul)
            if validation_documents:
                _check_held_out_count(validation_documents, num_documents=len(splits["train"]))
                splits = _hold_out(splits["train"], validation_documents, seed=seed)
            info = write_store(work / "store", splits, tokenizer=describe_tokenizer(loaded))
        stop.too_late()
        publish(place, work, work / "store")
    return Prepared(output=output, info=info, dropped=dropped, unreadable=tuple(unreadable or ()))


def _without(files: list[Path], held_out: list[Path]) -> list[Path]:
    """The files that are not held out as well."""
    apart = {path.resolve() for path in held_out}
    kept = [path for path in files if path.resolve() not in apart]
    if not kept:
        raise DataError(
            "every input file is held out as well", got=f"{len(files)} files", do="name other files after --validation"
        )
    if len(kept) < len(files):
        logger.info("%d input files are held out by --validation", len(files) - len(kept))
    return kept


@dataclass(frozen=True)
class _Read:
    documents: datasets.Dataset
    num_empty: int
    num_nul: int


def _read(split: str, files: Sequence[Path], work: Path, *, drop_nul: bool, num_workers: int) -> _Read:
    """Read and check all files of a split, a file at a time in each worker, in the order of the files."""
    names = [str(path) for path in files]
    everything = datasets.Dataset.from_generator(
        _read_in_worker,
        features=_TEXT_FEATURES,
        cache_dir=str(work / "text"),
        gen_kwargs={"files": names, "drop_nul": drop_nul},
        num_proc=_num_processes(num_workers, len(names)),
        split=datasets.NamedSplit(split),
        writer_batch_size=_BATCH_DOCUMENTS,
    )
    _raise_first(everything.data.column("error"))
    chunks = everything.data.column("text").chunks
    full = [pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(chunk)), 0).to_numpy(False) for chunk in chunks]
    kept = np.flatnonzero(np.concatenate([np.zeros(0, dtype=bool), *full]))
    if len(kept) == 0:
        raise DataError(
            f"all documents of the {split} inputs are empty", got=f"{len(everything)} documents in {len(names)} files"
        )
    num_nul = pc.sum(everything.data.column("num_nul")).as_py()
    return _Read(documents=everything.select(kept), num_empty=len(everything) - len(kept), num_nul=num_nul)


def _read_in_worker(files: Sequence[str], *, drop_nul: bool) -> Iterator[dict[str, str | int | None]]:
    """Documents, and an error as a row of its own: ``datasets`` wraps what a generator raises and loses its cause."""
    try:
        for document in read_documents(files, drop_nul=drop_nul):
            yield {**asdict(document), "error": None}
    except DataError as error:
        yield {"text": "", "source": "", "num_nul": 0, "error": readable(str(error))}


def _raise_first(errors: pa.ChunkedArray) -> None:
    found = errors.drop_null().to_pylist()
    if found:
        more = "" if len(found) == 1 else f"\n({len(found) - 1} more files have errors)"
        raise DataError(found[0] + more)


def _num_processes(num_workers: int, num_pieces: int) -> int | None:
    """Argument ``num_proc`` of ``datasets``: None is no process but this one."""
    processes = min(num_workers, num_pieces)
    return processes if processes > 1 else None


def _tokenize(
    split: str,
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool,
    num_workers: int,
) -> datasets.Dataset:
    """Turn ``text`` into ``tokens``; a document without any token stays without, end-of-text token or not."""
    return documents.map(
        _tokenize_batch,
        fn_kwargs={"tokenizer": tokenizer, "eos": tokenizer.eos_token_id if append_eos else None},
        batched=True,
        batch_size=_BATCH_DOCUMENTS,
        writer_batch_size=_BATCH_DOCUMENTS,
        remove_columns=["text", "num_nul", "error"],
        features=STORE_FEATURES,
        num_proc=_num_processes(num_workers, len(documents)),
        load_from_cache_file=False,
        desc=f"Tokenizing {split}",
    )


def _tokenize_batch(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, eos: int | None
) -> dict[str, list[Any]]:
    # verbose=False: that a document is longer than the model's window is what a memory is for, no reason to warn.
    encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
    end = [] if eos is None else [eos]
    return {"tokens": [ids + end if ids else [] for ids in encoded["input_ids"]], "source": batch["source"]}


def _drop_short(split: str, rows: datasets.Dataset, min_tokens: int) -> tuple[datasets.Dataset, Dropped]:
    lengths = list_lengths(rows.data.column("tokens"))
    kept = np.flatnonzero(lengths >= max(min_tokens, 1))
    if len(kept) == 0:
        raise DataError(
            f"no document of the {split} inputs has enough tokens",
            got=f"{len(lengths)} documents, the longest has {lengths.max()}",
            expected=f"--min-tokens {min_tokens}",
            do="lower --min-tokens, or give longer documents",
        )
    num_empty = int((lengths == 0).sum())
    return rows.select(kept), Dropped(empty=num_empty, short=len(lengths) - len(kept) - num_empty)


def _check_held_out_count(count: int, *, num_documents: int) -> None:
    if count >= num_documents:
        raise DataError(
            "holding out that many documents leaves none to train on",
            got=f"--validation-documents {count}",
            expected=f"less than the {num_documents} documents there are",
        )


def _hold_out(rows: datasets.Dataset, count: int, *, seed: int) -> dict[str, datasets.Dataset]:
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(seed).choice(len(rows), size=count, replace=False)] = True
    return {"train": rows.select(np.flatnonzero(~held_out)), "validation": rows.select(np.flatnonzero(held_out))}


def summary(prepared: Prepared) -> str:
    """A short table of what was written, for people."""
    splits = prepared.info.splits
    lines = [f"{'split':<12}{'documents':>11}{'tokens':>15}{'shortest':>11}{'longest':>11}"]
    for name, counts in splits.items():
        shortest, longest = counts.min_document_tokens, counts.max_document_tokens
        lines.append(f"{name:<12}{counts.num_documents:>11,}{counts.num_tokens:>15,}{shortest:>11,}{longest:>11,}")
    lines += ["", f"{'document length in tokens':<27}" + "".join(f"{name:>12}" for name in splits)]
    for power in sorted({int(key) for counts in splits.values() for key in counts.length_histogram}):
        row = "".join(f"{counts.length_histogram.get(str(power), 0):>12,}" for counts in splits.values())
        lines.append(f"{power:>12,} -{2 * power - 1:>12,} {row}")
    for name, dropped in prepared.dropped.items():
        lines.append(f"dropped from {name}: {dropped.empty:,} empty, {dropped.short:,} shorter than --min-tokens")
        if dropped.nul:
            lines.append(f"dropped from {name}: {dropped.nul:,} NUL characters")
    lines += [f"left out, cannot be read: {line}" for line in prepared.unreadable]
    tokenizer = prepared.info.tokenizer
    lines.append(
        f"tokenizer: {readable(tokenizer.name)} ({tokenizer.vocab_size:,} ids, identity {tokenizer.identity[:12]})"
    )
    lines.append(f"written to {readable(prepared.output)}")
    return "\n".join(lines)
