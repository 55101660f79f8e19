"""Reading a text into memory without saying anything of it: the SideNet is not run.

Shapes: `B` segments at once, `T` segment tokens, `N` tokens of left context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.backbone.encoding import KeyValue
from pipeline.memory.bank import MemoryBank
from pipeline.model.longmem import LongMem

TOKENS_AT_ONCE = 4096  # of segments and their left contexts in one forward pass


@torch.no_grad()
def remember(
    model: LongMem,
    bank: MemoryBank,
    tokens: Tensor,
    *,
    start: int,
    before: Tensor,
    document: int = 0,
    on_read: Callable[[int], None] = lambda num_tokens: None,
) -> None:
    """Reads tokens into a bank, cut into segments as training cuts a text; several segments are encoded at once.

    Args:
        model: Backbone and SideNet.
        bank: Of one lane.
        tokens: int64 `[any]`, in whole chunks; the last segment may be short.
        start: Lane position of the first one, where a segment begins.
        before: The tokens right before it, int64 `[any]`: left context is taken from them, as much as there is.
        document: The document that they belong to.
        on_read: Is told after each forward pass how many tokens were read.
    """
    num_before, whole = len(before), torch.cat([before, tokens])
    for first, last, memory in _encoded(model, whole, num_before):
        documents = torch.full((1, last - first), document, device=tokens.device)
        # A ring takes no more at once than it holds.
        for piece in range(0, last - first, _most_at_once(model, bank)):
            part = slice(piece, min(piece + _most_at_once(model, bank), last - first))
            bank.append(
                [(kv.key[:, :, part], kv.value[:, :, part]) for kv in memory],
                start=start + first + part.start - num_before,
                documents=documents[:, part],
            )
        on_read(last - first)


def _most_at_once(model: LongMem, bank: MemoryBank) -> int:
    """Tokens that a bank takes at once, in whole segments."""
    segment = model.settings.segment_tokens
    return max(segment, bank.shape.num_chunks * bank.shape.chunk_size // segment * segment)


def _encoded(model: LongMem, tokens: Tensor, first: int) -> Iterator[tuple[int, int, Sequence[KeyValue]]]:
    """Memory keys and values `[1, Hkv, n, D]` of the tokens from `first` on, and where those are, piece after piece."""
    segment, most = model.settings.segment_tokens, model.settings.context_tokens
    while first < len(tokens):
        context = min(most, first)
        length = min(segment, len(tokens) - first)
        count = 1
        if length == segment and context == most:
            count = min((len(tokens) - first) // segment, max(1, TOKENS_AT_ONCE // (most + segment)))
        starts = [first + number * segment for number in range(count)]
        batch = torch.stack([tokens[at - context : at + length] for at in starts])  # [B, N + T]
        memory = model.encode(batch, None, num_context=context).memory
        last = starts[-1] + length
        yield first, last, [KeyValue(_in_a_row(kv.key), _in_a_row(kv.value)) for kv in memory]
        first = last


def _in_a_row(x: Tensor) -> Tensor:
    """Segments `[B, Hkv, T, D]` one after another, `[1, Hkv, B * T, D]`."""
    return x.transpose(0, 1).flatten(1, 2)[None]
