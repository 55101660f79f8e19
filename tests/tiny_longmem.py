"""The fast LongMem over a tiny model, driven as training drives it, with the face of `tests.reference`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.memory.bank import MemoryBank
from pipeline.memory.reader import AgeObserver, BankReader
from pipeline.memory.segment import Reading
from pipeline.model.longmem import LongMem, build, sink_token
from pipeline.model.stream import Context, Stream
from tests.reference import ReferenceSideNet, Rules
from tests.tiny_config import tiny_config
from tests.tiny_models import VOCABULARY


class TinyLongMem:
    """A LongMem and its bank.

    Args:
        model: The causal LM.
        lanes: `B`.
        **overrides: Sections of `tiny_config`.
    """

    def __init__(self, model: PreTrainedModel, *, lanes: int = 2, **overrides: Mapping[str, Any]) -> None:
        self.config = tiny_config(**overrides)
        settings = self.config.model
        self.longmem = LongMem(settings, *build(settings, model))
        self.bank: MemoryBank = self.longmem.bank(lanes)

    @property
    def stream(self) -> Stream:
        """One that has not moved, with the bank as it is."""
        return Stream(self.longmem, self.bank)

    def remember(self, tokens: Tensor, *, start: int, documents: Tensor | None = None, num_context: int = 0) -> None:
        """Encodes and appends a segment of every lane; the first tokens may be left context."""
        self.stream.feed(*_split(tokens, documents, num_context), start=start)

    def hidden(
        self,
        tokens: Tensor,
        *,
        start: int = 0,
        documents: Tensor | None = None,
        memory: bool = True,
        observe_ages: AgeObserver | None = None,
        num_context: int = 0,
    ) -> Tensor:
        """Input of the LM head `[B, T, E]`; nothing is remembered. The first tokens may be left context."""
        seen = self.stream.look(*_split(tokens, documents, num_context), start=start)
        return self.stream.hidden(seen, memory="own" if memory else "none", observe_ages=observe_ages)

    def logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits `[B, T, V]`."""
        with torch.no_grad():
            return self.longmem.logits(self.hidden(tokens, **kwargs))

    def loss(self, tokens: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
        """Sum of the cross-entropies."""
        return self.longmem.losses(self.hidden(tokens, **kwargs), targets).sum()

    def set_gates(self, value: float) -> None:
        """Gives every gate the same number."""
        with torch.no_grad():
            for fusion in self.longmem.sidenet.memory.values():
                fusion.gate.fill_(value)  # type: ignore[operator]

    def reference(self, model: PreTrainedModel, boundaries: tuple[int, ...]) -> ReferenceSideNet:
        """The slow one with the same settings, over blocks that the test works out by hand."""
        side, memory = self.config.sidenet, self.config.memory
        assert isinstance(side.memory_layers, tuple)
        return ReferenceSideNet(
            model,
            boundaries,
            memory_layers=side.memory_layers,
            residual=side.residual,
            fusion=side.fusion,
            gate=side.gate_init,
            rules=Rules(
                memory.tokens,
                memory.chunk_size,
                memory.top_k_tokens,
                memory.scope,
                memory.position,
                memory.retrieve_for,
                memory.window_tokens,
            ),
            sink=sink_token(model.config) if memory.sink else None,
        )


def _split(tokens: Tensor, documents: Tensor | None, num_context: int) -> tuple[Tensor, Tensor, Context]:
    """A segment, its documents, and the context before it."""
    documents = torch.zeros_like(tokens) if documents is None else documents
    before = Context(tokens[:, :num_context], documents[:, :num_context])
    return tokens[:, num_context:], documents[:, num_context:], before


def reader_of(model: LongMem, bank: MemoryBank, *, start: int, documents: Tensor, **kwargs: Any) -> BankReader:
    """Lets a segment of every lane read a bank by the model's own settings."""
    return BankReader(bank, model.read_settings, model.geometries, Reading(start, documents), **kwargs)


def tiny_tokens(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Random tokens, int64."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def bank_bytes(bank: MemoryBank) -> bytes:
    """Everything that a bank holds."""
    parts = [bank.positions.tobytes(), bank.documents.numpy().tobytes(), str(bank.next_slot).encode()]
    for store in bank.layers:
        tensors = (store.keys, store.values, store.chunk_keys)  # numpy knows no bfloat16
        parts += [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return b"".join(parts)
