"""Where a chunk of a lane is kept: by which rank of a memory group, and in which slot of its ring.

Rank `g` of a group of `G` keeps segments `s G + g` of its group's lanes, one after another, round and round in its
ring. Both answers follow from the place in the lane alone, so that a shard can be put together, or filled anew, as if
its rank had written it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def ring_chunks(num_tokens: int, *, segment_tokens: int, chunk_size: int, group_size: int) -> int:
    """Chunks that a rank's ring must hold for a group to remember so many tokens of a lane.

    Args:
        num_tokens: Tokens of a lane that the group remembers.
        segment_tokens: `T`.
        chunk_size: `c`.
        group_size: Ranks of the memory group; each keeps every `group_size`-th segment.

    Returns:
        The rank's share, in whole segments where it is shared, and one segment more, which is appended before it is
        read.
    """
    if group_size > 1:
        num_tokens = -(-num_tokens // (segment_tokens * group_size)) * segment_tokens
    return (num_tokens + segment_tokens) // chunk_size


@dataclass(frozen=True)
class Turn:
    """Which segments of a lane a rank keeps.

    Attributes:
        rank: The rank's number in its memory group.
        size: `G`.
        segment_tokens: `T`.
    """

    rank: int
    size: int
    segment_tokens: int

    def holds(self, positions: Tensor) -> Tensor:
        """Which chunks at these lane positions, int64, are this rank's: bool, of the same shape."""
        return positions // self.segment_tokens % self.size == self.rank

    def num_before(self, positions: Tensor, *, chunk_size: int) -> Tensor:
        """How many chunks of a lane this rank keeps of all that lies before places in it.

        Args:
            positions: Lane positions, int64; anybody's.
            chunk_size: `c`.

        Returns:
            int64, of the same shape.
        """
        tokens, turns = self.segment_tokens, self.segment_tokens * self.size
        own = positions // turns * tokens + (positions % turns - self.rank * tokens).clamp(0, tokens)
        return own // chunk_size

    def slots(self, positions: Tensor, *, chunk_size: int, num_chunks: int) -> Tensor:
        """The slots of this rank's chunks at places in a lane; for any other place the slot of the next one.

        Args:
            positions: Lane positions, int64.
            chunk_size: `c`.
            num_chunks: Chunks of the ring.

        Returns:
            int64, of the same shape.
        """
        return self.num_before(positions, chunk_size=chunk_size) % num_chunks


@dataclass(frozen=True)
class ShardPlace:
    """The part of a job's memory that a rank keeps.

    Attributes:
        lanes: Numbers of its group's lanes.
        num_lanes: Lanes of the job.
        turn: Which of their segments.
        num_tokens: `M`, tokens of a lane that are remembered.
    """

    lanes: Sequence[int]
    num_lanes: int
    turn: Turn
    num_tokens: int
