"""What a rank sends to others in one optimizer step, by formula.

Counted are the bytes that leave a rank: an all-gather sends the rank's own part to each other rank (or as much around a
ring), an all-to-all each part to its rank, an all-reduce of `n` bytes `2 n (W - 1) / W` (a ring). The counters of
`pipeline.memory.exchange.RankGroup` count alike.

Shapes: `G` ranks of a memory group, `B` lanes of it, `H` query heads, `T` segment tokens, `D` head size, `k` chunks of
a query, `W` ranks of the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.world import WorldSplit
from pipeline.planning.shapes import BackboneShape

FP32, INT32, INT64 = 4, 4, 8  # bytes


@dataclass(frozen=True)
class Traffic:
    """One purpose of traffic.

    Attributes:
        purpose: What for; that of the memory group as `RankGroup.traffic` names it.
        collective: `all-gather`, `all-to-all` or `all-reduce`.
        ranks: Over how many ranks.
        num_bytes: Sent by one rank in one optimizer step.
        at_most: Whether it may be less: it depends on which rank holds what is read.
    """

    purpose: str
    collective: str
    ranks: int
    num_bytes: int
    at_most: bool = False


def memory_traffic(config: Config, shape: BackboneShape, split: WorldSplit, *, num_memory_layers: int) -> list[Traffic]:
    """What reading memory sends; nothing where every rank reads its own.

    Args:
        config: The settings.
        shape: The backbone.
        split: The share of each rank.
        num_memory_layers: Memory layers.

    Returns:
        The traffic within the memory group.
    """
    group_size, dim = config.memory.group_size, shape.head_dim
    if group_size == 1 or not config.memory.enabled:
        return []
    tokens = split.lanes_per_group * config.train.segment_tokens * split.accumulation_steps
    queries = tokens * shape.num_heads * num_memory_layers
    # With activation checkpointing the backward pass begins by reading once more what was chosen before.
    reads = queries * (2 if config.sidenet.activation_checkpointing else 1)
    chunks, partial = config.memory.top_k_chunks, (dim + 2) * FP32
    units = queries // (shape.num_heads // shape.num_kv_heads if config.memory.retrieve_for == "kv_head" else 1)
    kinds = 2 if config.memory.window_tokens else 1  # of results: what was retrieved, and the window
    sent = [
        ("queries", "all-gather", reads * dim * FP32, False),
        ("scores", "all-to-all", units * chunks * FP32, False),
        ("thresholds", "all-gather", units * (FP32 + 1), False),
        ("ties", "all-to-all", units * (chunks + 1) * INT32, True),
        ("partials", "all-to-all", reads * kinds * partial, True),
        ("gradients", "all-to-all", queries * kinds * partial, True),
        ("query_gradients", "all-to-all", queries * kinds * dim * FP32, True),
    ]
    if config.memory.window_tokens:
        sent.append(("window", "all-gather", split.accumulation_steps * group_size, False))
    if config.memory.scope == "document":
        sent.append(("documents", "all-gather", tokens * INT64, False))
    others = group_size - 1
    return [Traffic(purpose, kind, group_size, others * each, at_most) for purpose, kind, each, at_most in sent]


def engine_traffic(
    shape: BackboneShape,
    split: WorldSplit,
    *,
    sidenet_parameters: int,
    number_bytes: int,
    kept_whole: int,
) -> list[Traffic]:
    """What the two DeepSpeed engines send.

    Args:
        shape: The backbone.
        split: The share of each rank.
        sidenet_parameters: Numbers of the SideNet.
        number_bytes: Bytes of a parameter.
        kept_whole: Largest parameter that ZeRO-3 leaves whole on every rank, once it was gathered.

    Returns:
        The traffic over all ranks.
    """
    world, steps = split.world_size, split.accumulation_steps
    if world == 1:
        return []

    def gathered(parameters: tuple[int, ...], *, larger_than: int) -> int:
        parts = sum(-(-numbers // world) for numbers in parameters if numbers > larger_than)
        return steps * (world - 1) * parts * number_bytes

    sidenet = sidenet_parameters * number_bytes
    # DeepSpeed's ZeRO-2 all-reduces its buckets, whatever its `reduce_scatter` is called, in every backward pass.
    return [
        Traffic(
            "backbone: its layers, gathered to encode",
            "all-gather",
            world,
            gathered(shape.decoder, larger_than=kept_whole),
        ),
        Traffic(
            "backbone: its LM head, gathered for the loss", "all-gather", world, gathered(shape.head, larger_than=0)
        ),
        Traffic("SideNet: gradients", "all-reduce", world, steps * 2 * (world - 1) * sidenet // world),
        Traffic("SideNet: weights after the optimizer", "all-gather", world, (world - 1) * sidenet // world),
    ]


def zero_section(deepspeed: dict[str, Any], key: str, default: Any) -> Any:
    """A value of the ZeRO section of a DeepSpeed configuration.

    Args:
        deepspeed: The completed JSON.
        key: The key.
        default: DeepSpeed's own value, where the file does not say.

    Returns:
        The value.
    """
    return deepspeed["zero_optimization"].get(key, default)
