"""The owner of the remembered keys and values: this rank's shard, whichever ranks stored it.

Rank `g` of a memory group of `G` keeps segments `s G + g` of its group's lanes, and groups hold consecutive lanes:
which files hold a rank's lanes follows from the ranks that wrote them. Of each only the chunks are read that the rank
keeps; with the same ranks as then they are those of its own file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.rank_files import damage_of, rank_file
from pipeline.distributed.ranks import gather_objects, rank, world_size
from pipeline.errors import CheckpointError
from pipeline.memory.bank import MemoryBank
from pipeline.memory.file import open_memory, snapshot
from pipeline.memory.fill import Part, fill
from pipeline.memory.place import ShardPlace


class MemoryOwner:
    """This rank's memory shard (`pipeline/memory/file.py`), or nothing: then the lanes' last tokens are read again.

    Comes after the owner of the lanes: reading again begins where they stand.

    Args:
        bank: The bank.
        place: Which part of the memory it keeps.
        store: Whether a checkpoint holds the memory. Loading follows what the checkpoint holds.
        replay: Fills the bank from the lanes, as they were loaded; called on every rank together.
    """

    name = "memory"

    def __init__(self, bank: MemoryBank, place: ShardPlace, *, store: bool, replay: Callable[[], None]) -> None:
        self.bank, self.place, self.store, self.replay = bank, place, store, replay

    def least_bytes(self) -> int:
        """Of the keys and values that are remembered."""
        return self.bank.filled_bytes() if self.store else 0

    def save(self, folder: Path) -> Callable[[], None] | None:
        """Takes a snapshot of the filled part of the shard.

        Args:
            folder: The owner's folder.

        Returns:
            Writes the snapshot; None if nothing is stored.
        """
        if not self.store:
            return None
        taken, path = snapshot(self.bank), rank_file(folder, rank())
        return lambda: taken.write(path)

    def check(self, folder: Path, saved: SavedWorld) -> None:
        """Checks the shards that are about to be read: all but their keys and values.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            DamageError: One is missing, or holds something else.
        """
        if not rank_file(folder, 0).is_file():
            return
        for number in range(rank(), saved.world_size, world_size()):
            with damage_of(rank_file(folder, number)) as path, open_memory(path):
                pass

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the shard together from what ranks have stored, or fills it anew.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            CheckpointError: The stored memory has another shape or dtype, or does not go back far enough.
        """
        if not gather_objects(rank_file(folder, 0).is_file())[0]:
            self.replay()
            return
        try:
            with ExitStack() as opened:
                parts = self._parts(folder, saved, opened)
                fill(self.bank, parts, self.place.turn, num_tokens=self.place.num_tokens)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(str(error), do="resume with the memory.* settings that it was saved with") from error

    def _parts(self, folder: Path, saved: SavedWorld, opened: ExitStack) -> list[Part]:
        """The shards that hold anything of this rank's lanes."""
        lanes, per_group = torch.tensor(self.place.lanes), self.place.num_lanes * saved.group_size // saved.world_size
        groups, parts = lanes // per_group, []
        for group in groups.unique().tolist():
            rows = (groups == group).nonzero()[:, 0]
            for member in range(saved.group_size):
                path = rank_file(folder, group * saved.group_size + member)
                parts.append(Part(opened.enter_context(open_memory(path)), lanes[rows] % per_group, rows))
        return parts
