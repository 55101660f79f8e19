"""The token store: what is written is read back, counts by hand, and every error in words."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256

import datasets
import numpy as np
import pytest

from pipeline.data.held_out import held_out_documents, with_split
from pipeline.data.store import STORE_FEATURES, TokenStore, add_hashes, check_tokenizer, write_store
from pipeline.data.tokenizer import TokenizerInfo
from pipeline.errors import DataError
from tests.tiny_tokenizer import save_tiny_tokenizer

DOCUMENTS = [[5, 6, 7], [1], list(range(100, 116)), [9, 8, 7, 6, 5], [0, 299]]
TOKENIZER = TokenizerInfo(identity="ab" * 32, name="some/model", vocab_size=300)


def rows(documents):
    sources = [f"file-{number}" for number in range(len(documents))]
    return datasets.Dataset.from_dict({"tokens": documents, "source": sources}, features=STORE_FEATURES)


@pytest.fixture()
def folder(tmp_path):
    path = tmp_path / "store"
    # A selection, in another order: what is stored must be the selected rows, not those below them.
    train = rows([[4, 4], *DOCUMENTS[::-1]]).select([5, 4, 3, 2, 1])
    write_store(path, {"train": train, "validation": rows([[1, 2, 3, 4]])}, tokenizer=TOKENIZER)
    return path


def test_what_is_written_is_read_back(folder):
    store = TokenStore.open(folder)
    assert store.num_documents == 5
    assert store.lengths.tolist() == [3, 1, 16, 5, 2] and store.lengths.dtype == np.int64
    for number, tokens in enumerate(DOCUMENTS):
        assert store.tokens(number).tolist() == tokens and store.tokens(number).dtype == np.int64
        assert store.source(number) == f"file-{5 - number}"
    assert store.tokens(2, 3, 6).tolist() == [103, 104, 105]
    assert store.tokens(2, 14).tolist() == [114, 115]
    assert TokenStore.open(folder, "validation").tokens(0).tolist() == [1, 2, 3, 4]


def test_store_json_by_hand(folder):
    whole = json.loads((folder / "store.json").read_text())
    for split, documents in (("train", DOCUMENTS), ("validation", [[1, 2, 3, 4]])):
        counts = whole["splits"][split]
        read = {path.name: path.read_bytes() for path in (folder / split).iterdir()}
        hashes = {name: {"size": len(raw), "sha256": sha256(raw).hexdigest()} for name, raw in read.items()}
        assert len(hashes) == 3 and counts.pop("files") == hashes
        lengths = np.array([len(document) for document in documents], "<i8")
        tokens = np.array([token for document in documents for token in document], "<i4")
        assert counts.pop("tokens_sha256") == sha256(lengths.tobytes() + tokens.tobytes()).hexdigest()
    assert whole == {
        "format_version": 1,
        "tokenizer": {"identity": "ab" * 32, "name": "some/model", "vocab_size": 300},
        "splits": {
            "train": {
                "num_documents": 5,
                "num_tokens": 27,
                "min_document_tokens": 1,
                "max_document_tokens": 16,
                "length_histogram": {"1": 1, "2": 2, "4": 1, "16": 1},
            },
            "validation": {
                "num_documents": 1,
                "num_tokens": 4,
                "min_document_tokens": 4,
                "max_document_tokens": 4,
                "length_histogram": {"4": 1},
            },
        },
    }
    assert TokenStore.open(folder).info.splits["train"].num_tokens == 27


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="store does not exist.*nowhere.*prepare_data.py"):
        TokenStore.open(tmp_path / "nowhere")


def test_a_folder_without_store_json_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a token store: it has no store.json"):
        TokenStore.open(tmp_path)


def test_a_missing_split_is_an_error(tmp_path):
    write_store(tmp_path / "store", {"train": rows(DOCUMENTS)}, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="no split 'validation'.*with train.*--validation-documents"):
        TokenStore.open(tmp_path / "store", "validation")


def change_info(folder, change):
    whole = json.loads((folder / "store.json").read_text())
    change(whole)
    (folder / "store.json").write_text(json.dumps(whole))


def test_another_format_version_is_an_error(folder):
    change_info(folder, lambda whole: whole.update(format_version=99))
    with pytest.raises(DataError, match="another format version; got: 99; expected: 1"):
        TokenStore.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1, "splits": {"train": {"a": 1}}}'])
def test_a_damaged_store_json_is_an_error(folder, text):
    (folder / "store.json").write_text(text)
    with pytest.raises(DataError, match="damaged: store.json cannot be read"):
        TokenStore.open(folder)


def test_a_split_that_was_deleted_is_an_error(folder):
    shutil.rmtree(folder / "train")
    with pytest.raises(DataError, match="damaged: a split cannot be read.*train"):
        TokenStore.open(folder)


def test_a_cut_arrow_file_is_an_error(folder):
    (arrow,) = (folder / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged: a split cannot be read"):
        TokenStore.open(folder)


def test_counts_that_differ_from_store_json_are_an_error(folder):
    change_info(folder, lambda whole: whole["splits"]["train"].update(num_tokens=28))
    with pytest.raises(DataError, match="5 documents, 27 tokens.*expected: 5 documents, 28 tokens"):
        TokenStore.open(folder)


def alter_a_token(folder):
    """As a disk or a person might: one token is another, and nothing else is changed."""
    (arrow,) = (folder / "train").glob("*.arrow")
    content = arrow.read_bytes()
    old, new = (np.arange(first, 116, dtype="<i4").tobytes() for first in (100, 101))
    assert content.count(old) == 1
    arrow.write_bytes(content.replace(old, new + np.array([7], "<i4").tobytes()))


def test_tokens_that_were_altered_in_place_are_found_when_all_is_read(folder):
    read: list[int] = []
    store = TokenStore.open(folder)
    store.verify(progress=read.append)
    assert sum(read) == store.num_bytes == sum(path.stat().st_size for path in (folder / "train").iterdir())
    alter_a_token(folder)
    store = TokenStore.open(folder)
    assert store.tokens(2, 15).tolist() == [7]
    words = r"altered; got: .*train: data-00000-of-00001.arrow has another content than when it was written; do: put"
    with pytest.raises(DataError, match=words):
        store.verify()


def test_another_size_is_found_without_reading(folder):
    state = folder / "train" / "state.json"
    state.write_text(state.read_text() + "\n")
    with pytest.raises(DataError, match=r"altered; got: .*train: state.json has another size, or is missing; do: put"):
        TokenStore.open(folder)


def test_a_file_that_cannot_be_read_is_named(folder, monkeypatch):
    store = TokenStore.open(folder)

    def unreadable(path, **_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("pipeline.data.hashes.FileHash.of", unreadable)
    with pytest.raises(DataError, match=r"store cannot be read; got: .*train/data-\S+ \(Input/output error\); do: put"):
        store.verify()


def test_the_identity_is_that_of_the_tokens(folder, tmp_path):
    identity = TokenStore.open(folder).identity
    write_store(tmp_path / "again", {"train": rows(DOCUMENTS)}, tokenizer=TOKENIZER)
    assert TokenStore.open(tmp_path / "again").identity == identity
    moved = [[5, 6], [7, 1], *DOCUMENTS[2:]]  # the same tokens, cut elsewhere
    write_store(tmp_path / "moved", {"train": rows(moved)}, tokenizer=TOKENIZER)
    assert TokenStore.open(tmp_path / "moved").identity != identity


def without_hashes(whole):
    for counts in whole["splits"].values():
        del counts["files"], counts["tokens_sha256"]


def test_a_store_of_before_gets_hashes_afterwards(folder):
    with_hashes = json.loads((folder / "store.json").read_text())
    change_info(folder, without_hashes)
    store = TokenStore.open(folder)
    assert not store.has_hashes and store.num_bytes == 0
    assert store.identity == with_hashes["splits"]["train"]["tokens_sha256"]  # worked out
    store.verify()
    add_hashes(folder)
    assert json.loads((folder / "store.json").read_text()) == with_hashes
    assert sorted(path.name for path in folder.iterdir()) == ["store.json", "train", "validation"]


def put(*path, value):
    """Changes one place of store.json."""

    def change(whole):
        for name in path[:-1]:
            whole = whole[name]
        if value is None:
            del whole[path[-1]]
        else:
            whole[path[-1]] = value

    return change


ARROW = "data-00000-of-00001.arrow"
TRAIN = ("splits", "train")


@pytest.mark.parametrize(
    "change",
    [
        put(*TRAIN, "files", value={}),
        put(*TRAIN, "files", value=None),
        put("splits", "validation", "files", value=None),
        put("splits", "validation", "tokens_sha256", value=None),
        put(*TRAIN, "files", ARROW, value=None),
        put(*TRAIN, "files", "../../x", value={"size": 1, "sha256": "0" * 64}),
        put(*TRAIN, "files", "a\0b", value={"size": 1, "sha256": "0" * 64}),
        put(*TRAIN, "files", ARROW, "size", value="9"),
        put(*TRAIN, "files", ARROW, "sha256", value=5),
        put(*TRAIN, "tokens_sha256", value=5),
        put(*TRAIN, "num_documents", value=5.0),
        put(*TRAIN, "num_documents", value="5"),
        put(*TRAIN, "length_histogram", value=[]),
        put("tokenizer", "vocab_size", value="300"),
        put("tokenizer", "vocab_size", value=10**30),
        put("tokenizer", "identity", value=5),
        put("tokenizer", value=None),
        put("splits", value=[]),
    ],
)
def test_a_store_json_of_other_types_or_with_some_hashes_only_is_damaged(folder, change):
    change_info(folder, change)
    with pytest.raises(DataError, match=r"the token store is damaged: .*; got: .*(train|validation|store.json).*; do:"):
        TokenStore.open(folder)


@pytest.mark.parametrize("text", ["[" * 3000, "\xff", "[]", "5", '{"format_version": true}'])
def test_a_store_json_of_garbage_is_refused(folder, text):
    (folder / "store.json").write_text(text, encoding="latin1")
    with pytest.raises(DataError, match="the token store (is damaged|has another format version)"):
        TokenStore.open(folder)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "5"])
def test_files_of_a_split_that_hold_something_else_are_refused(folder, name, text):
    (folder / "train" / name).write_text(text)
    with pytest.raises(DataError, match=r"the token store is damaged(:|, or was altered)"):
        TokenStore.open(folder)


def test_nobody_waits_for_a_pipe_in_a_store(folder):
    (folder / "train" / ARROW).unlink()
    os.mkfifo(folder / "train" / ARROW)
    with pytest.raises(DataError, match=f"a split cannot be read; got: .*{ARROW} is no plain file"):
        TokenStore.open(folder)


def test_tokens_of_another_type_are_refused(tmp_path):
    features = datasets.Features(tokens=datasets.List(datasets.Value("int64")), source=datasets.Value("string"))
    wide = datasets.Dataset.from_dict({"tokens": DOCUMENTS, "source": ["a"] * 5}, features=features)
    write_store(tmp_path, {"train": wide}, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="a split cannot be read; got: .*not lists of int32"):
        TokenStore.open(tmp_path)


def test_a_token_that_a_model_has_no_embedding_of_is_named(folder):
    store = TokenStore.open(folder)
    store.limit_vocabulary(299)
    assert store.tokens(3).tolist() == [9, 8, 7, 6, 5]
    with pytest.raises(DataError, match=r"not in the vocabulary; got: 299 in .*document 4 .*expected: 0 to 298"):
        store.tokens(4)


def test_hashes_are_not_replaced_nor_given_to_a_damaged_store(folder):
    alter_a_token(folder)
    with pytest.raises(DataError, match=r"has hashes already; got: .*; do: prepare the data again"):
        add_hashes(folder)
    change_info(folder, without_hashes)
    change_info(folder, lambda whole: whole["splits"]["train"].update(num_tokens=28))
    with pytest.raises(DataError, match="damaged: a split does not hold what store.json says"):
        add_hashes(folder)


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_named(tmp_path, token):
    documents = [[5, 6], [7, 8, 9, token, 2]]
    write_store(tmp_path, {"train": rows(documents)}, tokenizer=TOKENIZER)
    store = TokenStore.open(tmp_path)
    assert store.tokens(1, 0, 3).tolist() == [7, 8, 9]
    words = (
        rf"not in the vocabulary; got: {token} in .*train, document 1 \(file-1\), token 3; expected: 0 to 299.*; do:"
    )
    with pytest.raises(DataError, match=words):
        store.tokens(1, 2)


def test_an_empty_document_is_an_error(tmp_path):
    write_store(tmp_path / "store", {"train": rows([[1], []])}, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="has empty documents.*train"):
        TokenStore.open(tmp_path / "store")


def test_an_empty_split_is_an_error(folder):
    change_info(folder, lambda whole: whole["splits"]["train"].update(num_documents=0, num_tokens=0))
    with pytest.raises(DataError, match="the token store is empty.*train"):
        TokenStore.open(folder)


def test_another_tokenizer_is_an_error_that_names_both(folder, tmp_path):
    store = TokenStore.open(folder)
    other = save_tiny_tokenizer(tmp_path / "other", vocab_size=260)
    expected = "made with another tokenizer.*with 260 ids.*expected: 'some/model' with 300 ids, identity ababab"
    with pytest.raises(DataError, match=expected):
        check_tokenizer(store, other)


def numbers(stores, count, min_tokens):
    return [one.number for one in held_out_documents(stores, count=count, min_tokens=min_tokens)]


def test_held_out_documents_are_long_enough_and_a_larger_count_keeps_a_smallers(folder, caplog):
    stores = [TokenStore.open(folder)]
    assert numbers(stores, 9, 3) == [0, 2, 3]
    assert "only 3 of 9 documents" in caplog.text
    assert numbers(stores, 1, 5) in ([2], [3])
    chosen = [set(numbers(stores, count, 1)) for count in (1, 2, 3, 4)]
    assert [len(documents) for documents in chosen] == [1, 2, 3, 4]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


def test_held_out_documents_of_several_stores_are_taken_in_turn(folder, tmp_path, caplog):
    other = tmp_path / "other"
    write_store(other, {"train": rows([[1] * 5, [2] * 6])}, tokenizer=TOKENIZER)
    stores = [TokenStore.open(folder), TokenStore.open(other)]
    found = held_out_documents(stores, count=3, min_tokens=3)
    # Two of the first store, which has five documents, one of the second.
    assert [one.store for one in found] == [stores[0], stores[0], stores[1]]
    assert all(one.number == one.document for one in found[:2]) and found[2].number == 5 + found[2].document
    assert {number for number in numbers(stores, 3, 3) if number < 5} == set(numbers(stores[:1], 2, 3))
    assert set(numbers(stores, 9, 3)) == {0, 2, 3, 5, 6}
    assert not [record for record in caplog.records if "none is evaluated" in record.message]
    assert all(number < 5 for number in numbers(stores, 2, 7))
    assert f"no held-out document of {other} has 7 tokens: none is evaluated" in caplog.text


def test_stores_without_a_split_are_named(folder, tmp_path, caplog):
    other = tmp_path / "other"
    write_store(other, {"train": rows([[1] * 5])}, tokenizer=TOKENIZER)
    assert with_split([str(other), str(folder)], "validation") == [str(folder)]
    assert f"{other} has no validation split: there will be no held-out evaluation" in caplog.text
    with pytest.raises(DataError, match="store does not exist"):
        with_split([str(folder), str(tmp_path / "nowhere")], "validation")


def test_held_out_documents_all_too_short_is_an_error(folder):
    with pytest.raises(DataError, match="the longest of 5 has 16 tokens; expected: 17 tokens.*context_tokens"):
        held_out_documents([TokenStore.open(folder)], count=1, min_tokens=17)


@pytest.mark.parametrize("harm", ["touched", "rewritten", "gone"])
def test_a_store_that_changes_after_it_was_opened_is_an_error(folder, harm):
    store = TokenStore.open(folder)
    store.check_unchanged()
    if harm == "touched":
        os.utime(folder / "store.json", (0, 0))
    elif harm == "rewritten":
        (folder / "train" / "state.json").write_text("{}")
    else:
        shutil.rmtree(folder / "train")
    name = {"touched": "store.json", "rewritten": "train/state.json", "gone": "train/data-00000-of-00001.arrow, train/"}
    with pytest.raises(
        DataError, match=f"has changed since it was opened; got: .*gone: {name[harm]}.*; do: put the store"
    ):
        store.check_unchanged()
