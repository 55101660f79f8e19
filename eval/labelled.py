"""The labelled sentences of in-context learning: SST-2, MR, Subj, SST-5 and MPQA, of files or from the hub.

Source: https://arxiv.org/abs/2306.07174 (LongMem) and its code: the files, the prompts, and which split is scored.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError, in_a_line


class Example(NamedTuple):
    """A sentence and the number of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Form:
    """How a set is written and asked.

    Attributes:
        folder: Its name below the data.
        files: Of the demonstrations and of the test items.
        written: How a line is: `tsv` with a head, `csv` (label, text) or `spaced` (label text).
        labels: As the prompt calls them, by number.
        prompt: What comes before the label, with a place for the sentence.
        hub: Name on the hub.
        hub_splits: As `files`.
    """

    folder: str
    files: tuple[str, str]
    written: str
    labels: tuple[str, ...]
    prompt: str
    hub: str
    hub_splits: tuple[str, str]

    def ask(self, text: str) -> str:
        """What comes before the label of a sentence."""
        return self.prompt.format(text)

    def answer(self, label: int) -> str:
        """What comes after the prompt."""
        return f" {self.labels[label]}"

    def demonstration(self, example: Example) -> str:
        """A sentence with its label."""
        return f"{self.ask(example.text)}{self.answer(example.label)}."


_REVIEW, _INPUT, _TWO = "Review: {} Sentiment:", "Input: {} Type:", ("negative", "positive")
_CSV = ("train.csv", "test.csv")
FORMS: Mapping[str, Form] = {
    "SST-2": Form("SST-2", ("train.tsv", "dev.tsv"), "tsv", _TWO, _REVIEW, "stanfordnlp/sst2", ("train", "validation")),
    "MR": Form("mr", _CSV, "csv", _TWO, _REVIEW, "cornell-movie-review-data/rotten_tomatoes", ("train", "test")),
    "Subj": Form("subj", _CSV, "csv", ("subjective", "objective"), _INPUT, "SetFit/subj", ("train", "test")),
    "SST-5": Form(
        "sst-5",
        ("stsa.fine.train", "stsa.fine.dev"),
        "spaced",
        ("terrible", "bad", "okay", "good", "great"),
        _REVIEW,
        "SetFit/sst5",
        ("train", "validation"),
    ),
    "MPQA": Form("mpqa", _CSV, "csv", _TWO, _REVIEW, "jxm/mpqa", ("train", "test")),
}
HUB = "hub"
_BRACKETS = re.compile("-[lr][crs]b-")
"""As some sets write them."""
_NOT_PLAIN = re.compile("[^a-z0-9]")


@dataclass(frozen=True)
class LabelledSet:
    """A set.

    Attributes:
        name: Its name.
        form: How it is asked.
        train: What demonstrations are drawn from.
        test: What is scored.
        split: Name of the file or split that `test` is.
    """

    name: str
    form: Form
    train: Sequence[Example]
    test: Sequence[Example]
    split: str


def read_set(name: str, data: Sequence[str]) -> LabelledSet:
    """Reads a set.

    Args:
        name: One of `FORMS`.
        data: Folders that hold sets, each in a folder of its own; `hub`; or `SET=NAME`, where that set is on the hub.

    Returns:
        The set, without sentences of no text.

    Raises:
        DataError: It is not there, cannot be read, is of another format, has another label, or is empty.
    """
    form = FORMS[name]
    elsewhere = dict(one.split("=", 1) for one in data if "=" in one and not Path(one).exists())
    if name in elsewhere or HUB in data:
        splits: Sequence[str] = form.hub_splits
        parts = _from_hub(elsewhere.get(name, form.hub), form)
    else:
        folder, splits = _folder(form, data), form.files
        parts = [_read(folder / file, form) for file in splits]
    for split, part in zip(splits, parts, strict=True):
        if not part:
            raise DataError(
                f"{name} is empty", got=f"no sentence in {split}", expected="at least one", do="name other data"
            )
    return LabelledSet(name, form, parts[0], parts[1], splits[1])


def sets_in(data: Sequence[str]) -> list[str]:
    """Names of the sets that `read_set` finds in the same data."""
    found = []
    for name, form in FORMS.items():
        with suppress(DataError):
            if HUB not in data and not any(one.startswith(f"{name}=") for one in data):
                _folder(form, data)
            found.append(name)
    return found


def known_sets(sets: Iterable[str]) -> tuple[str, ...]:
    """The sets by their names, whatever their case; each once. Raises ValueError: there is no such set."""
    names = {name.casefold(): name for name in FORMS}
    found = tuple(sets)
    unknown = [one for one in found if one.casefold() not in names]
    if unknown:
        raise ValueError(f"there is no set {unknown[0]!r}; expected some of {', '.join(FORMS)}")
    return tuple(dict.fromkeys(names[one.casefold()] for one in found))


def as_compared(text: str) -> str:
    """What two sentences have in common if they are the same one."""
    return " ".join(text.casefold().split())


def as_compared_over_sets(text: str) -> str:
    """As `as_compared`, without what sets write in ways of their own: spaces, marks, brackets and accented letters."""
    compared = as_compared(text)
    return _NOT_PLAIN.sub("", _BRACKETS.sub("", compared)) or compared


def _folder(form: Form, data: Sequence[str]) -> Path:
    found: list[str] = []
    for one in data:
        path = Path(one).expanduser()
        for folder in [path, *(sorted(path.iterdir()) if path.is_dir() else [])]:
            found.append(folder.name)
            if folder.name.casefold() == form.folder.casefold() and (folder / form.files[0]).is_file():
                return folder
    raise DataError(
        f"the set {form.folder} is not in the data",
        got=f"{', '.join(data)}, which has {', '.join(found[:10]) or 'nothing'}"[:400],
        expected=f"{form.folder}/{form.files[0]} and {form.files[1]}",
        do="name the folder above it, leave the set out of those that are asked for, or name hub instead",
    )


def _read(path: Path, form: Form) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n")
        rows = list(_lines(lines, path, form))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read", got=in_a_line(error), expected="a text file in UTF-8") from error
    examples = []
    for number, fields in rows:
        expected = {"tsv": "TEXT<tab>LABEL", "csv": "LABEL,TEXT", "spaced": "LABEL TEXT"}[form.written]
        if len(fields) != 2:
            raise DataError(
                f"{path}, line {number}: another format", got=str(fields)[:200], expected=f"{expected}, LABEL a number"
            )
        text, label = fields if form.written == "tsv" else fields[::-1]
        examples.append(Example(text.strip(), _label(label, form, f"{path}, line {number}")))
    return [one for one in examples if one.text]


def _lines(lines: str, path: Path, form: Form) -> Iterator[tuple[int, list[str]]]:
    """Fields of every line; a line of `csv` may be several of the file."""
    if not lines:
        return
    if form.written == "csv":
        reader = csv.reader(lines.split("\n"), strict=False)
        for fields in reader:
            yield reader.line_num, fields
        return
    separator = {"tsv": "\t", "spaced": " "}[form.written]
    rows = [line.split(separator, -1 if form.written == "tsv" else 1) for line in lines.split("\n")]
    if form.written == "tsv":
        head = rows.pop(0)
        if head != ["sentence", "label"]:
            raise DataError(f"{path} has another format", got=f"the columns {head}"[:200], expected="sentence, label")
    for number, fields in enumerate(rows, start=2 if form.written == "tsv" else 1):
        yield number, fields


def _label(label: Any, form: Form, where: str) -> int:
    if str(label) in form.labels:  # a hub's own word for it
        return form.labels.index(str(label))
    numbers = {str(number): number for number in range(len(form.labels))}
    if str(label).strip() not in numbers:
        raise DataError(
            f"{where}: a label outside the set {form.folder}",
            got=repr(label)[:80],
            expected=", ".join(f"{number} ({form.labels[number]})" for number in numbers.values()),
            do="check the file, or name other data",
        )
    return numbers[str(label).strip()]


def _from_hub(name: str, form: Form) -> list[list[Example]]:
    """Both splits. The library is loaded here, for files need none of it."""
    import datasets

    try:
        loaded = [datasets.load_dataset(name, split=split) for split in form.hub_splits]
    except Exception as error:
        raise DataError(
            f"{name} cannot be loaded from the hub",
            got=in_a_line(error),
            do="connect this machine (and unset HF_HUB_OFFLINE), or give files with --data in_context=FOLDER",
        ) from error
    parts = []
    for split, part in zip(form.hub_splits, loaded, strict=True):
        text = next((key for key in ("text", "sentence") if key in part.column_names), None)
        # A set's own word, where it is ours, says more than a number: not all count Subj's labels alike.
        words = "label_text" if "label_text" in part.column_names else "label"
        if text is None or "label" not in part.column_names:
            raise DataError(
                f"{name} has another format", got=f"the columns {part.column_names}", expected="text or sentence, label"
            )
        examples = []
        for number, row in enumerate(part):
            label = row[words] if row[words] in form.labels else row["label"]
            examples.append(Example(str(row[text]).strip(), _label(label, form, f"{name}, {split}, row {number}")))
        parts.append([one for one in examples if one.text])
    return parts
