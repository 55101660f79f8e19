"""What the harness's tasks here read: the user's own files, named in `--metadata`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.tasks.chapterbreak.files import read_examples
from pipeline.data.files import find_files
from pipeline.data.inputs import read_documents
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import DataError


def books(books: str | Sequence[str] | None = None, book_characters: int | None = None, **others: Any) -> Any:
    """Documents of text files.

    Args:
        books: Files or folders.
        book_characters: Of each document the first ones; None: all.
        **others: What else `--metadata` and `--model_args` say.

    Returns:
        The split `test`.

    Raises:
        DataError: A file cannot be read, or there is no text.
    """
    del others
    paths = [_named("books", path) for path in ([books] if books is None or isinstance(books, str) else books)]
    texts = [document.text[:book_characters] for document in read_documents([str(path) for path in find_files(paths)])]
    return _test_split([{"text": text} for text in texts if text.strip()], paths)


def chapterbreak(
    chapterbreak: str | None = None,
    tokenizer: str | None = None,
    context_tokens: int = 8192,
    suffix_tokens: int = 128,
    **others: Any,
) -> Any:
    """Chapters' ends and six beginnings each, the right one first.

    Args:
        chapterbreak: The published file, or one that leaves its outer level out.
        tokenizer: Folder or hub name of what contexts and suffixes are measured with.
        context_tokens: Of each context the last ones.
        suffix_tokens: Of each suffix the first ones.
        **others: What else `--metadata` and `--model_args` say.

    Returns:
        The split `test`.

    Raises:
        DataError: The file cannot be read, or is in another format.
    """
    del others
    path = _named("chapterbreak", chapterbreak)
    measure = load_tokenizer(_named("tokenizer", tokenizer))
    rows = []
    for example in read_examples([path], "all"):
        cut = [_first(measure, text, suffix_tokens) for text in example.suffixes]
        context = _last(measure, example.context, context_tokens)
        rows.append({"context": context, "choices": [text for text, _ in cut], "num_tokens": [n for _, n in cut]})
    return _test_split(rows, [path])


def chosen(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Whether the first choice is the best one; one of several equally good ones counts as a share."""
    sums = np.array([likelihood for likelihood, _ in results])
    found = {}
    for name, scores in (("acc_mean", sums / np.array(doc["num_tokens"])), ("acc_sum", sums)):
        best = scores == scores.max()
        found[name] = float(best[0]) / float(best.sum())
    return found


def _named(key: str, value: str | None) -> str:
    if not value:
        raise DataError(f"the task does not know its {key}", do=f'add --metadata \'{{"{key}": "PATH"}}\'')
    return value


def _test_split(rows: Sequence[dict[str, Any]], paths: Sequence[str]) -> Any:
    if not rows:
        raise DataError("there is nothing to score", got=", ".join(paths), do="name files with text")
    return {"test": datasets.Dataset.from_list(list(rows))}


def _first(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> tuple[str, int]:
    """The beginning of a text, and how many tokens it has."""
    ends = [end for _, end in _offsets(tokenizer, text)][:num_tokens]
    return text[: ends[-1]] if ends else "", len(ends)


def _last(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> str:
    """The end of a text."""
    begins = [begin for begin, _ in _offsets(tokenizer, text)][-num_tokens:]
    return text[begins[0] :] if begins else ""


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[tuple[int, int]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["offset_mapping"])
