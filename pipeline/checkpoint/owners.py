"""Owners of state that are not DeepSpeed's: this rank's memory shard, its lanes, its random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.reshard import ShardPlace, rank_file, reshard
from pipeline.distributed.ranks import gather, rank, world_size
from pipeline.errors import CheckpointError
from pipeline.memory.bank import MemoryBank


class HoldsJson(Protocol):
    """Lanes, as a checkpoint sees them."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class MemoryOwner:
    """This rank's memory shard, in safetensors, or nothing: then the lanes' last tokens are read again.

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

    def save(self, folder: Path) -> Callable[[], None] | None:
        """Takes a snapshot of the filled part of the shard.

        Args:
            folder: The owner's folder.

        Returns:
            Writes the snapshot; None if nothing is stored.
        """
        if not self.store:
            return None
        snapshot, path = self.bank.state_dict(), rank_file(folder, rank())
        return lambda: save_file(snapshot, path)

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the shard back, or together from other ranks' shards, or fills it anew.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            CheckpointError: The stored memory has another shape or dtype.
        """
        if not gather(rank_file(folder, 0).is_file())[0]:
            self.replay()
            return
        try:
            self.bank.load_state_dict(self._stored(folder, saved))
        except ValueError as error:
            raise CheckpointError(str(error), do="resume with the memory.* settings that it was saved with") from error

    def _stored(self, folder: Path, saved: SavedWorld) -> dict[str, Tensor]:
        if saved == SavedWorld(world_size(), self.place.group_size):
            return load_file(rank_file(folder, rank()))
        return reshard(folder, saved, self.place, num_chunks=self.bank.shape.num_chunks)


class LanesOwner:
    """Where this rank's lanes stand, in JSON. Another number of memory groups deals them anew.

    Args:
        lanes: The lanes.
    """

    name = "lanes"

    def __init__(self, lanes: HoldsJson) -> None:
        self.lanes = lanes

    def save(self, folder: Path) -> Callable[[], None]:
        """Takes the state of the lanes.

        Args:
            folder: The owner's folder.

        Returns:
            Writes it.
        """
        text, path = json.dumps(self.lanes.state_dict()), rank_file(folder, rank(), "json")

        def write() -> None:
            path.write_text(text)

        return write

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the lanes back, whichever groups had them.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.
        """
        groups = range(0, saved.world_size, saved.group_size)  # the ranks of a group have the same lanes
        states = [json.loads(rank_file(folder, first, "json").read_text()) for first in groups]
        lanes = {lane: mark for state in states for lane, mark in state["lanes"].items()}
        self.lanes.load_state_dict({**states[0], "lanes": lanes})


class RandomOwner:
    """The random number generators of this rank: torch on the CPU and the accelerator, numpy, Python.

    Training draws nothing from them: there is no dropout, and the order of documents has seeds of its own. So another
    number of ranks changes no result; ranks that there were not get the generators of one that there was.
    """

    name = "random"

    def save(self, folder: Path) -> Callable[[], None]:
        """Takes the generators' states.

        Args:
            folder: The owner's folder.

        Returns:
            Writes them.
        """
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state()
        state = {"python": [version, list(internal), gauss], "numpy": [kind, np.asarray(keys).tolist(), *rest]}

        def write() -> None:
            save_file(tensors, rank_file(folder, rank()))
            rank_file(folder, rank(), "json").write_text(json.dumps(state))

        return write

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the generators back.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.
        """
        source = rank() % saved.world_size
        tensors = load_file(rank_file(folder, source))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        state = json.loads(rank_file(folder, source, "json").read_text())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
