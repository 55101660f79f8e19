"""What evaluating held-out documents needs beside what training keeps, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.config.world import held_out_lanes
from pipeline.model.longmem import DTYPES
from pipeline.planning.part import EVALUATION, Part
from pipeline.planning.read import read_parts
from pipeline.planning.sizes import Sizes, bank_remedies, bank_shape


def evaluation_parts(sizes: Sizes) -> Iterator[Part]:
    """The bank of an evaluation and what its documents need; nothing where memory is off.

    Args:
        sizes: The formulas of training.

    Yields:
        This rank's shard, one read of it, and one segment of each document.
    """
    config, layers = sizes.config, len(sizes.layout.memory_layers)
    memory, wanted = config.memory, config.evaluation
    if not memory.enabled:
        return
    lanes = held_out_lanes(wanted.documents, num_groups=sizes.split.num_groups)
    # As `eval` reads it: every document has a lane of its own, whatever the scope.
    settings = config.model.model_copy(update={"memory": memory.model_copy(update={"scope": "lane"})})
    bank = bank_shape(
        settings,
        sizes.shape,
        num_layers=layers,
        num_lanes=lanes,
        num_tokens=min(memory.tokens, wanted.context_tokens + wanted.scored_tokens),
    )
    place = "host" if memory.device == "host" else "accelerator"
    yield Part(
        "evaluation's memory",
        bank.bytes(DTYPES[settings.memory_dtype]),
        f"{layers} layer(s) x {lanes} held-out document(s) x {bank.num_chunks * bank.chunk_size:,} tokens of the "
        "group's, beside the training's",
        (EVALUATION,),
        place,
        f"{bank_remedies(config)}, a smaller evaluation.context_tokens",
    )
    # Without gradients nothing is kept for longer than the read of a layer takes.
    reads = read_parts(settings, sizes.shape, replace(bank, num_layers=1), place=place)
    yield Part(
        "evaluation's read",
        sum(part.num_bytes for part in reads if "sidenet" in part.phases),
        "as one read of memory, of these documents",
        (EVALUATION,),
        place,
        "a smaller memory.query_block_tokens",
    )
    tokens = lanes * (config.train.segment_tokens + config.backbone.context_tokens)
    # The backbone's longest window is tried on one document at a time.
    longest = wanted.context_tokens + wanted.scored_tokens
    for limit in (wanted.backbone_window_tokens, sizes.shape.max_positions):
        longest = longest if limit is None else min(longest, limit)
    tokens = max(tokens, longest)
    yield Part(
        "evaluation's segments",
        sizes.encoding(tokens) + sizes.layer_work(tokens),
        "taps, keys, values and one layer's work, of these documents or of one with the longest window",
        (EVALUATION,),
        remedy="a smaller train.segment_tokens or evaluation.backbone_window_tokens",
    )
