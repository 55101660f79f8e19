"""Reading memory with gradients into the queries: search, then attention, block of queries by block of queries.

Shapes: `B` lanes, `H` query heads, `T` segment tokens, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.memory.attend import attend, attend_backward, token_distance
from pipeline.memory.bank import MemoryBank
from pipeline.memory.search import NOTHING, Retrieved, search
from pipeline.memory.view import Geometry, MemoryView, ReadSettings

AgeObserver = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class MemoryRead:
    """What a memory layer reads.

    Attributes:
        values: Attention over the retrieved tokens, `[B, H, T, D]`, dtype of the query; 0 where nothing is visible.
        log_sum_exp: Of the retrieved tokens' logits, float32 `[B, H, T]`; `-inf` where nothing is visible.
    """

    values: Tensor
    log_sum_exp: Tensor


class BankReader:
    """Reads one bank for the queries of one segment. Never writes.

    Args:
        bank: The bank; must not change between a read and its backward pass.
        settings: How memory is read.
        geometries: The attention of each memory layer.
        start: Lane position of the segment's first token; only what came before is visible.
        documents: Document of each token of the segment, int64 `[B, T]`.
        observe_ages: Called with the memory layer and the distance, in tokens, to the first token of every
            retrieved chunk (int64, flat); for statistics. None: not called.
        timed: Context manager that each read runs in (a timer).
    """

    def __init__(
        self,
        bank: MemoryBank,
        settings: ReadSettings,
        geometries: Sequence[Geometry],
        *,
        start: int,
        documents: Tensor,
        observe_ages: AgeObserver | None = None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.bank, self.settings, self.geometries = bank, settings, geometries
        self.start, self.documents = start, documents
        self.observe_ages, self.timed = observe_ages, timed

    def read(self, layer: int, query: Tensor) -> MemoryRead:
        """Reads one memory layer; gradients flow into the query.

        Args:
            layer: Memory layer, counted from 0.
            query: Unrotated queries `[B, H, T, D]`, any floating dtype.

        Returns:
            Values and log-sum-exp, on the query's device.
        """
        with self.timed():
            view = MemoryView(
                self.bank,
                layer,
                self.settings,
                self.geometries[layer],
                start=self.start,
                documents=self.documents,
            )
            encoding = self.geometries[layer].encoding
            whole = query.to(view.device, torch.float32)
            far = view.rule.far_query(whole, encoding)
            near = None
            if len(view.near_slots):
                near = encoding.rotate(whole, torch.arange(query.shape[2], device=view.device))
            values, log_sum_exp = _Read.apply(far, near, view, self._observer(layer))
            return MemoryRead(values.to(query.device, query.dtype), log_sum_exp.to(query.device))

    def _observer(self, layer: int) -> Callable[[Tensor], None] | None:
        observe = self.observe_ages
        return None if observe is None else lambda ages: observe(layer, ages)


def _blocks(num_tokens: int, size: int) -> Iterator[slice]:
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


class _Read(torch.autograd.Function):
    """Search and attention, blocked over queries; what was retrieved is kept for the backward pass, keys are not."""

    @staticmethod
    def forward(
        ctx: Any, far: Tensor, near: Tensor | None, view: MemoryView, observe: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        num_lanes, _, num_tokens, _ = far.shape
        values, log_sum_exp = torch.empty_like(far), far.new_empty(far.shape[:-1])
        kept: list[Retrieved] = []
        for tokens in _blocks(num_tokens, view.settings.query_block_tokens):
            queries = view.queries(far, near, tokens)
            retrieved = search(view, queries)
            partial = attend(view, queries, retrieved)
            total = partial.total.clamp_min(torch.finfo(torch.float32).tiny)  # 0 only where nothing is visible
            sizes = {"num_lanes": num_lanes, "num_tokens": tokens.stop - tokens.start}
            values[:, :, tokens] = view.ungroup(partial.weighted / total[..., None], **sizes)
            log_sum_exp[:, :, tokens] = view.ungroup(partial.maximum + total.log(), **sizes)
            kept.append(retrieved)
            if observe is not None:
                observe(token_distance(view, queries, retrieved)[..., 0][retrieved.valid])
        ctx.save_for_backward(far, near, values, log_sum_exp)
        ctx.view, ctx.kept = view, kept
        return values, log_sum_exp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        far, near, values, log_sum_exp = ctx.saved_tensors
        view: MemoryView = ctx.view
        grad_values, grad_lse = grads
        visible = log_sum_exp != NOTHING
        # d loss / d logit_j = p_j (grad . value_j + offset): the softmax's own term and the log-sum-exp's gradient.
        offset = torch.where(visible, grad_lse, 0.0) - (grad_values * values).sum(dim=-1)
        finite = torch.where(visible, log_sum_exp, 0.0)
        grad_far = torch.empty_like(far)
        grad_near = None if near is None else torch.empty_like(far)
        blocks = _blocks(far.shape[2], view.settings.query_block_tokens)
        for tokens, retrieved in zip(blocks, ctx.kept, strict=True):
            of_far, of_near = attend_backward(
                view,
                view.queries(far, near, tokens),
                retrieved,
                log_sum_exp=view.group(finite[:, :, tokens]),
                offset=view.group(offset[:, :, tokens]),
                grad=view.group(grad_values[:, :, tokens]),
            )
            sizes = {"num_lanes": far.shape[0], "num_tokens": tokens.stop - tokens.start}
            grad_far[:, :, tokens] = view.ungroup(of_far, **sizes)
            if grad_near is not None:
                assert of_near is not None
                grad_near[:, :, tokens] = view.ungroup(of_near, **sizes)
        return grad_far, grad_near, None, None
