"""The SideNet's engine as an owner of state: weights, optimizer shards and loss scale, by DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

from pipeline.checkpoint.folder import SavedWorld
from pipeline.errors import CheckpointError

_TAG = "engine"


class EngineOwner:
    """The trained weights and the optimizer of all ranks.

    Args:
        engine: The SideNet's engine.
    """

    name = "sidenet"

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def save(self, folder: Path) -> None:
        """Writes weights and this rank's optimizer shard.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
        """
        # Without this entry DeepSpeed cannot turn the checkpoint into a universal one for another number of ranks.
        universal = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        client_state = {UNIVERSAL_CHECKPOINT_INFO: universal}
        self.engine.save_checkpoint(str(folder), tag=_TAG, client_state=client_state, save_latest=False)

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Reads weights and this rank's optimizer shard back.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            CheckpointError: DeepSpeed found no state there.
        """
        path, _ = self.engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed found no state of the SideNet in {folder}")
