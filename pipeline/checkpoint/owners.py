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
from pipeline.distributed.ranks import rank
from pipeline.errors import CheckpointError


class HoldsTensors(Protocol):
    """A memory bank, as a checkpoint sees it."""

    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...  # noqa: D102


class HoldsJson(Protocol):
    """Lanes, as a checkpoint sees them."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


def _of_rank(folder: Path, suffix: str) -> Path:
    return folder / f"rank_{rank():05d}.{suffix}"


class MemoryOwner:
    """This rank's memory shard, in safetensors.

    Args:
        bank: The bank.
    """

    name = "memory"

    def __init__(self, bank: HoldsTensors) -> None:
        self.bank = bank

    def save(self, folder: Path) -> Callable[[], None]:
        """Takes a snapshot of the filled part of the shard.

        Args:
            folder: The owner's folder.

        Returns:
            Writes the snapshot.
        """
        snapshot, path = self.bank.state_dict(), _of_rank(folder, "safetensors")
        return lambda: save_file(snapshot, path)

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the shard back.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            CheckpointError: The stored memory has another shape or dtype.
        """
        try:
            self.bank.load_state_dict(load_file(_of_rank(folder, "safetensors")))
        except ValueError as error:
            raise CheckpointError(str(error), do="resume with the memory.* settings that it was saved with") from error


class LanesOwner:
    """Where this rank's lanes stand, in JSON.

    Args:
        lanes: The lanes.
    """

    name = "lanes"

    def __init__(self, lanes: HoldsJson) -> None:
        self.lanes = lanes

    def save(self, folder: Path) -> None:
        """Writes the state of the lanes.

        Args:
            folder: The owner's folder.
        """
        _of_rank(folder, "json").write_text(json.dumps(self.lanes.state_dict()))

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the lanes back.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.
        """
        self.lanes.load_state_dict(json.loads(_of_rank(folder, "json").read_text()))


class RandomOwner:
    """The random number generators of this rank: torch on the CPU and the accelerator, numpy, Python."""

    name = "random"

    def save(self, folder: Path) -> None:
        """Writes the generators' states.

        Args:
            folder: The owner's folder.
        """
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, _of_rank(folder, "safetensors"))
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state()
        state = {"python": [version, list(internal), gauss], "numpy": [kind, np.asarray(keys).tolist(), *rest]}
        _of_rank(folder, "json").write_text(json.dumps(state))

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the generators back.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.
        """
        tensors = load_file(_of_rank(folder, "safetensors"))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        state = json.loads(_of_rank(folder, "json").read_text())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
