"""The SideNet's engine as an owner of state: weights, optimizer shards and loss scale, by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.checkpoint.export import SETTINGS, WEIGHTS
from pipeline.checkpoint.folder import SavedWorld
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.distributed.ranks import barrier, rank, world_size
from pipeline.errors import CheckpointError, LongMemError
from pipeline.training.pickles import check_engine_files, engine_files, load_failure, restricted
from pipeline.training.universal import load_universal, plainly_named

_TAG = "engine"
FP32_BYTES = 4


class EngineOwner:
    """The trained weights and the optimizer of all ranks.

    Args:
        engine: The SideNet's engine.
        config: The run's settings, stored beside the weights.
        scratch: A folder that all ranks share, for the time of loading what another number of ranks saved.
    """

    name = "sidenet"

    def __init__(self, engine: Any, config: Config, *, scratch: Path) -> None:
        self.engine, self.config, self.scratch = engine, config, scratch

    def least_bytes(self) -> int:
        """Of the optimizer's part of this rank; on rank 0 also of the weights, for DeepSpeed and in fp32."""
        optimizer = self.engine.optimizer
        held = [*optimizer.single_partition_of_fp32_groups]
        held += [value for state in optimizer.optimizer.state.values() for value in state.values()]
        bytes_held = sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
        weights = list(self.engine.module.parameters()) if rank() == 0 else []
        return bytes_held + sum(weight.numel() * (weight.element_size() + FP32_BYTES) for weight in weights)

    def save(self, folder: Path) -> Callable[[], None]:
        """Writes weights and this rank's optimizer shard for DeepSpeed, and the weights once more for everyone else.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.

        Returns:
            On rank 0: writes `model.safetensors` (fp32) and `config.yaml`, all that an export needs. On every rank:
            fails if DeepSpeed could not write.
        """
        failure = self._save_for_deepspeed(folder)
        weights = full_weights(self.engine.module)

        def write() -> None:
            if failure is not None:
                raise failure
            if rank() == 0:
                save_file(weights, folder / WEIGHTS)
                (folder / SETTINGS).write_text(dump_config(self.config), encoding="utf-8")

        return write

    def _save_for_deepspeed(self, folder: Path) -> Exception | None:
        # Without this entry DeepSpeed cannot turn the checkpoint into a universal one for another number of ranks.
        universal = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        client_state = {UNIVERSAL_CHECKPOINT_INFO: universal}
        try:
            self.engine.save_checkpoint(str(folder), tag=_TAG, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError) as error:
            # DeepSpeed 0.19 ends with a barrier, in which the ranks wait that could write. With it all are in step
            # again, and can be told.
            barrier()
            return error
        return None

    def check(self, folder: Path, saved: SavedWorld) -> None:
        """Checks DeepSpeed's files, which are pickles, without running code from them; the ranks share the work.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            DamageError: A file is missing, or holds what DeepSpeed did not put there.
        """
        names = engine_files(folder / _TAG, saved.world_size)
        check_engine_files(
            folder / _TAG,
            names[rank() :: world_size()],
            weights={name: tensor.shape for name, tensor in self.engine.module.state_dict().items()},
            num_parameter_groups=len(self.engine.optimizer.bit16_groups),
            num_ranks=saved.world_size,
        )

    def load(self, folder: Path, saved: SavedWorld) -> None:
        """Reads weights and this rank's optimizer shard back; those of another number of ranks are split anew.

        Collective: every rank must call it.

        Args:
            folder: The owner's folder.
            saved: The ranks that wrote it.

        Raises:
            CheckpointError: DeepSpeed found no state there, or could not convert it.
        """
        try:
            with restricted():
                self._load(folder, saved)
        except LongMemError:
            raise
        except Exception as error:  # DeepSpeed checks little of what it finds
            raise CheckpointError(
                f"rank {rank()} could not load the SideNet's state from {folder}",
                got=load_failure(error),
                do="see what the log says of other ranks, or resume from another checkpoint",
            ) from error

    def _load(self, folder: Path, saved: SavedWorld) -> None:
        if saved.world_size != world_size():
            load_universal(self.engine, folder, _TAG, scratch=self.scratch)
            return
        with plainly_named(folder) as (link,):
            path, _ = self.engine.load_checkpoint(str(link), tag=_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed found no state of the SideNet in {folder}")


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """On rank 0 the trained weights in fp32, on the host; master weights where there are some. Collective."""
    weights = {}
    for name, parameter in module.named_parameters():
        # In fp32 the weights are their own master weights, and whole on every rank.
        full = parameter.detach() if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
        if rank() == 0:
            weights[name] = full.to("cpu", copy=True).contiguous()
    return weights
