"""How a memory layer mixes what it reads with its local attention.

Shapes: `B` rows, `H` query heads, `T` tokens, `D` head size, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.backbone.encoding import KeyValue
from pipeline.backbone.families import Family
from pipeline.positions import PositionEncoding, PositionRule
from pipeline.sidenet.local import LocalAttention, local_log_sum_exp
from pipeline.sidenet.past import SideNetPast


class MemoryRead(Protocol):
    """What a memory layer reads.

    Attributes:
        values: float32 `[B, H, T, D]`, attention over what was retrieved; 0 where nothing is visible.
        log_sum_exp: float32 `[B, H, T]`; `-inf` where nothing is visible.
        window: The same for the recent window, which is read as part of the local attention; None: there is none.
    """

    @property
    def values(self) -> Tensor: ...  # noqa: D102

    @property
    def log_sum_exp(self) -> Tensor: ...  # noqa: D102

    @property
    def window(self) -> MemoryRead | None: ...  # noqa: D102


class MemoryReader(Protocol):
    """All that the SideNet knows of memory."""

    def read(self, index: int, query: Tensor) -> MemoryRead:
        """Reads the bank of one memory layer, by its index among them, with unrotated queries `[B, H, T, D]`."""
        ...


ReadObserver = Callable[[int, MemoryReader, Tensor, Tensor], None]
"""Is told of a read: the memory layer's index, reader, queries `[B, H, T, D]`, and weight of memory `[B, H, T]`."""


class MemoryFusion(nn.Module):
    """Reads memory and fuses it into the input of an attention module's output projection.

    That input, the concatenated heads, is the one thing that attention has in common in every family.

    Args:
        attention: The attention module; hooks are put on its projections.
        index: Its index among the memory layers.
        family: The model's family.
        head_dim: `D`.
        num_heads: `H`.
        local: The layer's local attention.
        encoding: The layer's position encoding.
        fusion: `gate` or `joint`.
        gate_init: First value of the gate logit (`gate`) or bias (`joint`) of every head.
        sink_rule: The distance that a sink is read at.

    Source:
        Wang et al. 2023, section 2.3, eq. 5 for `gate` (here sigmoid(g) is the weight of the local part).
    """

    def __init__(
        self,
        attention: nn.Module,
        index: int,
        *,
        family: Family,
        head_dim: int,
        num_heads: int,
        local: LocalAttention,
        encoding: PositionEncoding,
        fusion: str,
        gate_init: float,
        sink_rule: PositionRule,
    ) -> None:
        super().__init__()
        self.index, self.family, self.head_dim, self.num_heads = index, family, head_dim, num_heads
        self.local, self.encoding, self.fusion, self.sink_rule = local, encoding, fusion, sink_rule
        self.gate = nn.Parameter(torch.full((num_heads,), gate_init))
        self.reader: MemoryReader | None = None
        self.documents: Tensor | None = None
        self.past: SideNetPast | None = None
        self.sink: KeyValue | None = None
        self.memory_share: Tensor | None = None  # mean weight of memory at the last read
        self.observe: ReadObserver | None = None
        self._outputs: dict[str, Tensor] = {}
        for name in family.hooked:  # methods, not closures: with the module they are copied
            attention.get_submodule(name).register_forward_hook(partial(self._keep, name))
        attention.get_submodule(family.output).register_forward_pre_hook(self._fuse_into_output)

    @property
    def _is_open(self) -> bool:
        """Whether there is anything to read besides the segment."""
        return self.reader is not None or self.sink is not None

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._is_open:
            self._outputs[name] = output

    def _fuse_into_output(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._is_open:
            return None
        outputs = [self._outputs.pop(name) for name in self.family.hooked]
        query, key, _ = self.family.split(outputs, num_heads=self.num_heads, head_dim=self.head_dim)
        local = args[0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        fused = self.fuse(local, query, key, self.reader)
        return (fused.transpose(1, 2).flatten(2), *args[1:])  # [B, T, H * D]

    def fuse(self, local: Tensor, query: Tensor, key: Tensor, reader: MemoryReader | None) -> Tensor:
        """Mixes local attention and memory, head by head; a query that sees no memory keeps its local attention.

        Sink and window belong to the local attention: they join its softmax. Everything is mixed in float32.

        Args:
            local: Output of local attention `[B, H, T, D]`.
            query: Unrotated queries `[B, H, T, D]`.
            key: Unrotated local keys `[B, Hkv, T, D]`.
            reader: The memory; None: there is only the sink.

        Returns:
            `[B, H, T, D]`, dtype of `local`.
        """
        read = None if reader is None else reader.read(self.index, query)
        more = [] if self.sink is None else [self._attend_sink(query, self.sink)]
        if read is not None and read.window is not None:
            more.append((read.window.values, read.window.log_sum_exp))
        near, log_sum_exp = local.float(), None
        if more or (read is not None and self.fusion == "joint"):
            log_sum_exp = self._local_log_sum_exp(query, key)
        if more:
            assert log_sum_exp is not None
            near, log_sum_exp = _joined([(near, log_sum_exp), *more])
        if read is None:
            return near.to(local.dtype)
        if self.fusion == "joint":
            assert log_sum_exp is not None
            weight = torch.sigmoid(log_sum_exp - read.log_sum_exp - self.gate.float()[:, None])
        else:
            sees = read.log_sum_exp != float("-inf")
            weight = torch.where(sees, torch.sigmoid(self.gate.float())[:, None], 1.0)
        self.memory_share = 1.0 - weight.detach().mean(dim=(0, 2))  # [H]
        if self.observe is not None and reader is not None:
            self.observe(self.index, reader, query, 1.0 - weight.detach())
        weight = weight[..., None]  # [B, H, T, 1]
        return (weight * near + (1 - weight) * read.values).to(local.dtype)

    def _attend_sink(self, query: Tensor, sink: KeyValue) -> tuple[Tensor, Tensor]:
        """Values `[B, H, T, D]` and logits `[B, H, T]` of the one token that a sink is, float32."""
        far = self.sink_rule.far_query(query.float(), self.encoding)
        by_head = far.unflatten(1, (sink.key.shape[1], -1))  # [B, Hkv, H / Hkv, T, D]
        logits = torch.einsum("bhgtd,hd->bhgt", by_head, sink.key[0, :, 0].float()).flatten(1, 2) * self.local.scale
        if self.encoding.slopes is not None:
            logits = logits - self.encoding.slopes.to(query.device)[:, None] * self.sink_rule.distance
        values = sink.value[:, :, None].expand_as(by_head).flatten(1, 2)  # [B, H, T, D]
        return values.float(), logits

    def _local_log_sum_exp(self, query: Tensor, key: Tensor) -> Tensor:
        if self.past is None:
            place: Tensor | int = torch.arange(query.shape[2], device=query.device)
        else:
            place = self.past.places(self.index, query.shape[2], device=query.device)
        rotated, keys = self.encoding.rotate(query.float(), place), self.encoding.rotate(key.float(), place)
        if self.past is not None:
            keys = self.past.extended(self.index, keys)
        return local_log_sum_exp(rotated, keys, replace(self.local, documents=self.documents))


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all parts, from values `[B, H, T, D]` and log-sum-exp `[B, H, T]` of each."""
    log_sum_exp = torch.stack([part for _, part in parts]).logsumexp(dim=0)
    values = [torch.exp(part - log_sum_exp)[..., None] * value for value, part in parts]
    return torch.stack(values).sum(dim=0), log_sum_exp
