"""Memory that was not stored is read again: the last tokens of every lane, by the frozen backbone."""

from __future__ import annotations

import logging

import torch

from pipeline.data.lanes import Lanes
from pipeline.distributed.ranks import rank
from pipeline.model.stream import Stream

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
    settings, bank, group = stream.model.settings, stream.bank, stream.exchange
    assert bank is not None and lanes.index % group.size == 0, "a step ends with the last rank's segment"
    written = lanes.index // group.size  # segments of each lane that this rank has read so far
    count = min(written, -(-settings.memory.tokens // (settings.segment_tokens * group.size)))
    chunks = settings.segment_tokens // settings.memory.chunk_size
    if rank() == 0:
        num_tokens = count * settings.segment_tokens
        logger.info("reading the last %d tokens of every lane again, to remember them", num_tokens)
    bank.reset(next_slot=(written - count) * chunks % bank.shape.num_chunks)
    lanes.skip(-count * group.size)
    for _ in range(count):
        segment = lanes.next_of_group(group.rank, group.size)
        device = stream.model.device
        tokens, documents = (torch.from_numpy(array).to(device) for array in (segment.tokens, segment.documents))
        stream.feed(tokens, documents, start=segment.start)
