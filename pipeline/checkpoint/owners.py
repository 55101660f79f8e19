"""Owners of small state: this rank's lanes, its random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.folder import SavedWorld
from pipeline.checkpoint.manifest import DamageError
from pipeline.checkpoint.rank_files import damage_of, rank_file
from pipeline.config.untrusted import Typed, parse_json, read_small
from pipeline.distributed.ranks import rank, together

_FAR = 2**53  # beyond what any run reads
_LANES_BYTES = 1 << 30


class LaneMark(Typed):
    """Where a lane stands: see `pipeline/data/lanes.py`."""

    ordinal: int = Field(ge=0, le=_FAR)
    offset: int = Field(ge=0, le=_FAR)


class LanesState(Typed):
    """What `LanesOwner` stores for a rank."""

    index: int = Field(ge=0, le=_FAR)
    lanes: dict[str, LaneMark]
    fingerprint: dict[str, Any]


class HoldsJson(Protocol):
    """Lanes, as a checkpoint sees them."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class LanesOwner:
    """Where this rank's lanes stand, in JSON. Another number of memory groups deals them anew.

    Args:
        lanes: The lanes.
    """

    name = "lanes"

    def __init__(self, lanes: HoldsJson) -> None:
        self.lanes = lanes

    def least_bytes(self) -> int:
        """Too few to count."""
        return 0

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

    def check(self, folder: Path, saved: SavedWorld) -> None:
        """Checks what is about to be read.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            DamageError: A file is missing, or holds something else.
        """
        stored, own = self._stored(folder, saved), self.lanes.state_dict()
        missing = sorted(own["lanes"].keys() - stored["lanes"].keys())
        if missing and stored["fingerprint"] == own["fingerprint"]:
            raise DamageError(f"lane {missing[0]} is missing", got=f"{len(stored['lanes'])} lanes")

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Puts the lanes back, whichever groups had them.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            LongMemError: The state comes from other data or settings.
        """
        together(lambda: self.lanes.load_state_dict(self._stored(folder, saved)))

    def _stored(self, folder: Path, saved: SavedWorld) -> dict[str, Any]:
        groups = range(0, saved.world_size, saved.group_size)  # the ranks of a group have the same lanes
        states = []
        for first in groups:
            with damage_of(rank_file(folder, first, "json")) as path:
                states.append(LanesState.model_validate(parse_json(read_small(path, limit=_LANES_BYTES))).model_dump())
        lanes = {lane: mark for state in states for lane, mark in state["lanes"].items()}
        return {**states[0], "lanes": lanes}


class RandomOwner:
    """The random number generators of this rank: torch on the CPU and the accelerator, numpy, Python.

    Training draws nothing from them: there is no dropout, and the order of documents has seeds of its own. So another
    number of ranks changes no result; ranks that there were not get the generators of one that there was.
    """

    name = "random"

    def least_bytes(self) -> int:
        """Too few to count."""
        return 0

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

    def check(self, folder: Path, saved: SavedWorld) -> None:
        """Puts what is about to be read into generators that nobody uses.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            DamageError: A file is missing, or holds no state of a generator.
        """
        source = rank() % saved.world_size
        with damage_of(rank_file(folder, source)) as path:
            torch.Generator().set_state(load_file(path)["cpu"])
        with damage_of(rank_file(folder, source, "json")) as path:
            python, numbers = _generators(path)
            random.Random().setstate(python)
            np.random.RandomState().set_state(numbers)

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
        python, numbers = _generators(rank_file(folder, source, "json"))
        random.setstate(python)
        np.random.set_state(numbers)


def _generators(path: Path) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The states of Python's generator and numpy's."""
    state = parse_json(read_small(path))
    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    return (version, tuple(internal), gauss), (kind, np.array(keys, dtype=np.uint32), *rest)
