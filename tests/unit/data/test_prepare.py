"""Preparation from files to a store, in process."""

from __future__ import annotations

import json
import logging
import os
import re

import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from tokenizers.processors import TemplateProcessing

from pipeline.data import prepare as module
from pipeline.data.prepare import Dropped, prepare, summary
from pipeline.data.store import TokenStore, check_tokenizer
from pipeline.errors import DataError
from tests.tiny_tokenizer import save_tiny_tokenizer

TEXTS = ["The harbour was old.", " \n\t", "a", "She remembered the long road. " * 40, "def read(memory): return past"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = save_tiny_tokenizer(folder)
    tokenizer.model_max_length = 16
    eos = tokenizer.eos_token
    template = TemplateProcessing(single=f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template  # as families with a begin-of-text token have it
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return save_tiny_tokenizer(tokenizer_folder.parent / "same")


@pytest.fixture()
def texts(tmp_path):
    """A folder of five text files, the second one empty."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def documents(output, split="train"):
    store = TokenStore.open(output, split)
    return [store.tokens(document).tolist() for document in range(store.num_documents)]


def expected(tokenizer, numbers):
    return [[*tokenizer.encode(TEXTS[number], add_special_tokens=False), tokenizer.eos_token_id] for number in numbers]


def entries(folder):
    """Everything in a folder, hidden entries too."""
    return sorted(path.name for path in folder.iterdir())


def test_documents_become_rows_in_the_order_of_the_files(texts, tmp_path, tokenizer_folder, tokenizer, caplog):
    prepared = prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store")
    assert documents(tmp_path / "store") == expected(tokenizer, [0, 2, 3, 4])
    store = TokenStore.open(tmp_path / "store")
    assert store.source(1) == str(texts / "2.txt")
    assert prepared.dropped == {"train": Dropped(empty=1, short=0)}
    assert prepared.info == store.info and prepared.info.tokenizer.vocab_size == 300
    check_tokenizer(store, tokenizer)
    assert max(store.lengths) > 16 and "longer than the specified maximum" not in caplog.text
    assert entries(tmp_path) == ["store", "texts"]


def test_workers_do_not_change_the_result(texts, tmp_path, tokenizer_folder):
    lines = "".join(json.dumps({"text": f"{text} again"}) + "\n" for text in TEXTS)
    (texts / "more.jsonl").write_text(lines)
    for name, num_workers in (("one", 1), ("two", 2)):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / name, num_workers=num_workers)
    assert documents(tmp_path / "one") == documents(tmp_path / "two")
    assert len(documents(tmp_path / "one")) == 9


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_malformed_line_is_an_error_that_leaves_nothing(texts, tmp_path, tokenizer_folder, num_workers):
    (texts / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut\n')
    with pytest.raises(DataError, match=r"malformed; got: .*bad\.jsonl, line 2"):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", num_workers=num_workers)
    (texts / "bad2.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"malformed; got: .*bad\.jsonl, line 2[^$]*1 more files have errors"):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", num_workers=num_workers)
    assert entries(tmp_path) == ["texts"]


def test_a_document_without_any_token_gets_no_end_of_text_token_either(tokenizer):
    batch = {"text": ["", "a"], "source": ["x", "y"]}
    rows = module._tokenize_batch(batch, tokenizer=tokenizer, eos=0)
    assert rows == {"tokens": [[], [*tokenizer.encode("a"), 0]], "source": ["x", "y"]}


def test_no_eos_and_min_tokens(texts, tmp_path, tokenizer_folder, tokenizer):
    plain = [ids[:-1] for ids in expected(tokenizer, [0, 3, 4])]
    prepared = prepare(
        [texts], tokenizer=tokenizer_folder, output=tmp_path / "store", append_eos=False, min_tokens=len(plain[0])
    )
    kept = [ids for ids in plain if len(ids) >= len(plain[0])]
    assert documents(tmp_path / "store") == kept
    assert prepared.dropped["train"] == Dropped(empty=1, short=4 - len(kept))


def test_whole_documents_are_held_out_by_seed(texts, tmp_path, tokenizer_folder, tokenizer):
    everything = expected(tokenizer, [0, 2, 3, 4])
    choices: list[list[list[int]]] = []
    for seed in (0, 0, 1, 2, 3):
        output = tmp_path / f"store{len(choices)}"
        prepare([texts], tokenizer=tokenizer_folder, output=output, validation_documents=2, seed=seed)
        held_out = documents(output, "validation")
        assert len(held_out) == 2
        assert sorted(documents(output) + held_out) == sorted(everything)
        choices.append(held_out)
    assert choices[0] == choices[1] and any(choice != choices[0] for choice in choices)


def test_held_out_inputs_are_not_trained_on(texts, tmp_path, tokenizer_folder, tokenizer):
    prepared = prepare(
        [texts], tokenizer=tokenizer_folder, output=tmp_path / "store", validation_inputs=[texts / "3.txt"]
    )
    assert documents(tmp_path / "store") == expected(tokenizer, [0, 2, 4])
    assert documents(tmp_path / "store", "validation") == expected(tokenizer, [3])
    assert set(prepared.dropped) == {"train", "validation"}


def test_an_existing_output_is_kept_unless_overwrite(texts, tmp_path, tokenizer_folder):
    output = tmp_path / "store"
    output.mkdir()  # an empty folder is no store to lose
    prepare([texts], tokenizer=tokenizer_folder, output=output)
    before = documents(output)
    (texts / "5.txt").write_text("one more")
    with pytest.raises(DataError, match="output exists already.*--overwrite"):
        prepare([texts], tokenizer=tokenizer_folder, output=output)
    assert documents(output) == before
    prepare([texts], tokenizer=tokenizer_folder, output=output, overwrite=True)
    assert len(documents(output)) == len(before) + 1
    assert entries(tmp_path) == ["store", "texts"]


def test_overwrite_never_replaces_what_is_not_a_store(texts, tokenizer_folder):
    for output in (texts, texts / "0.txt"):
        with pytest.raises(DataError, match="exists and is not a token store"):
            prepare([texts], tokenizer=tokenizer_folder, output=output, overwrite=True)
    assert len(entries(texts)) == 5


def test_a_failure_while_writing_keeps_the_old_store(texts, tmp_path, tokenizer_folder, monkeypatch):
    prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store")
    before = documents(tmp_path / "store")

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_store", fail)
    with pytest.raises(DataError, match="the system refused.*no space left"):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", overwrite=True)
    assert documents(tmp_path / "store") == before
    assert entries(tmp_path) == ["store", "texts"]


def test_nul_characters_are_counted_in_the_summary(texts, tmp_path, tokenizer_folder):
    (texts / "0.txt").write_text("The har\0bour\0 was old.")
    (texts / "more.jsonl").write_text('{"text": "a"}\n\0\0\0\n')
    with pytest.raises(DataError, match=r"NUL characters; got: .*0\.txt[^$]*1 more files have errors"):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", num_workers=2)
    prepared = prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", drop_nul=True)
    assert prepared.dropped == {"train": Dropped(empty=2, short=0, nul=5)}
    assert "dropped from train: 5 NUL characters" in summary(prepared).splitlines()


def test_what_cannot_be_read_is_listed_in_the_summary(texts, tmp_path, tokenizer_folder):
    (texts / "gone.txt").symlink_to(texts / "nowhere")
    with pytest.raises(DataError, match="some inputs cannot be read"):
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store")
    prepared = prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", skip_unreadable=True)
    line = f"{texts / 'gone.txt'} (symbolic link to nothing)"
    assert prepared.unreadable == (line,)
    assert f"left out, cannot be read: {line}" in summary(prepared).splitlines()
    assert entries(tmp_path) == ["store", "texts"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_names_that_are_not_utf8(texts, tmp_path, tokenizer_folder, tokenizer, num_workers):
    folder = texts / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (texts / "0.txt").rename(folder / "0.txt")
    settings = {"tokenizer": tokenizer_folder, "output": tmp_path / "store", "num_workers": num_workers}
    (folder / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"not UTF-8; got: .*/caf\\xe9/bad.txt"):
        prepare([texts], **settings)
    (folder / "bad.txt").unlink()
    prepare([texts], **settings)
    store = TokenStore.open(tmp_path / "store")
    assert [store.source(number) for number in (0, 3)] == [str(texts / "2.txt"), f"{texts}/caf\\xe9/0.txt"]
    assert documents(tmp_path / "store") == expected(tokenizer, [2, 3, 4, 0])


def test_the_output_may_be_inside_an_input_folder(texts, tokenizer_folder):
    for _ in range(2):
        prepare([texts], tokenizer=tokenizer_folder, output=texts / "store", overwrite=True)
        assert len(documents(texts / "store")) == 4


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("full", ["while reading", "while tokenizing", "while saving"])
def test_a_full_disk_is_said_in_words(texts, tmp_path, tokenizer_folder, monkeypatch, num_workers, full):
    class Full(ArrowWriter):
        def write_table(self, table, *rest):
            reading, saving = "text" in table.column_names, "/store/" in str(self._path)
            if full == ("while reading" if reading else "while saving" if saving else "while tokenizing"):
                raise OSError(28, "No space left on device")
            super().write_table(table, *rest)

    for place in ("builder", "arrow_dataset", "arrow_writer"):
        monkeypatch.setattr(f"datasets.{place}.ArrowWriter", Full)
    with pytest.raises(DataError) as error:
        prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store", num_workers=num_workers)
    words = r"the disk of the output is full; got: No space left on device: [\d.,]+ .B free in .*\.store\.preparing-.*"
    assert re.fullmatch(
        words + "expected: about 0.0 MB in all, estimated from .*; do: make room there, or .*", str(error.value)
    )
    assert entries(tmp_path) == ["texts"]


def test_errors_that_leave_nothing(texts, tmp_path, tokenizer_folder, caplog):
    def fails(match, inputs=None, **settings):
        settings = {"tokenizer": tokenizer_folder, "output": tmp_path / "store"} | settings
        with pytest.raises(DataError, match=match):
            prepare(inputs or [texts], **settings)
        assert entries(tmp_path) == ["texts"]

    fails("input does not exist", [tmp_path / "nowhere"])
    fails("tokenizer folder does not exist", tokenizer=str(tmp_path / "nowhere"))
    fails("all documents of the train inputs are empty; got: 1 documents in 1 files", [texts / "1.txt"])
    fails("all documents of the validation inputs are empty", validation_inputs=[texts / "1.txt"])
    fails("no document of the train inputs has enough tokens.*--min-tokens 99999", min_tokens=99999)
    fails("leaves none to train on.*less than the 4 documents", validation_documents=4)
    with caplog.at_level(logging.INFO):
        fails("every input file is held out", validation_inputs=[texts])
    long_ones = {"min_tokens": 20, "validation_documents": 3}
    fails("leaves none to train on.*less than the . documents", inputs=[texts], **long_ones)


def test_the_summary_says_what_is_in_the_store(texts, tmp_path, tokenizer_folder):
    prepared = prepare([texts], tokenizer=tokenizer_folder, output=tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    lines = summary(prepared).splitlines()
    assert lines[1].split() == [
        "train", "4", *(f"{number:,}" for number in (store.lengths.sum(), store.lengths.min(), store.lengths.max()))
    ]  # fmt: skip
    longest = 2 ** int(np.log2(store.lengths.max()))
    assert any(line.split() == [str(longest), "-", f"{2 * longest - 1:,}", "1"] for line in lines)
    assert "dropped from train: 1 empty, 0 shorter than --min-tokens" in lines
