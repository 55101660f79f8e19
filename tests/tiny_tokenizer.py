"""A tiny byte-level tokenizer for tests: made in milliseconds, without files or network."""

from __future__ import annotations

from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_SENTENCES = (
    "It was a bright cold day in the harbour, and the clocks of the old town were striking one after another. "
    "She remembered the letter, the long road over the hills, and what the captain had said of the other ship. "
    "def read(memory, query): return the chunks of the past that match the query best, nothing that comes later. "
)


def save_tiny_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, save it and return it; it encodes any text and has an end-of-text token.

    Args:
        folder: Where to save it, as ``save_pretrained`` does; made if missing.
        vocab_size: Number of ids, 257 (256 bytes and the end-of-text token) to about 400.

    Returns:
        The tokenizer.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [_SENTENCES], vocab_size=vocab_size, min_frequency=1, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END_OF_TEXT)
    assert len(tokenizer) == vocab_size, f"the sentences give {len(tokenizer)} ids, not {vocab_size}"
    tokenizer.save_pretrained(folder)
    return tokenizer
