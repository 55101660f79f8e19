"""GPT-2's tokenizer with the ids of a fairseq dictionary.

The authors' code splits text with GPT-2's byte-pair encoding, and then numbers the pieces anew: line `n` (from 0) of
`dict.txt` names the GPT-2 id that has the id `n + 4`, after four special ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from pipeline.errors import DataError, in_a_line

logger = logging.getLogger(__name__)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3."""
_VOCABULARIES, _MERGES = ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")


def read_dictionary(path: Path, vocab_size: int) -> dict[str, int]:
    """Reads a fairseq dictionary.

    Args:
        path: The file: a symbol and its count on each line.
        vocab_size: `V` of the model that it belongs to.

    Returns:
        Each symbol's id.

    Raises:
        DataError: It is none, or of another model.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        found = f"{path} ({in_a_line(error)})"
        raise DataError("the dictionary cannot be read", got=found, do="give dict.txt") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(lines):
        symbol, _, count = line.rpartition(" ")
        if not symbol or not count.isdigit():
            raise DataError(
                f"{path.name} is no dictionary of fairseq",
                got=f"line {number + 1}: {line[:80]!r}",
                expected="a symbol and its count, such as `262 47284`",
                do="give the dict.txt that was published with the checkpoint",
            )
        if symbol in ids:
            raise DataError(f"{path.name} has a symbol twice", got=f"{symbol[:80]!r}, again in line {number + 1}")
        ids[symbol] = number + len(SPECIAL)
    if len(ids) + len(SPECIAL) != vocab_size:
        raise DataError(
            f"{path.name} belongs to another model",
            got=f"{len(ids):,} symbols and {len(SPECIAL)} special ones",
            expected=f"{vocab_size:,} in all, as many as the model has embeddings",
            do="give the dict.txt that was published with the checkpoint",
        )
    return ids


def make_tokenizer(ids: Mapping[str, int], bpe: str, *, longest: int) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer with other ids.

    Args:
        ids: Id of each symbol, which is a GPT-2 id as text.
        bpe: A folder or hub name with GPT-2's vocab.json and merges.txt (or encoder.json and vocab.bpe).
        longest: Tokens of the longest text that the model was made for.

    Returns:
        The tokenizer.

    Raises:
        DataError: GPT-2's files cannot be read, or the dictionary is not one of its ids.
    """
    vocabulary, merges = _read_bpe(bpe)
    known = {token: ids[str(number)] for token, number in vocabulary.items() if str(number) in ids}
    lacking = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - known.keys())
    if lacking:
        raise DataError(
            "the dictionary does not name the ids of GPT-2's tokenizer",
            got=f"{len(lacking)} of 256 bytes have no id, {lacking[0]!r} for one",
            expected="a line for each of them",
            do="give the dict.txt that was published with the checkpoint, and GPT-2's own files",
        )
    if len(known) < len(vocabulary):
        logger.warning(
            "%d of GPT-2's %d tokens are not in the dictionary: text that has them is cut into smaller ones, where the "
            "authors' code gives %s",
            len(vocabulary) - len(known),
            len(vocabulary),
            SPECIAL[3],
        )
    whole = {token: number for number, token in enumerate(SPECIAL)}
    whole |= {token: number for token, number in known.items() if token not in whole}
    joined = [pair for pair in merges if all(part in known for part in (*pair, "".join(pair)))]
    backend = Tokenizer(models.BPE(vocab=whole, merges=joined))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=longest, **names)


def _read_bpe(bpe: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        vocabulary = json.loads(_find(bpe, _VOCABULARIES).read_text(encoding="utf-8"))
        lines = _find(bpe, _MERGES).read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        if not isinstance(vocabulary, dict) or any(len(pair) != 2 for pair in merges):
            raise ValueError("these are no files of a byte-pair encoding")
    except Exception as error:  # a hub, and a foreign file, raise whatever they come upon
        raise DataError(
            "GPT-2's tokenizer cannot be read",
            got=f"{bpe!r} ({in_a_line(error)})",
            expected="a folder or hub name with vocab.json and merges.txt, or encoder.json and vocab.bpe",
            do="name one with --bpe, or leave the tokenizer out with --no-tokenizer",
        ) from error
    return vocabulary, [(pair[0], pair[1]) for pair in merges]


def _find(bpe: str, names: tuple[str, str]) -> Path:
    for name in names:
        if (Path(bpe) / name).is_file():
            return Path(bpe) / name
    return Path(str(cached_file(bpe, names[0])))
