"""Memory that was not stored is read again: the last tokens of every lane, by the frozen backbone."""

from __future__ import annotations

import logging

import torch

from pipeline.data.lanes import Lanes
from pipeline.distributed.ranks import rank
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Exchange
from pipeline.model.longmem import LongMem

logger = logging.getLogger(__name__)


def replay(model: LongMem, lanes: Lanes, bank: MemoryBank, exchange: Exchange) -> None:
    """Fills a bank with all that can still be seen, as training filled it: the same segments by the same ranks.

    The backbone is frozen, so what it says of a segment does not change: with as many ranks as before the bank holds
    the same bits, in the same slots.

    Collective: every rank must call it together.

    Args:
        model: Encodes the segments.
        lanes: The lanes of the memory group; in the end they stand where they stood.
        bank: This rank's shard; what it held is forgotten.
        exchange: The memory group.
    """
    memory, segment_tokens = model.config.memory, model.config.train.segment_tokens
    assert lanes.index % exchange.size == 0, "a step ends with the last rank's segment"
    written = lanes.index // exchange.size  # segments of each lane that this rank has read so far
    count = min(written, -(-memory.tokens // (segment_tokens * exchange.size)))
    chunks = segment_tokens // memory.chunk_size
    if rank() == 0:
        logger.info("reading the last %d tokens of every lane again, to remember them", count * segment_tokens)
    bank.reset(next_slot=(written - count) * chunks % bank.shape.num_chunks)
    lanes.skip(-count * exchange.size)
    for _ in range(count):
        segment = lanes.next_of_group(exchange.rank, exchange.size)
        tokens, documents = (torch.from_numpy(array).to(model.device) for array in (segment.tokens, segment.documents))
        model.append(bank, model.encode(tokens, documents), start=segment.start, documents=documents)
