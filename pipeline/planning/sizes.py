"""The formulas of a plan: bytes of a rank, from settings and sizes. `docs/plan.md` explains them.

Shapes: `B` lanes of a memory group, `T` segment tokens, `E` hidden size, `I` inside the MLP, `H` query heads, `Hkv`
key/value heads, `D` head size, `V` vocabulary, `W` ranks of the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from pipeline.config.deepspeed import backbone_deepspeed, sidenet_deepspeed
from pipeline.config.model import ModelSettings
from pipeline.config.schema import Config
from pipeline.config.world import WorldSplit
from pipeline.memory.bank import BankShape
from pipeline.memory.place import ring_chunks
from pipeline.model.longmem import DTYPES, layout_of
from pipeline.planning.part import EVALUATION, Part
from pipeline.planning.read import read_parts
from pipeline.planning.shapes import BackboneShape
from pipeline.planning.traffic import FP32, zero_section
from pipeline.sidenet.layout import Layout

AFTER_BACKBONE = ("sidenet", "loss", "backward")
PERSISTENCE_THRESHOLD, PREFETCH_BUCKET, REDUCE_BUCKET = 100_000, 50_000_000, 500_000_000  # DeepSpeed's own values


class Sizes:
    """The formulas, over one set of numbers.

    Args:
        config: The settings.
        shape: The backbone.
        split: The share of each rank.

    Raises:
        ConfigError: A DeepSpeed file is wrong, or a layer does not exist.
    """

    def __init__(self, config: Config, shape: BackboneShape, split: WorldSplit) -> None:
        self.config, self.shape, self.split = config, shape, split
        self.layout: Layout = layout_of(config.sidenet, len(shape.layers))
        self.backbone_json = backbone_deepspeed(config, split.world_size)
        self.sidenet_json = sidenet_deepspeed(config, split.world_size)
        self.number_bytes = DTYPES[config.train.precision].itemsize
        self.kept_whole = int(
            zero_section(self.backbone_json, "stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        )
        self.tokens = split.lanes_per_group * config.train.segment_tokens
        self.encoded = self.tokens + split.lanes_per_group * config.backbone.context_tokens

    @cached_property
    def sidenet_parameters(self) -> int:
        """Numbers of the SideNet: its layers, norm and gates."""
        gates = len(self.layout.memory_layers) * self.shape.num_heads
        return sum(self.shape.layers[layer - 1] for layer in self.layout.source_layers) + self.shape.norm + gates

    def backbone(self) -> Iterator[Part]:
        """The frozen backbone under ZeRO-3.

        Yields:
            What it holds, and what is whole for a while.
        """
        shape, world, number = self.shape, self.split.world_size, self.number_bytes
        offload = _offload(self.backbone_json, "offload_param")
        yield Part(
            "backbone partition",
            number * sum(-(-numbers // world) for numbers in shape.parameters),
            "parameters / W (ZeRO-3)",
            place=offload or "accelerator",
            remedy=""
            if offload
            else "more ranks, or backbone.deepspeed ds_configs/backbone_zero3_inference_cpu_offload.json",
        )
        small = sum(numbers for numbers in shape.parameters if numbers <= self.kept_whole)
        is_copied = world > 1 or offload is not None
        yield Part(
            "backbone kept whole", number * small * is_copied, f"parameters of up to {self.kept_whole:,} numbers"
        )
        prefetch = int(zero_section(self.backbone_json, "stage3_prefetch_bucket_size", PREFETCH_BUCKET))
        largest, head = max(*shape.decoder, *shape.layers), sum(shape.head)
        yield Part(
            "backbone gathered",
            number * min(largest + prefetch, sum(shape.decoder)) * is_copied,
            "the largest of embedding and layers, and stage3_prefetch_bucket_size",
            ("backbone", EVALUATION),
        )
        yield Part("LM head gathered", number * head * is_copied, "V x E", ("loss", EVALUATION))
        work = self.layer_work(self.encoded)
        yield Part("one layer's work", work, "B T (4 E + 3 I)", ("backbone", "sidenet", "backward"), remedy=_TOKENS)

    def layer_work(self, num_tokens: int) -> int:
        """Bytes that a layer needs for so many tokens, beside what autograd keeps."""
        return self.number_bytes * num_tokens * (4 * self.shape.hidden_size + 3 * self.shape.mlp_size)

    def sidenet(self) -> Iterator[Part]:
        """The SideNet under ZeRO-2.

        Yields:
            Weights, gradients, optimizer.
        """
        numbers, world, number = self.sidenet_parameters, self.split.world_size, self.number_bytes
        part = -(-numbers // world)
        offload = _offload(self.sidenet_json, "offload_optimizer")
        smaller = "a smaller sidenet.num_layers"
        spread = f"more ranks, train.deepspeed ds_configs/sidenet_zero2_cpu_offload.json, or {smaller}"
        yield Part("SideNet", number * numbers, "whole, in train.precision", remedy=smaller)
        yield Part("gradients", FP32 * part, "fp32, / W (ZeRO-2)", ("backward", "optimizer"), remedy=spread)
        bucket = int(zero_section(self.sidenet_json, "reduce_bucket_size", REDUCE_BUCKET))
        buffers = 2 if zero_section(self.sidenet_json, "overlap_comm", False) else 1
        oversized = self.shape.largest_in_layer if self.shape.largest_in_layer > bucket else 0
        yield Part(
            "reduce buckets",
            number * (buffers * bucket + oversized + (world > 1) * max(bucket, oversized)),
            f"{buffers} of reduce_bucket_size, a gradient that is larger"
            + (", and the one on its way" if world > 1 else ""),
            ("backward",),
            remedy="a smaller reduce_bucket_size in train.deepspeed",
        )
        place = offload or "accelerator"
        yield Part(
            "optimizer",
            3 * FP32 * part,
            "fp32 copy of the weights and AdamW's two moments, / W",
            place=place,
            remedy="" if offload else spread,
        )
        yield Part(
            "optimizer's work",
            (FP32 + (number if offload else FP32)) * part,
            "fp32 gradients, flat, and AdamW's intermediate, / W",
            ("optimizer",),
            place=place,
            remedy="" if offload else spread,
        )

    def memory(self) -> Iterator[Part]:
        """The memory bank and its reading.

        Yields:
            The shard, and what a read needs.
        """
        config, layers = self.config, len(self.layout.memory_layers)
        if not config.memory.enabled:
            return
        bank = bank_shape(config.model, self.shape, num_layers=layers, num_lanes=self.split.lanes_per_group)
        place = "host" if config.memory.device == "host" else "accelerator"
        yield Part(
            "memory bank",
            bank.bytes(DTYPES[config.model.memory_dtype]),
            f"{layers} layer(s) x {bank.num_lanes} lane(s) x {bank.num_chunks * bank.chunk_size:,} tokens of the "
            "group's: keys, values, chunk keys",
            place=place,
            remedy=bank_remedies(config),
        )
        yield from read_parts(config.model, self.shape, bank, place=place)

    def activations(self) -> Iterator[Part]:
        """What is kept of a segment until its backward pass.

        Yields:
            Of the backbone and of the SideNet.
        """
        config, layout = self.config, self.layout
        yield Part(
            "backbone's taps",
            self.encoding(self.encoded),
            "taps, keys, values" + (", masks [T, T]" if config.memory.scope == "document" else ""),
            ("backbone", *AFTER_BACKBONE),
            remedy=_TOKENS,
        )
        layers = range(1, layout.num_layers + 1)
        saved = [self._saved_by_layer(layer in layout.memory_layers) for layer in layers]
        norm = self._saved_by_norm()
        if not config.sidenet.activation_checkpointing:
            how = "what autograd keeps of every SideNet layer"
            remedy = f"sidenet.activation_checkpointing true, or {_TOKENS}"
            yield Part("activations", self.tokens * (sum(saved) + norm), how, AFTER_BACKBONE, remedy=remedy)
            return
        inputs = layout.num_layers * self.shape.hidden_size * self.number_bytes
        yield Part(
            "activations", self.tokens * (inputs + norm), "inputs of the SideNet layers", AFTER_BACKBONE, remedy=_TOKENS
        )
        again = self.tokens * max(saved)
        yield Part("activations of one layer", again, "computed again", ("sidenet", "backward"), remedy=_TOKENS)

    def encoding(self, num_tokens: int) -> int:
        """Bytes of what the backbone says of so many tokens."""
        layout, shape = self.layout, self.shape
        taps = len({*layout.taps, len(shape.layers)}) * shape.hidden_size
        each = taps + len(layout.memory_layers) * 2 * shape.num_kv_heads * shape.head_dim
        if self.config.memory.scope == "document":  # one mask for layers with a sliding window, one for the others
            each += min(2, layout.num_layers) * (self.config.train.segment_tokens + self.config.backbone.context_tokens)
        return self.number_bytes * num_tokens * each

    def loss(self) -> Iterator[Part]:
        """The loss.

        Yields:
            Logits, and the gradient that the loss hands back.
        """
        piece = min(self.config.train.loss_piece_tokens, self.tokens)
        yield Part(
            "logits of a piece",
            2 * FP32 * piece * self.shape.vocab_size,
            "loss_piece_tokens x V, fp32, twice",
            ("loss", EVALUATION),
            remedy="a smaller train.loss_piece_tokens",
        )
        gradient = self.number_bytes * self.tokens * self.shape.hidden_size
        yield Part("gradient of the hidden states", gradient, "B T E", ("loss", "backward"), remedy=_TOKENS)

    def _saved_by_norm(self) -> int:
        """Bytes a token that autograd keeps of a norm and of what follows it: its input, and its output."""
        wide = FP32 + self.number_bytes if self.shape.has_rms_norm else self.number_bytes
        return self.shape.hidden_size * (wide + self.number_bytes)

    def _saved_by_layer(self, reads_memory: bool) -> int:
        """Bytes a token that autograd keeps of a SideNet layer."""
        shape, number = self.shape, self.number_bytes
        heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        saved = 2 * self._saved_by_norm() + number * (2 * heads + 2 * kv_heads + shape.mlp_saved * shape.mlp_size)
        cast = number if number < FP32 else 0
        if shape.is_fused and shape.positions == "rotary":
            # Values are a view of the fused output, which stays beside the rotated copies.
            saved += number * (heads + kv_heads)
        if self.config.backbone.attention == "eager" or shape.keeps_attention:
            saved += shape.num_heads * self.config.train.segment_tokens * (FP32 + cast)
        if not reads_memory or not self.config.memory.enabled:
            return saved
        # The query and what was read, in float32 and (where it differs) cast; the fused heads.
        saved += heads * (2 * FP32 + cast + number)
        return saved + (FP32 * (heads + kv_heads) if self.config.sidenet.fusion == "joint" else 0)


_TOKENS = "more ranks with the same data.lanes, or a smaller train.segment_tokens"


def bank_remedies(config: Config) -> str:
    """What makes a bank smaller, or puts it elsewhere."""
    remedies = [f"a larger memory.group_size (now {config.memory.group_size})", "a smaller memory.tokens"]
    if config.model.memory_dtype == "fp32":
        remedies.insert(1, "memory.dtype bf16")
    if config.memory.device != "host":
        remedies.insert(0, "memory.device host")
    return ", ".join(remedies)


def bank_shape(
    settings: ModelSettings, shape: BackboneShape, *, num_layers: int, num_lanes: int, num_tokens: int | None = None
) -> BankShape:
    """The shard that `LongMem.bank` makes for a rank.

    Args:
        settings: The model.
        shape: The backbone.
        num_layers: Memory layers.
        num_lanes: `B`.
        num_tokens: Tokens of a lane that the group remembers; None: `memory.tokens`.

    Returns:
        The shard's sizes.
    """
    memory = settings.memory
    num_chunks = ring_chunks(
        memory.tokens if num_tokens is None else num_tokens,
        segment_tokens=settings.segment_tokens,
        chunk_size=memory.chunk_size,
        group_size=memory.group_size,
    )
    return BankShape(num_layers, num_lanes, shape.num_kv_heads, shape.head_dim, num_chunks, memory.chunk_size)


def _offload(deepspeed: dict[str, Any], section: str) -> str | None:
    """Where a DeepSpeed configuration puts something instead of on the accelerator: `host`, `disk` or None."""
    device = zero_section(deepspeed, section, {}).get("device", "none")
    return {"cpu": "host", "nvme": "disk"}.get(device)
