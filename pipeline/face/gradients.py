"""What learning needs of a forward pass: hidden states with gradients, losses, logits.

Shapes: `B` rows, `n` tokens of a row, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED
from pipeline.model.stream import Context, Stream


def hidden_with_gradients(model: LongMem, tokens: Tensor, there: Tensor | None, *, reads_memory: bool) -> Tensor:
    """Reads texts from their begin, segment by segment, as training does; gradients flow into the SideNet.

    Args:
        model: Backbone and SideNet.
        tokens: int64 `[B, n]`.
        there: Which of them there are, bool `[B, n]`; None: all.
        reads_memory: Whether memory is read.

    Returns:
        Input of the LM head `[B, n, E]`; 0 where no token is.
    """
    if there is None or bool(there.all()):
        return _read(model, tokens, reads_memory)
    lengths = there.sum(dim=1)
    hidden = torch.zeros(*tokens.shape, model.backbone.hidden_size, dtype=model.dtype, device=tokens.device)
    for length in lengths.unique().tolist():
        rows = (lengths == length) & (lengths > 0)
        if bool(rows.any()):
            found = _read(model, tokens[rows][there[rows]].view(-1, length), reads_memory)
            hidden = hidden.masked_scatter((there & rows[:, None])[..., None], found)
    return hidden


def _read(model: LongMem, tokens: Tensor, reads_memory: bool) -> Tensor:
    segment, most = model.settings.segment_tokens, model.settings.context_tokens
    bank = (
        model.bank(len(tokens), num_tokens=min(model.settings.memory.tokens, tokens.shape[1])) if reads_memory else None
    )
    stream = Stream(model, bank, settings=replace(model.read_settings, scope="lane"))
    found = []
    for start in range(0, tokens.shape[1], segment):
        piece, before = tokens[:, start : start + segment], tokens[:, max(0, start - most) : start]
        documents = torch.zeros_like(piece)
        seen = stream.look(piece, documents, Context(before, torch.zeros_like(before)), start=start)
        found.append(stream.hidden(seen, memory="own" if reads_memory else "none"))
        if piece.shape[1] == segment:
            stream.remember(seen)
    return torch.cat(found, dim=1)


def loss_of(
    model: LongMem, hidden: Tensor, labels: Tensor, there: Tensor | None, *, num_items_in_batch: Any = None
) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        model: Backbone and SideNet.
        hidden: `[B, n, E]`.
        labels: int64 `[B, n]`, of the tokens themselves; -100 where nothing is predicted.
        there: Which tokens there are, bool `[B, n]`; None: all. Nothing is predicted from the others.
        num_items_in_batch: What the sum is divided by; None: the tokens that are predicted.

    Returns:
        Nats, float32 `[]`.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(hidden.device)
    if there is not None:
        targets = targets.masked_fill(~there.to(hidden.device), IGNORED)
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return model.losses(hidden, targets).sum() / count
