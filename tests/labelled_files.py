"""Files of labelled sentences as in-context learning reads them, small."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from eval.labelled import FORMS

Sentences = Sequence[tuple[str, int]]


def write_set(folder: Path, name: str, train: Sentences, test: Sentences) -> Path:
    """Writes a set below a folder, as its authors give it.

    Args:
        folder: Where; its name is that of the data.
        name: One of `FORMS`.
        train: Sentences and labels of the demonstrations.
        test: Those of the test items.

    Returns:
        The folder of the set.
    """
    form = FORMS[name]
    own = folder / form.folder
    own.mkdir(parents=True, exist_ok=True)
    for file, sentences in zip(form.files, (train, test), strict=True):
        text = io.StringIO()
        if form.written == "csv":
            csv.writer(text, lineterminator="\n").writerows((label, sentence) for sentence, label in sentences)
        elif form.written == "tsv":
            text.write("sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in sentences))
        else:
            text.write("".join(f"{label} {sentence}\n" for sentence, label in sentences))
        (own / file).write_text(text.getvalue(), encoding="utf-8")
    return own
