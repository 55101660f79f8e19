"""The inputs of tiny runs and a tiny tokenizer, for the tests of tasks."""

import pytest

from pipeline.data.tokenizer import load_tokenizer
from tests.tiny_run import tiny_run
from tests.tiny_tokenizer import save_tiny_tokenizer

__all__ = ["tiny_run"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(folder)
    return load_tokenizer(folder)
