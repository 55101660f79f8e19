"""The SideNet: a residual side-network whose layers start as copies of backbone layers.

Shapes: `B` rows, `T` tokens, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.encoding import Encoding, LayerCall
from pipeline.backbone.families import sliding_window
from pipeline.positions import PositionRule
from pipeline.sidenet.copies import Habits, trainable_copy
from pipeline.sidenet.fusion import MemoryFusion, MemoryReader
from pipeline.sidenet.layout import Layout
from pipeline.sidenet.local import LocalAttention
from pipeline.sidenet.past import SideNetPast


class SideNet(nn.Module):
    """The trained part of LongMem. It has no dropout: its layers are always run in evaluation mode.

    Collective: with a partitioned backbone every rank must build it together.

    Args:
        backbone: The backbone that it is copied from; not kept.
        layout: Where its layers stand.
        fusion: `gate` or `joint`.
        gate_init: First value of gates or biases.
        sink_rule: The distance that sinks are read at.
        habits: What its layers do otherwise than those that they are copies of.
        activation_checkpointing: Whether each layer is computed again in the backward pass instead of kept.

    Source:
        Wang et al. 2023, section 2.2, eq. 1; all residual forms in `docs/architecture.md`.
    """

    def __init__(
        self,
        backbone: Backbone,
        layout: Layout,
        *,
        fusion: str,
        gate_init: float = 0.0,
        sink_rule: PositionRule = PositionRule("none"),  # noqa: B008  # frozen
        habits: Habits = Habits(),  # noqa: B008  # frozen
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            trainable_copy(backbone.layers[source - 1], backbone, habits) for source in layout.source_layers
        )
        self._windows = [sliding_window(layer.get_submodule(backbone.family.attention)) for layer in self.layers]
        self.norm = trainable_copy(backbone.norm, backbone, replace(habits, activation=None))
        self.memory = nn.ModuleDict()
        for index, layer in enumerate(layout.memory_layers):
            source = layout.boundaries[layer]
            attention = self.layers[layer - 1].get_submodule(backbone.family.attention)
            encoding = backbone.positions(source)
            self.memory[str(layer)] = MemoryFusion(
                attention,
                index,
                family=backbone.family,
                head_dim=backbone.head_dim,
                num_heads=backbone.num_heads,
                local=LocalAttention(backbone.scale(source), encoding.slopes, sliding_window(attention)),
                encoding=encoding,
                fusion=fusion,
                gate_init=gate_init,
                sink_rule=sink_rule,
            )
        self.train(False)

    @property
    def fusions(self) -> dict[int, MemoryFusion]:
        """The memory layers, by their number among the SideNet's layers, counted from 1."""
        return {int(name): cast(MemoryFusion, fusion) for name, fusion in self.memory.items()}

    def train(self, mode: bool = True) -> SideNet:
        """Stays in evaluation mode (no dropout), whatever is asked: a wrapper's `train()` must not change it."""
        return super().train(False)

    def forward(
        self, encoding: Encoding, reader: MemoryReader | None = None, past: SideNetPast | None = None
    ) -> Tensor:
        """Runs the SideNet over one encoded segment of each row, or over the next tokens of one.

        Args:
            encoding: What the backbone said of the segment, or of those tokens.
            reader: The memory, or None: no memory.
            past: What was kept of the segment's tokens before; these are added to it. None: the segment begins here,
                and nothing is kept.

        Returns:
            `Norm(S_L)`, `[B, T, E]`: the input of the LM head.
        """
        layout = self.layout
        if past is not None:
            encoding = self._continued(encoding, past)
        state = encoding.taps[layout.boundaries[0]]
        for layer in range(1, layout.num_layers + 1):
            pair = layout.difference(layer)
            carried = None if pair is None else encoding.taps[pair[0]] - encoding.taps[pair[1]]
            if carried is not None and layout.residual == "interleaved":
                state = state + carried
            state = self._layer(layer, state, encoding, reader, past)
            if carried is not None and layout.residual != "interleaved":
                state = state + carried
        normed: Tensor = self.norm(state)
        return normed

    def _continued(self, encoding: Encoding, past: SideNetPast) -> Encoding:
        """The calls of layers that go on from what the SideNet keeps, not from what the backbone keeps."""
        tap = encoding.taps[self.layout.boundaries[0]]
        num_keys = past.num_tokens + tap.shape[1]
        masks: dict[int | None, Tensor | None] = {}
        calls = {}
        for window, source in zip(self._windows, self.layout.source_layers, strict=True):
            if window not in masks:
                masks[window] = past.mask(tap.shape[1], num_keys=num_keys, window=window, like=tap)
            call = encoding.calls[source].with_cache(past.cache, num_keys=num_keys)
            calls[source] = call.with_mask(masks[window])
        return encoding._replace(calls=calls, documents=past.documents)

    def _layer(
        self,
        layer: int,
        state: Tensor,
        encoding: Encoding,
        reader: MemoryReader | None,
        past: SideNetPast | None,
    ) -> Tensor:
        call = encoding.calls[self.layout.boundaries[layer]]

        def run(hidden: Tensor) -> Tensor:
            with self._reading(layer, reader, encoding, past):
                return _call(self.layers[layer - 1], hidden, call)

        if self.activation_checkpointing and torch.is_grad_enabled():
            # No random numbers are drawn, so none need to be kept.
            result: Tensor = checkpoint(run, state, use_reentrant=False, preserve_rng_state=False)
            return result
        return run(state)

    @contextmanager
    def _reading(
        self, layer: int, reader: MemoryReader | None, encoding: Encoding, past: SideNetPast | None
    ) -> Iterator[None]:
        """Lends the reader to a memory layer for one call; also when the call is repeated in the backward pass."""
        fusion = self.fusions.get(layer)
        if fusion is None:
            yield
            return
        fusion.reader, fusion.documents, fusion.past = reader, encoding.documents, past
        fusion.sink = encoding.sinks[fusion.index] if encoding.sinks else None
        try:
            yield
        finally:
            fusion.reader = fusion.documents = fusion.sink = fusion.past = None


def _call(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    output = layer(hidden, *call.args, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
