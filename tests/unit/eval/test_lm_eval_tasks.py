"""The tasks of lm-evaluation-harness over a user's own files, with an oracle in the model's place."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from eval.adapters.lm_eval import LongMemLM
from eval.adapters.tasks import local
from pipeline.errors import DataError
from tests.oracle_scorer import OracleScorer

FOLDER = str(Path(local.__file__).parent)
BOOK = "It was a bright cold day in the harbour. She remembered the letter, the long road over the hills, and more. "


@pytest.fixture
def chapters(tmp_path):
    """ChapterBreak with a beginning that an oracle knows, as published and one level flatter."""
    item = {"ctx": BOOK * 4, "pos": "GOOD " + BOOK * 3, "negs": [f"CHAPTER {n} {BOOK}" for n in range(5)]}
    (tmp_path / "nested.json").write_text(json.dumps({"pg19": {"A": [item]}, "ao3": {"B": [item, item]}}))
    (tmp_path / "flat.json").write_text(json.dumps({"A": [item], "B": [item, item]}))
    return tmp_path


def evaluated(model, task, **metadata):
    manager = TaskManager(include_path=FOLDER, include_defaults=False, metadata=metadata)
    return simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][task]


@pytest.mark.parametrize("name", ["nested.json", "flat.json"])
def test_chapters_are_known_by_their_beginning(chapters, tokenizer, name):
    good = tokenizer.encode("\n\nGOOD")

    def knows(before, token, condition):
        return 0.5 if before[-len(good) - 20 :].count(good[-1]) or token in good else 1.0

    metadata = {"chapterbreak": str(chapters / name), "tokenizer": tokenizer.name_or_path, "suffix_tokens": 12}
    model = LongMemLM(OracleScorer(knows), tokenizer)
    found = evaluated(model, "longmem_chapterbreak", context_tokens=40, **metadata)
    assert found["acc_mean,none"] == found["acc_sum,none"] == 1.0
    blind = LongMemLM(OracleScorer(lambda before, token, condition: 0.0), tokenizer)
    assert evaluated(blind, "longmem_chapterbreak", **metadata)["acc_mean,none"] == pytest.approx(1 / 6)


def test_contexts_are_cut_on_the_left_and_suffixes_on_the_right(chapters, tokenizer):
    rows = local.chapterbreak(str(chapters / "flat.json"), tokenizer.name_or_path, context_tokens=40, suffix_tokens=12)[
        "test"
    ]
    assert len(rows) == 3
    assert (BOOK * 4).endswith(rows[0]["context"])
    assert len(tokenizer.encode(rows[0]["context"])) == 40
    assert ("GOOD " + BOOK).startswith(rows[0]["choices"][0])
    assert rows[0]["num_tokens"] == [12] * 6


def test_mean_and_sum_choose_differently_and_ties_are_shared():
    doc = {"num_tokens": [4, 2, 2]}
    assert local.chosen(doc, [(-4.0, False), (-3.0, False), (-5.0, False)]) == {"acc_mean": 1.0, "acc_sum": 0.0}
    assert local.chosen(doc, [(-2.0, False), (-1.0, False), (-9.0, False)]) == {"acc_mean": 0.5, "acc_sum": 0.0}


def test_books_are_normalised_by_their_words_and_bytes(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(BOOK)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": BOOK * 2}) + "\n")
    model = LongMemLM(OracleScorer(), tokenizer)  # a nat a token
    found = evaluated(model, "longmem_books", books=str(tmp_path))
    nats = len(tokenizer.encode(BOOK)) + len(tokenizer.encode(BOOK * 2))
    words = sum(len(text.split()) for text in (BOOK + " ", BOOK * 2 + " "))
    assert found["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / (3 * len(BOOK)))
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=0.1)
    assert len(local.books(str(tmp_path / "a.txt"), 10)["test"][0]["text"]) == 10


def test_files_of_another_kind_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="does not know its books; do: add --metadata"):
        local.books()
    with pytest.raises(DataError, match="does not know its chapterbreak"):
        local.chapterbreak(tokenizer="x")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="nothing to score"):
        local.books(str(tmp_path / "empty.txt"))
    (tmp_path / "x.json").write_text('{"A": [{"ctx": "a"}]}')
    with pytest.raises(DataError, match="not one of ChapterBreak; got: .*keys ctx"):
        local.chapterbreak(str(tmp_path / "x.json"), tokenizer.name_or_path)
