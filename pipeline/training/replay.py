"""Memory that was not stored is read again: the last tokens of every lane, by the frozen backbone."""

from __future__ import annotations

import logging

import torch

from pipeline.data.lanes import Lanes
from pipeline.distributed.ranks import rank
from pipeline.model.stream import Stream
from pipeline.training.step import feed_segment

logger = logging.getLogger(__name__)


def replay(stream: Stream, lanes: Lanes) -> None:
    """Fills a bank with all that can still be seen, as training filled it: the same segments by the same ranks.

    The backbone is frozen, so what it says of a segment does not change: with as many ranks as before the bank holds
    the same bits, in the same slots.

    Collective: every rank must call it together.

    Args:
        stream: Encodes the segments; what its bank held is forgotten.
        lanes: The lanes of the memory group; in the end they stand where they stood.
    """
    settings, bank, turn = stream.model.settings, stream.bank, stream.turn
    assert bank is not None and lanes.index % turn.size == 0, "a step ends with the last rank's segment"
    # Segments of each lane that this rank has read so far, and those of them that can still be seen.
    count = min(lanes.index // turn.size, -(-settings.memory.tokens // (turn.segment_tokens * turn.size)))
    if rank() == 0:
        logger.info("reading the last %d tokens of every lane again, to remember them", count * turn.segment_tokens)
    lanes.skip(-count * turn.size)
    first, shape = torch.tensor(lanes.index * turn.segment_tokens), bank.shape
    bank.reset(next_slot=int(turn.slots(first, chunk_size=shape.chunk_size, num_chunks=shape.num_chunks)))
    for _ in range(count):
        feed_segment(stream, lanes.next_of_group(turn.rank, turn.size))
