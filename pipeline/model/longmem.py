"""LongMem: frozen backbone, trained SideNet and memory bank as one thing.

Shapes: `B` lanes, `T` segment tokens, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.encoding import Encoding, KeyValue
from pipeline.config.model import ModelSettings, SideNetConfig
from pipeline.distributed.launchers import local_size
from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.layer import Geometry
from pipeline.memory.place import ring_chunks
from pipeline.memory.room import check_room
from pipeline.memory.segment import ReadSettings
from pipeline.model.loss import Head, token_losses
from pipeline.positions import PositionRule
from pipeline.sidenet.copies import Habits
from pipeline.sidenet.fusion import MemoryReader
from pipeline.sidenet.layout import Layout
from pipeline.sidenet.past import SideNetPast
from pipeline.sidenet.sidenet import SideNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def layout_of(side: SideNetConfig, num_backbone_layers: int) -> Layout:
    """The SideNet's layout that its settings ask for.

    Args:
        side: The SideNet's settings.
        num_backbone_layers: Layers of the backbone.

    Returns:
        The layout.

    Raises:
        ConfigError: A layer index is out of range.
    """
    return Layout.build(
        num_backbone_layers,
        layout=side.layout,
        num_layers=side.num_layers,
        memory_layers=side.memory_layers,
        residual=side.residual,
    )


def sink_token(config: Any) -> int:
    """The token that is encoded alone to be a sink: the first special one that the backbone's configuration names."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, (list, tuple)) and token else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return token
    return 0


class LongMem:
    """Backbone and SideNet with the settings that join them to memory. Holds no memory: banks are made and passed.

    Args:
        settings: What it is.
        backbone: The frozen backbone, with the taps, calls and memory layers of `layout`.
        sidenet: The SideNet.
        encode: Runs the backbone; the backbone itself, or the engine that partitions it.
        run_sidenet: Runs the SideNet; itself, or the engine that trains it.
    """

    def __init__(
        self,
        settings: ModelSettings,
        backbone: Backbone,
        sidenet: SideNet,
        *,
        encode: Callable[..., Any] | None = None,
        run_sidenet: Callable[..., Any] | None = None,
    ) -> None:
        self.settings, self.backbone, self.sidenet = settings, backbone, sidenet
        self._encode = encode or backbone
        self._run_sidenet = run_sidenet or sidenet
        self._sink_of_layer: Sequence[KeyValue] | None = None
        memory = settings.memory
        self.read_settings = ReadSettings(
            num_tokens=memory.tokens,
            top_k_chunks=memory.top_k_chunks,
            scope=memory.scope,
            rule=PositionRule.parse(memory.position),
            search=memory.search,
            retrieve_for=memory.retrieve_for,
            window_tokens=memory.window_tokens,
            query_block_tokens=memory.query_block_tokens,
        )
        sources = sidenet.layout.memory_sources
        self.geometries = [Geometry(backbone.positions(source), backbone.scale(source)) for source in sources]

    def encoding_by(self, encode: Callable[..., Any]) -> LongMem:
        """The same model, whose backbone something else runs."""
        return LongMem(self.settings, self.backbone, self.sidenet, encode=encode, run_sidenet=self._run_sidenet)

    @property
    def runs_backbone(self) -> Callable[..., Any]:
        """What runs the backbone: itself, or the engine that partitions it."""
        return self._encode

    @property
    def device(self) -> torch.device:
        """Where tokens go and hidden states come from."""
        return next(self.sidenet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return next(self.sidenet.parameters()).dtype

    def bank(self, num_lanes: int, *, num_tokens: int | None = None, group_size: int = 1) -> MemoryBank:
        """Makes an empty bank, one rank's shard of it.

        Args:
            num_lanes: `B`.
            num_tokens: Tokens of a lane that the group remembers; None: `memory.tokens`.
            group_size: `G`, ranks of the memory group.

        Returns:
            A bank with room for this rank's share of them, in whole segments, and for one segment more.

        Raises:
            ConfigError: It cannot be held where it belongs.
        """
        memory, dtype = self.settings.memory, DTYPES[self.settings.memory_dtype]
        num_chunks = ring_chunks(
            memory.tokens if num_tokens is None else num_tokens,
            segment_tokens=self.settings.segment_tokens,
            chunk_size=memory.chunk_size,
            group_size=group_size,
        )
        shape = BankShape(
            num_layers=len(self.geometries),
            num_lanes=num_lanes,
            num_kv_heads=self.backbone.num_kv_heads,
            head_dim=self.backbone.head_dim,
            num_chunks=num_chunks,
            chunk_size=memory.chunk_size,
        )
        device = torch.device("cpu") if memory.device == "host" else self.device
        needed = shape.bytes(dtype) + shape.marks_bytes()
        check_room(needed, device, num_ranks=local_size(os.environ))
        return MemoryBank(shape, dtype=dtype, device=device, chunk_keys=memory.chunk_keys)

    def encode(
        self,
        tokens: Tensor,
        documents: Tensor | None,
        *,
        num_context: int = 0,
        cache: Cache | None = None,
        columns: Tensor | None = None,
    ) -> Encoding:
        """Encodes one segment of each lane with the frozen backbone.

        Collective: with a partitioned backbone every rank must call it together.

        Args:
            tokens: Left context and segment, int64 `[B, num_context + T]`.
            documents: Document of each token, of the same shape; under scope `document` attention stays inside. None:
                each row is one document.
            num_context: Tokens of left context.
            cache: As in `Backbone.forward`: an ordinary window of any length, or a segment, read in pieces.
            columns: Of a cache whose rows are not equally long, and of these tokens: int64 `[B, W]`, 0 where a row has
                a token and -1 where it has none.

        Returns:
            The encoding.
        """
        inside = documents if self.settings.memory.scope == "document" and documents is not None else columns
        encoding: Encoding = self._encode(tokens, inside, num_context, cache)
        return encoding._replace(sinks=self._sinks(tokens.device)) if self.settings.memory.sink else encoding

    def _sinks(self, device: torch.device) -> Sequence[KeyValue]:
        """Keys and values of one token encoded alone; the backbone is frozen, so they are worked out once."""
        if self._sink_of_layer is None:
            with torch.inference_mode(False):  # what is kept must serve learning, too
                token = torch.tensor([[sink_token(self.backbone.model.config)]], device=device)
                alone: Encoding = self._encode(token, None)
            self._sink_of_layer = alone.memory
        return self._sink_of_layer

    def append(self, bank: MemoryBank, encoding: Encoding, *, start: int, documents: Tensor) -> None:
        """Writes an encoded segment of every lane to memory: the only thing that changes what is remembered.

        Args:
            bank: The bank.
            encoding: The segment.
            start: Lane position of its first token.
            documents: int64 `[B, T]`.
        """
        bank.append([(kv.key, kv.value) for kv in encoding.memory], start=start, documents=documents)

    def hidden(self, encoding: Encoding, reader: MemoryReader | None, past: SideNetPast | None = None) -> Tensor:
        """Runs the SideNet.

        Args:
            encoding: The segment, or the next tokens of one that is read in pieces.
            reader: The memory, or None.
            past: What the SideNet keeps of such a segment; these tokens are added to it.

        Returns:
            Input of the LM head `[B, T, E]`.
        """
        hidden: Tensor = self._run_sidenet(encoding, reader, past)
        return hidden

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every token by the backbone's LM head.

        Collective: with a partitioned backbone every rank must call it together.

        Args:
            hidden: `[B, T, E]`.
            targets: int64 `[B, T]`; -100 where nothing is predicted.

        Returns:
            Nats, float32 `[B, T]`.
        """
        with self.backbone.head_parameters() as (weight, bias):
            head = Head(weight, bias, self._softcap)
            pieces = self.settings.loss_piece_tokens
            return token_losses(hidden.flatten(0, 1), targets.flatten(), head, piece_tokens=pieces).view_as(targets)

    @torch.no_grad()
    def backbone_hidden(self, encoding: Encoding) -> Tensor:
        """What the backbone alone gives the LM head: it sees what was encoded and nothing else.

        Collective: as `losses`. The backbone must keep its last tap.

        Args:
            encoding: The segment.

        Returns:
            `[B, T, E]`.
        """
        with self.backbone.made_whole(list(self.backbone.norm.parameters())):
            # Past the hooks: to DeepSpeed's trace, which all ranks must share, this is no part of a forward pass.
            hidden: Tensor = self.backbone.norm.forward(encoding.taps[len(self.backbone.layers)])
        return hidden

    @torch.no_grad()
    def backbone_losses(self, encoding: Encoding, targets: Tensor) -> Tensor:
        """Cross-entropy of every token by the backbone alone, nats, float32 `[B, T]`; arguments as in `losses`."""
        return self.losses(self.backbone_hidden(encoding), targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits by the backbone's LM head.

        Collective: as `losses`.

        Args:
            hidden: `[B, T, E]`.

        Returns:
            float32 `[B, T, V]`.
        """
        with self.backbone.head_parameters() as (weight, bias):
            return Head(weight, bias, self._softcap).logits(hidden)

    @torch.no_grad()
    def likeliest(self, hidden: Tensor) -> Tensor:
        """The likeliest token at each place, int64 `[N]` for `[N, E]`, a piece at a time; collective as `losses`."""
        with self.backbone.head_parameters() as (weight, bias):
            head = Head(weight, bias, self._softcap)
            return torch.cat([head.logits(piece).argmax(-1) for piece in hidden.split(self.settings.loss_piece_tokens)])

    @property
    def _softcap(self) -> float | None:
        return getattr(self.backbone.model.config, "final_logit_softcapping", None)


def build(settings: ModelSettings, model: PreTrainedModel, **kwargs: Any) -> tuple[Backbone, SideNet]:
    """Builds the backbone wrapper and the SideNet over a loaded causal LM.

    Collective: with a partitioned model every rank must call it together.

    Args:
        settings: What the model is.
        model: The causal LM.
        **kwargs: `made_whole`, as in `Backbone`.

    Returns:
        Backbone (with the last tap, too) and SideNet.

    Raises:
        ConfigError: A layer index is out of range.
        BackboneError: The family is unknown or the variant is not supported.
    """
    num_layers = int(model.config.num_hidden_layers)
    layout = layout_of(settings.sidenet, num_layers)
    backbone = Backbone(
        model,
        taps=(*layout.taps, num_layers),
        calls=layout.source_layers,
        memory_layers=layout.memory_sources,
        **kwargs,
    )
    sidenet = SideNet(
        backbone,
        layout,
        fusion=settings.sidenet.fusion,
        gate_init=settings.sidenet.gate_init,
        sink_rule=PositionRule.parse(settings.memory.position).beyond(settings.memory.tokens),
        habits=Habits(settings.sidenet.norm_epsilon, settings.sidenet.activation),
        activation_checkpointing=settings.sidenet.activation_checkpointing,
    )
    return backbone, sidenet
