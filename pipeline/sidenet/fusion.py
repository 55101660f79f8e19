"""How a memory layer mixes what it reads with its local attention.

Shapes: `B` rows, `H` query heads, `T` tokens, `D` head size, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.backbone.families import Family
from pipeline.positions import PositionEncoding
from pipeline.sidenet.local import LocalAttention, local_log_sum_exp


class MemoryRead(Protocol):
    """What a memory layer reads.

    Attributes:
        values: `[B, H, T, D]`, attention over memory; 0 where nothing is visible.
        log_sum_exp: float32 `[B, H, T]`; `-inf` where nothing is visible.
    """

    @property
    def values(self) -> Tensor: ...  # noqa: D102

    @property
    def log_sum_exp(self) -> Tensor: ...  # noqa: D102


class MemoryReader(Protocol):
    """All that the SideNet knows of memory."""

    def read(self, index: int, query: Tensor) -> MemoryRead:
        """Reads the bank of one memory layer, by its index among them, with unrotated queries `[B, H, T, D]`."""
        ...


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
    ) -> None:
        super().__init__()
        self.index, self.family, self.head_dim = index, family, head_dim
        self.local, self.encoding, self.fusion = local, encoding, fusion
        self.gate = nn.Parameter(torch.full((num_heads,), gate_init))
        self.reader: MemoryReader | None = None
        self.documents: Tensor | None = None
        self.memory_share: Tensor | None = None  # mean weight of memory at the last read
        self._outputs: dict[str, Tensor] = {}
        for name in family.hooked:
            attention.get_submodule(name).register_forward_hook(self._keep(name))
        attention.get_submodule(family.output).register_forward_pre_hook(self._fuse_into_output())

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.reader is not None:
                self._outputs[name] = output

        return hook

    def _fuse_into_output(self) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.reader is None:
                return None
            outputs = [self._outputs.pop(name) for name in self.family.hooked]
            query, key, _ = self.family.split(outputs, self.head_dim)
            local = args[0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
            fused = self.fuse(local, query, key, self.reader)
            return (fused.transpose(1, 2).flatten(2), *args[1:])  # [B, T, H * D]

        return hook

    def fuse(self, local: Tensor, query: Tensor, key: Tensor, reader: MemoryReader) -> Tensor:
        """Mixes local attention and memory, head by head; a query that sees no memory keeps its local attention.

        Args:
            local: Output of local attention `[B, H, T, D]`.
            query: Unrotated queries `[B, H, T, D]`.
            key: Unrotated local keys `[B, Hkv, T, D]`.
            reader: The memory.

        Returns:
            `[B, H, T, D]`, dtype of `local`.
        """
        read = reader.read(self.index, query)
        if self.fusion == "joint":
            weight = torch.sigmoid(self._local_log_sum_exp(query, key) - read.log_sum_exp - self.gate.float()[:, None])
        else:
            sees = read.log_sum_exp != float("-inf")
            weight = torch.where(sees, torch.sigmoid(self.gate.float())[:, None], 1.0)
        self.memory_share = 1.0 - weight.detach().mean(dim=(0, 2))  # [H]
        weight = weight[..., None].to(local.dtype)  # [B, H, T, 1]
        return weight * local + (1 - weight) * read.values

    def _local_log_sum_exp(self, query: Tensor, key: Tensor) -> Tensor:
        place = torch.arange(query.shape[2], device=query.device)
        rotated = self.encoding.rotate(query.float(), place), self.encoding.rotate(key.float(), place)
        return local_log_sum_exp(*rotated, replace(self.local, documents=self.documents))
