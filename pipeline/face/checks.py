"""What `generate` and `forward` cannot do, said before anything is worked out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.face.cache import LongMemCache
from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED

_HARMLESS = ("return_dict", "num_items_in_batch", "token_type_ids")
_TRIES_OUT = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def check_ids(ids: Any, vocab_size: int) -> None:
    """Makes sure that something is a batch of token ids.

    Args:
        ids: Should be int `[B, n]`.
        vocab_size: `V`.

    Raises:
        DataError: It is not, is empty, or holds an id outside the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{tuple(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise DataError(
            "these are no token ids", got=got, expected="whole numbers [rows, tokens]", do="use a tokenizer"
        )
    if ids.numel() == 0:
        raise DataError(
            "the prompt is empty",
            got=f"{list(ids.shape)}",
            expected="at least one token a row",
            do="begin with a token",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            "a token id is outside the vocabulary",
            got=low if low < 0 else high,
            expected=f"0 to {vocab_size - 1}",
            do="use the backbone's own tokenizer",
        )


def check_mask(mask: Tensor | None, ids: Tensor, *, num_read: int) -> None:
    """Makes sure that prompts are padded on the left.

    Args:
        mask: As a tokenizer makes it, `[B, n]`, or None.
        ids: `[B, n]`.
        num_read: Tokens of each row that were read before.

    Raises:
        DataError: It belongs to other ids, a row has no token, or one is padded on the right.
    """
    if mask is None:
        return
    check_mask_shape(mask, ids, num_read=num_read)
    there = mask.bool()
    if not bool(there.any(dim=1).all()):
        row = int((~there.any(dim=1)).nonzero()[0])
        raise DataError("a prompt is empty", got=f"row {row} is all padding", do="leave it out, or begin with a token")
    if not bool(there[:, -1].all()):
        row = int((~there[:, -1]).nonzero()[0])
        raise DataError(
            "prompts are padded on the right: what is generated would follow the padding",
            got=f"the last token of row {row} is padding",
            expected="padding on the left",
            do='set tokenizer.padding_side = "left"',
        )


def check_mask_shape(mask: Any, ids: Tensor, *, num_read: int) -> None:
    """Makes sure that a mask is one of these tokens, or of the whole stream.

    Args:
        mask: Should be `[B, n]`, or longer by what was read before.
        ids: `[B, n]`.
        num_read: Tokens of each row that were read before.

    Raises:
        DataError: It is not.
    """
    rows, new = ids.shape
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in ((rows, new), (rows, num_read + new)):
        raise DataError(
            "the attention mask does not fit the tokens",
            got=list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
            expected=[rows, new]
            if not num_read
            else f"{[rows, new]}, or {[rows, num_read + new]} of all that was read",
            do="give the mask that the tokenizer made with them, or none",
        )


def check_labels(labels: Tensor | None, ids: Tensor, vocab_size: int) -> None:
    """Makes sure that labels are token ids of these rows.

    Args:
        labels: Should be int64 `[B, n]`, -100 where nothing is predicted; or None.
        ids: `[B, n]`.
        vocab_size: `V`.

    Raises:
        DataError: They are not.
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.dtype != torch.int64:
        got = f"{list(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(
            "the labels do not fit the tokens",
            got=got,
            expected=f"{list(ids.shape)}, torch.int64",
            do="give the token ids themselves, -100 where nothing is predicted; they are shifted here",
        )
    outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
    if len(outside):
        raise DataError(
            "a label is outside the vocabulary",
            got=int(outside[0]),
            expected=f"0 to {vocab_size - 1}, or {IGNORED}",
            do="use the backbone's own tokenizer",
        )


def check_learning(labels: Tensor | None) -> None:
    """Makes sure that no loss is asked that looks as if it could be learnt from.

    Args:
        labels: What a loss is made of without gradients, where there should be some; or None.

    Raises:
        DataError: There are labels.
    """
    if labels is not None:
        raise DataError(
            "a loss with a memory that was given, or with a cache, has no gradients",
            got="labels beside memory, past_key_values or use_cache, with gradients on",
            do="for the loss alone call the model under torch.no_grad(); to learn, give tokens and labels only: the "
            "text is read from its begin, and remembers itself",
        )


def check_others(asked: dict[str, Any]) -> None:
    """Makes sure that nothing is asked of `forward` that it would leave undone.

    Args:
        asked: Its other arguments.

    Raises:
        DataError: Something is.
    """
    for name, value in asked.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise DataError("a LongMem does not have this", got=name, do="leave it out")


def check_cache(cache: Any, model: LongMem) -> None:
    """Makes sure that a cache is one that a model can read on from.

    Args:
        cache: What was given as `past_key_values`, or None.
        model: The model.

    Raises:
        DataError: It is of another kind, or of another model.
    """
    if cache is None:
        return
    if not isinstance(cache, LongMemCache):
        raise DataError(
            "a LongMem brings its own cache",
            got=type(cache).__name__,
            expected=LongMemCache.__name__,
            do="leave past_key_values out",
        )
    if cache.rows is not None and cache.rows.model is not model:
        raise DataError(
            "the cache is of another model, or this one was put elsewhere or into another dtype since",
            got="past_key_values that it did not return",
            do="leave past_key_values out: the text is read again",
        )


def check_ways(asked: dict[str, Any], config: Any) -> None:
    """Makes sure that a way of decoding needs nothing taken back, and no cache of another kind.

    Args:
        asked: Arguments of `generate`.
        config: The generation configuration.

    Raises:
        DataError: It does.
    """
    for name in _TRIES_OUT:
        if asked.get(name) or getattr(config, name, None):
            raise DataError(
                "decoding that tries tokens out is not supported: what was read cannot be taken back",
                got=name,
                expected="greedy decoding, sampling or beams",
                do=f"leave {name} out",
            )
    kind = asked.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if kind not in (None, "dynamic"):
        raise DataError(
            "a LongMem brings its own cache",
            got=f"cache_implementation {kind!r}",
            do="leave it out: the cache is bounded by a segment and what is remembered",
        )
    if asked.get("inputs_embeds") is not None:
        raise DataError("a LongMem reads tokens", got="inputs_embeds", expected="input_ids", do="give token ids")


def check_length(num_tokens: int, *, window: int, remembered: int) -> None:
    """Makes sure that nothing of a prompt is forgotten before it is answered.

    Args:
        num_tokens: Of the longest row.
        window: Tokens of a segment.
        remembered: Tokens of memory; 0: none is read.

    Raises:
        DataError: It is longer than both.
    """
    if num_tokens <= window + remembered:
        return
    what = "memory and window" if remembered else "the window, and no memory is read"
    do = "give its end alone, or read memory: leave memory=False out, and memory.enabled as it is by default"
    if remembered:
        do = "memorize() the text, which keeps its end, or load the model with more memory: "
        do += 'from_pretrained(..., settings={"memory": {"tokens": ...}})'
    raise DataError(
        f"the prompt is longer than {what}: its begin would be forgotten before it is answered",
        got=f"{num_tokens:,} tokens",
        expected=f"at most {window + remembered:,}",
        do=do,
    )


def own_tokens(mask: Tensor | None, ids: Tensor) -> int:
    """Tokens of the row that has most."""
    return ids.shape[1] if mask is None else int(mask.bool().sum(dim=1).max())
