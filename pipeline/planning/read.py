"""What reading memory needs for a while, in bytes. Shapes as in `pipeline.memory.layer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.config.model import ModelSettings
from pipeline.memory.bank import BankShape
from pipeline.memory.search import MARGIN, numbers_of_search, search_at_once
from pipeline.memory.segment import SLOTS_PER_BLOCK, at_once
from pipeline.model.longmem import DTYPES
from pipeline.planning.part import Part
from pipeline.planning.shapes import BackboneShape
from pipeline.planning.traffic import FP32, INT32, INT64
from pipeline.positions import PositionRule


def read_parts(settings: ModelSettings, shape: BackboneShape, bank: BankShape, *, place: str) -> Iterator[Part]:
    """What reading needs beside the bank.

    Args:
        settings: The model.
        shape: The backbone.
        bank: This rank's shard.
        place: Where the shard is, and so where it is read.

    Yields:
        Temporaries of a read, and what is kept until its backward pass.
    """
    memory, group_size = settings.memory, settings.memory.group_size
    block = _block_bytes(settings, shape, bank)
    forward = max(block.search, block.attend, block.window) + block.exchange_forward
    yield Part(
        "one read of memory",
        forward,
        "a block's scores [B H t, S] or its keys and values [B H t, k c, D], with the queries of G ranks",
        ("sidenet",),
        place,
        "a smaller memory.query_block_tokens",
    )
    queries = bank.num_lanes * shape.num_heads * settings.segment_tokens
    kinds = 2 if memory.window_tokens else 1  # of results, each with its gradients: what was retrieved, the window
    backward = max(block.attend, block.window * 2 // 3) + block.exchange_backward  # logits are worked on in place
    backward += queries * (shape.head_dim + kinds * (2 * shape.head_dim + 2)) * FP32
    again = max(block.attend, block.window) + block.exchange_forward
    yield Part(
        "backward of one read",
        max(again, backward) if settings.sidenet.activation_checkpointing else backward,
        "a block's keys and values once more, with gradients of the segment, B H T (3 D + 2)",
        ("backward",),
        place,
        "a smaller memory.query_block_tokens or train.segment_tokens",
    )
    of_slot = bank.num_lanes * bank.num_kv_heads * bank.num_layers * shape.head_dim * FP32
    near = _near_slots(settings, shape, bank) * of_slot
    chosen = memory.top_k_chunks * INT32 + INT64 + INT32  # slots, which unit, how many
    chosen += INT64 if group_size > 1 else 0  # who holds them
    of_query = shape.head_dim * FP32 if group_size > 1 else 0  # the query
    at_once = 1 if settings.sidenet.activation_checkpointing else bank.num_layers  # read again, layer by layer
    chosen = bank.num_layers * (chosen // _together(settings, shape))
    kept = group_size * queries * (chosen + at_once * of_query)
    rotated = near * (bank.chunk_size + 1) if shape.positions == "rotary" else 0
    rotated += _window_slots(settings, bank) * of_slot * 2 * bank.chunk_size  # its keys at their places, its values
    yield Part(
        "what reads keep",
        kept + rotated,
        "chosen chunks, G B H T k, their queries if G > 1, near keys rotated and the window, of each memory layer",
        ("sidenet", "loss", "backward"),
        place,
        "fewer sidenet.memory_layers" + (", or a memory.position with fewer near tokens" if rotated > kept else ""),
    )


class _BlockBytes(NamedTuple):
    search: int
    attend: int
    window: int
    exchange_forward: int
    exchange_backward: int


def _block_bytes(settings: ModelSettings, shape: BackboneShape, bank: BankShape) -> _BlockBytes:
    """Bytes of the steps of reading one block of queries."""
    memory, dim, group_size = settings.memory, shape.head_dim, settings.memory.group_size
    queries = bank.num_lanes * shape.num_heads * min(memory.query_block_tokens, settings.segment_tokens)
    slots = bank.num_chunks * (bank.num_lanes if memory.scope == "group" else 1)
    run = min(slots, SLOTS_PER_BLOCK)
    near = _near_slots(settings, shape, bank) > 0
    together = _together(settings, shape)
    units = queries // together
    device, of_a_head = "cpu" if memory.device == "host" else "cuda", units // bank.num_kv_heads
    of_a_unit = numbers_of_search(run, k=memory.top_k_chunks, unit=(together, dim))
    num_pools = 1 if memory.scope == "group" else bank.num_lanes
    by_pool = (bank.num_kv_heads, num_pools, of_a_head // num_pools)
    heads_at_once, units_at_once = search_at_once(by_pool, of_a_unit, device=device)
    searched = heads_at_once * num_pools * units_at_once
    # Of each query; for a moment beside them the best of each unit.
    scores = searched * run * FP32
    of_each = scores * together if together > 1 else 0
    candidates = searched * min(memory.top_k_chunks + MARGIN, run) * (2 * dim * FP32 + FP32 + INT64)
    # Under `document` a mask (one for all heads that share a key/value head) and, for a moment, a masked copy.
    masked = memory.scope == "document"
    # ALiBi's bias of keys at their real distance, and that distance.
    biased = shape.positions == "alibi" and settings.memory.position == "true"
    bias = biased * (scores + of_a_head * run * FP32)
    search = scores + max(of_each, scores * masked, candidates, bias * together) + of_a_head * run * masked
    attended = at_once(units, memory.top_k_tokens * dim, device=device)
    retrieved = attended * memory.top_k_tokens * dim
    # Of each query: itself, logits and weights, the result. In a group it is counted with what travels.
    details = attended * together * ((2 + 2 * near) * dim + (3 + 2 * near) * memory.top_k_tokens) * (group_size == 1)
    stored = DTYPES[settings.memory_dtype].itemsize
    # Keys and values; beside them for a moment the stored values, or near keys. A CPU multiplies and sums in two steps.
    beside = FP32 * ((near and shape.positions == "rotary") + (memory.device == "host" and together == 1))
    copies = 2 * FP32 + max(stored if stored < FP32 else 0, beside)
    # Logits of a block against the window that is held here, with their weights and a moment's difference.
    held = -(-_window_slots(settings, bank) // group_size) * bank.chunk_size
    window = 3 * queries * held * FP32
    in_group = group_size > 1
    kinds = 2 if memory.window_tokens else 1
    # Keys and slots that were found, of this block and of the one before it; scores, sent and received.
    offered = memory.top_k_chunks * (4 * INT64 + 3 * FP32) * in_group // together
    # Sent and received, of this block and of the one before or after it.
    partials, gradients = (count * kinds * (dim + 2) * FP32 * in_group for count in (5, 4))
    return _BlockBytes(
        search=search,
        attend=retrieved * copies + details * FP32,
        window=window,
        # Queries of this block, of the one before it, whose scores travel, and of the next one.
        exchange_forward=group_size * queries * (dim * FP32 * (1 + near + (2 + near) * in_group) + offered + partials),
        exchange_backward=group_size * queries * (dim * FP32 * (3 + near + 2 * in_group) + gradients),
    )


def _together(settings: ModelSettings, shape: BackboneShape) -> int:
    """Queries that read the same chunks."""
    return shape.num_heads // shape.num_kv_heads if settings.memory.retrieve_for == "kv_head" else 1


def _window_slots(settings: ModelSettings, bank: BankShape) -> int:
    """Slots of a lane in this shard that are read whole, added up over the segments of the group."""
    memory = settings.memory
    spread = memory.group_size if memory.group_size > 1 and memory.window_tokens else 0
    return min(memory.group_size * bank.num_chunks, memory.window_tokens // bank.chunk_size + spread)


def _near_slots(settings: ModelSettings, shape: BackboneShape, bank: BankShape) -> int:
    """Slots of a lane in this shard that are read at their real distance, added up over the segments of the group."""
    rule = PositionRule.parse(settings.memory.position)
    if shape.positions == "learned" or rule.kind in ("none", "fixed"):
        return 0
    everywhere = settings.memory.group_size * bank.num_chunks
    if rule.kind == "true":
        return everywhere
    # The last N tokens before each of G segments, a G-th of them here; the newest ones are a window's.
    older = max(0, rule.distance - settings.memory.window_tokens)
    return min(everywhere, -(-older // bank.chunk_size) + settings.memory.group_size) if older else 0
