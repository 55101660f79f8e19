"""A store of documents that are made: its tokens, its end, and nothing where it could not be made."""

from __future__ import annotations

import pytest

from pipeline.data.made import Made, prepare_made
from pipeline.data.store import TokenStore, check_tokenizer
from pipeline.errors import DataError
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, save_tiny_tokenizer(folder)


def made(tokenizer):
    texts = {"train": ["one", "two three"], "validation": ["four"]}
    return {
        split: iter([Made(tokenizer.encode(text), f"{split} {text}") for text in of_split])
        for split, of_split in texts.items()
    }


@pytest.mark.parametrize("append_eos", [True, False])
def test_documents_come_into_the_store_as_they_are_with_an_end(tokenizer, tmp_path, append_eos):
    folder, same = tokenizer
    output = tmp_path / "store"
    prepared = prepare_made(made, tokenizer=folder, output=output, num_tokens=9, append_eos=append_eos)
    end = [same.eos_token_id] if append_eos else []
    train, held_out = TokenStore.open(output), TokenStore.open(output, "validation")
    assert [train.tokens(number).tolist() for number in (0, 1)] == [
        [*same.encode(text), *end] for text in ("one", "two three")
    ]
    assert held_out.source(0) == "validation four" and prepared.info == train.info and train.has_hashes
    check_tokenizer(train, same)
    train.verify()


def test_what_cannot_be_made_leaves_nothing_and_what_is_there_stays(tokenizer, tmp_path):
    def fails(loaded):
        def documents():
            yield Made([1], "one")
            raise DataError("there is no second one")

        return {"train": documents()}

    output = tmp_path / "store"
    with pytest.raises(DataError, match="there is no second one"):
        prepare_made(fails, tokenizer=tokenizer[0], output=output, num_tokens=2)
    assert not list(tmp_path.iterdir())
    prepare_made(made, tokenizer=tokenizer[0], output=output, num_tokens=9)
    with pytest.raises(DataError, match="the output exists already"):
        prepare_made(made, tokenizer=tokenizer[0], output=output, num_tokens=9)
    with pytest.raises(DataError, match="there is no second one"):
        prepare_made(fails, tokenizer=tokenizer[0], output=output, num_tokens=2, overwrite=True)
    assert TokenStore.open(output).num_documents == 2
    prepare_made(made, tokenizer=tokenizer[0], output=output, num_tokens=9, overwrite=True)
