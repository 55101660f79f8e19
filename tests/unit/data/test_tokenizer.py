"""Identity and loading of tokenizers."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from pipeline.data import tokenizer as module
from pipeline.data.tokenizer import load_tokenizer, tokenizer_identity
from pipeline.errors import DataError
from tests.tiny_tokenizer import save_tiny_tokenizer


def test_a_saved_and_loaded_tokenizer_keeps_its_identity(tmp_path):
    made = save_tiny_tokenizer(tmp_path / "tok")
    loaded = load_tokenizer(tmp_path / "tok")
    loaded.save_pretrained(tmp_path / "again")
    identities = {tokenizer_identity(each) for each in (made, loaded, load_tokenizer(tmp_path / "again"))}
    assert len(identities) == 1 and len(identities.pop()) == 64


def test_what_does_not_decide_the_ids_of_a_text_does_not_change_the_identity(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path / "tok")
    before = tokenizer_identity(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "long one"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None and tokenizer.backend_tokenizer.padding is not None
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{eos} $A", special_tokens=[(eos, 0)])
    assert tokenizer_identity(tokenizer) == before


def test_what_decides_the_ids_of_a_text_changes_the_identity(tmp_path):
    tokenizer = save_tiny_tokenizer(tmp_path / "tok")
    identities = [tokenizer_identity(tokenizer), tokenizer_identity(save_tiny_tokenizer(tmp_path / "b", 280))]
    tokenizer.add_tokens(["harbour"])
    identities.append(tokenizer_identity(tokenizer))
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    identities.append(tokenizer_identity(tokenizer))
    assert len(set(identities)) == 4


def test_slow_tokenizers_have_an_identity_too():
    first, same, other = ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(extra_ids=3)
    assert getattr(first, "backend_tokenizer", None) is None, "this test wants a slow tokenizer"
    assert tokenizer_identity(first) == tokenizer_identity(same) != tokenizer_identity(other)


def test_a_missing_folder_is_an_error(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "my models/tiny", "tok/", "C:\\tok", "tok\udce9"):
        with pytest.raises(DataError, match="tokenizer folder does not exist.*tokenizer.json"):
            load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer that can be loaded.*expected: tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_file_or_nothing_instead_of_a_folder_is_an_error(tmp_path):
    save_tiny_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"the tokenizer is a file; got: .*tokenizer\.json; expected: its folder"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="name of the tokenizer is empty"):
        load_tokenizer("")


def test_a_hub_name_without_network_is_an_error_in_words(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("Name or service not known\nand a long traceback")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(DataError, match=r"neither as a folder.*nor on the hub; got: nobody/x \(Name or .*known\); do"):
        load_tokenizer("nobody/x")
    assert module.is_a_path("org/model") is False
