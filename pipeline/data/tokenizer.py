"""Tokenizers: loading one with errors in words, and the identity that ties a token store to its tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.data.text import home, readable
from pipeline.errors import DataError
from pipeline.files import is_a_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_GIVE = "give a folder with tokenizer.json, usually the backbone's own, or a hub name"

# What of a tokenizer decides which ids a text becomes. Left out: padding and truncation (state of the last call), the
# post-processor (adds special tokens only, which a store never asks for) and the decoder (ids back to text).
_DECIDING_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True)
class TokenizerInfo:
    """What a token store remembers of its tokenizer.

    Attributes:
        identity: SHA-256 (hex) of everything that decides which ids a text becomes.
        name: Folder or hub name that it was loaded from; for messages only.
        vocab_size: Number of ids, added tokens included.
    """

    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    name: str
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: equal for two tokenizers if they turn every text into the same ids by the same rules.

    Args:
        tokenizer: A fast or a slow tokenizer; padding and truncation settings do not matter.

    Returns:
        SHA-256 of the canonical serialization, 64 hex digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        canonical = {part: whole.get(part) for part in _DECIDING_PARTS}
    else:
        added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        canonical = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "added_tokens": added}
    serialized = json.dumps(canonical, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(serialized.encode("ascii")).hexdigest()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerInfo:
    """The record of a tokenizer that goes into a store."""
    return TokenizerInfo(
        identity=tokenizer_identity(tokenizer), name=str(tokenizer.name_or_path), vocab_size=len(tokenizer)
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder, the local hub cache or the hub, in this order.

    Args:
        name: A folder with a saved tokenizer, or a hub name such as ``org/model``.

    Returns:
        The tokenizer, fast where there is a fast one.

    Raises:
        DataError: No such folder, a folder without a tokenizer, or a hub name that cannot be found or reached.
    """
    from transformers import AutoTokenizer

    name = str(name)
    folder = home(name)
    if not name.strip():
        raise DataError("the name of the tokenizer is empty", got=repr(name), do=_GIVE)
    if folder.is_dir():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers raises whatever the missing or broken file led to
            raise DataError(
                "the tokenizer folder holds no tokenizer that can be loaded",
                got=f"{folder} ({_first_line(error)})",
                expected="tokenizer.json and tokenizer_config.json, as written by save_pretrained",
                do="give the backbone's own folder",
            ) from error
    if folder.exists():
        raise DataError("the tokenizer is a file", got=readable(name), expected="its folder", do=_GIVE)
    if is_a_path(name):
        raise DataError("the tokenizer folder does not exist", got=readable(name), do=_GIVE)
    return _load_from_hub(name)


def _load_from_hub(name: str) -> PreTrainedTokenizerBase:
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # not in the cache; the reason does not matter, the hub is asked next
        logger.info("tokenizer %s is not on this machine; asking the hub", name)
    try:
        HfApi().model_info(name, timeout=10.0)  # one request: from_pretrained would retry for most of a minute
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # httpx, hub and transformers errors share no base class
        raise DataError(
            "the tokenizer was found neither as a folder, nor in the hub cache, nor on the hub",
            got=f"{name} ({_first_line(error)})",
            do="check the name; without network give a folder with tokenizer.json, usually the backbone's own",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
