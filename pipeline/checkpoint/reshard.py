"""Memory shards split anew: from the ranks that wrote them to today's, by place in the lanes.

Whatever the ranks, rank `g` of a memory group of `G` keeps segments `s G + g` of its group's lanes, and groups hold
consecutive lanes. Where a chunk is written follows from its place in the lane, too, so a shard that is put together
here is one that its rank could have written itself.

Shapes: `Hkv` key/value heads, `B` lanes of a group, `F` chunks of each lane in a shard, `c` tokens of a chunk, `D`
head size.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.folder import SavedWorld
from pipeline.memory.place import ShardPlace


def rank_file(folder: Path, rank: int, suffix: str = "safetensors") -> Path:
    """Where a rank's part of a state is stored.

    Args:
        folder: The owner's folder in a checkpoint.
        rank: The rank in the job.
        suffix: Kind of file.

    Returns:
        The file.
    """
    return folder / f"rank_{rank:05d}.{suffix}"


def reshard(folder: Path, saved: SavedWorld, place: ShardPlace, *, num_chunks: int) -> dict[str, Tensor]:
    """Puts a rank's shard together from the shards of other ranks.

    Args:
        folder: The folder of the memory in a checkpoint.
        saved: The ranks that wrote it.
        place: The part that is wanted.
        num_chunks: Chunks of a ring of the bank that it is for.

    Returns:
        What `MemoryBank.state_dict` would have returned, of the tokens that can still be seen.

    Raises:
        ValueError: The stored memory does not go back as far as `M`.
    """
    lanes_per_group = place.num_lanes * saved.group_size // saved.world_size
    with ExitStack() as stack:
        parts = []
        for group in sorted({lane // lanes_per_group for lane in place.lanes}):
            rows = [row for row, lane in enumerate(place.lanes) if lane // lanes_per_group == group]
            sources = [place.lanes[row] % lanes_per_group for row in rows]
            for member in range(saved.group_size):
                path = rank_file(folder, group * saved.group_size + member)
                parts.append(_Part(stack.enter_context(safe_open(path, framework="pt")), rows, sources))
        return _join(parts, place, num_chunks=num_chunks)


class _Part:
    """An open shard, which of its lanes go to which rows, and which of its chunks to which places."""

    def __init__(self, file: Any, rows: list[int], sources: list[int]) -> None:
        self.file, self.rows, self.sources = file, rows, sources
        self.positions: Tensor = file.get_tensor("positions")
        self.chunks = self.places = torch.zeros(0, dtype=torch.int64)

    def choose(self, positions: Tensor) -> None:
        """Looks its chunks up among those that are wanted.

        Args:
            positions: Lane positions of the wanted chunks, ascending.
        """
        self.chunks = torch.isin(self.positions, positions).nonzero()[:, 0]
        self.places = torch.searchsorted(positions, self.positions[self.chunks])

    def copy(self, stored: Tensor, target: Tensor, *, lane_axis: int) -> None:
        """Copies the chosen chunks of the wanted lanes.

        Args:
            stored: Of this shard, `[..., B, F, ...]`.
            target: Of the new one.
            lane_axis: Axis of the lanes; that of the chunks is the next one.
        """
        for row, source in zip(self.rows, self.sources, strict=True):
            # Without the lane's axis the chunks' has its number.
            chosen = stored.select(lane_axis, source).index_select(lane_axis, self.chunks)
            target.select(lane_axis, row).index_copy_(lane_axis, self.places, chosen)


def _join(parts: list[_Part], place: ShardPlace, *, num_chunks: int) -> dict[str, Tensor]:
    names = [name for name in parts[0].file.keys() if name.startswith(("keys.", "values."))]  # noqa: SIM118 - no dict
    heads, _, _, chunk_size, head_dim = parts[0].file.get_slice(names[0]).get_shape()
    stored = torch.cat([part.positions for part in parts]).unique()
    end = int(stored[-1]) + chunk_size if len(stored) else 0
    oldest = max(0, end - place.num_tokens)
    if len(stored) and int(stored[0]) > oldest:
        raise ValueError(f"the stored memory goes back to token {int(stored[0])} of {end}, not to {oldest}")
    positions = stored[place.turn.holds(stored) & (stored >= oldest)]
    following = torch.tensor(end + place.turn.rank * place.turn.segment_tokens)
    state = {
        "slots": place.turn.slots(positions, chunk_size=chunk_size, num_chunks=num_chunks),
        "num_chunks": torch.tensor(num_chunks),
        "next_slot": place.turn.slots(following, chunk_size=chunk_size, num_chunks=num_chunks),
        "positions": positions,
    }
    for part in parts:
        part.choose(positions)
    lanes, chunks = len(place.lanes), len(positions)
    shapes = {"documents": (lanes, chunks)} | {name: (heads, lanes, chunks, chunk_size, head_dim) for name in names}
    for name, shape in shapes.items():
        for part in parts:
            tensor = part.file.get_tensor(name)
            if name not in state:
                state[name] = torch.empty(shape, dtype=tensor.dtype)
            part.copy(tensor, state[name], lane_axis=0 if name == "documents" else 1)
    return state
