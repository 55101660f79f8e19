"""DeepSpeed's files are pickles. Here they are read by torch's restricted unpickler, which runs no code of theirs.

It makes numbers, text, containers, tensors and what `ALLOWED` names, and refuses everything else. DeepSpeed 0.19 asks
for the unrestricted one wherever it reads a file (its checkpoint engine, `ds_to_universal`, `universal_checkpoint`), so
torch is told to overrule it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO, UNIVERSAL_CHECKPOINT_VERSION_KEY
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from pipeline.checkpoint.manifest import DamageError
from pipeline.errors import load_failure


def _stage_named(enum: Any, name: Any) -> ZeroStageEnum:
    """A ZeRO stage by its name. Early Pythons 3.11 pickle a member of an enum as `getattr(enum, name)`."""
    if enum is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"Unsupported global: getattr({str(enum)[:60]}, {str(name)[:60]})")
    return ZeroStageEnum[name]


ALLOWED = (ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler, (_stage_named, "builtins.getattr"))
"""What DeepSpeed 0.19 puts beside tensors: the ZeRO stage, where a parameter lies in a partition, the loss scale."""
MODEL_STATES = "mp_rank_00_model_states.pt"
_OPTIM_STATES = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

Shapes = Mapping[str, torch.Size]


@contextmanager
def restricted() -> Iterator[None]:
    """Inside, every `torch.load` of this process is restricted, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            yield
    finally:
        os.environ.pop(_FORCE)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_engine_files(
    folder: Path, names: list[str], *, weights: Shapes, num_parameter_groups: int, num_ranks: int
) -> None:
    """Checks files of DeepSpeed before it reads them; of tensors the shapes only.

    Args:
        folder: The folder that holds them.
        names: Which of them to check.
        weights: Name to shape of everything in the module. DeepSpeed makes names of files of the names it finds.
        num_parameter_groups: Groups of parameters of the optimizer.
        num_ranks: Ranks that wrote them.

    Raises:
        DamageError: One holds what it should not, or lacks what it should hold.
    """
    for name in names:
        try:
            with restricted():
                content = torch.load(folder / name, map_location="meta", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
            if name == MODEL_STATES:
                _check_model(content, weights, num_ranks)
            elif name.endswith("_optim_states.pt"):
                _check_optimizer(content["optimizer_state_dict"], weights, num_parameter_groups)
        except Exception as error:  # it may hold anything at all
            raise DamageError(
                f"{name} is not a file of DeepSpeed's that can be loaded without running code from it",
                got=load_failure(error),
            ) from error


def engine_files(folder: Path, num_ranks: int) -> list[str]:
    """Names of all files in a folder that may be pickles. Raises DamageError: one that DeepSpeed reads is missing."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt"))
    ends = [MODEL_STATES, *(_OPTIM_STATES.format(number) for number in range(num_ranks))]
    missing = [end for end in ends if not {end, f"bf16_{end}", f"fp16_{end}"}.intersection(found)]
    if missing:
        raise DamageError(f"{missing[0]} is missing", got=f"{len(missing)} of {len(ends)} files of {num_ranks} ranks")
    return found


def _check_model(content: Any, weights: Shapes, num_ranks: int) -> None:
    shapes = {name: tensor.shape for name, tensor in content["module"].items()}
    if shapes != weights:
        other = sorted(str(name) for name in shapes.keys() ^ weights.keys())
        other += sorted(name for name in shapes.keys() & weights.keys() if shapes[name] != weights[name])
        raise ValueError(f"the weights of another SideNet: {other[0][:100]} and {len(other) - 1} others differ")
    for group in content["param_shapes"]:
        _check_known(group, weights)
    if content["dp_world_size"] != num_ranks:
        raise ValueError(f"files of {content['dp_world_size']!r} ranks, in a checkpoint of {num_ranks}")
    if set(content.get(UNIVERSAL_CHECKPOINT_INFO, {})) - {UNIVERSAL_CHECKPOINT_VERSION_KEY}:
        raise ValueError(f"{UNIVERSAL_CHECKPOINT_INFO} says how to convert it, which is not for it to say")


def _check_optimizer(state: Any, weights: Shapes, num_parameter_groups: int) -> None:
    for group in state["param_slice_mappings"]:
        _check_known(group, weights)
        if not all(type(place) is fragment_address for place in group.values()):
            raise TypeError("a parameter without a place in the partition")
    # No more than that: of a rank that holds only padding DeepSpeed stores moments of another length than weights.
    for key in ("single_partition_of_fp32_groups", "param_slice_mappings"):
        if len(state[key]) != num_parameter_groups:
            raise ValueError(f"{key} has {len(state[key])} groups of parameters; expected: {num_parameter_groups}")


def _check_known(names: Any, weights: Shapes) -> None:
    foreign = [name for name in names if name not in weights]
    if foreign:
        raise ValueError(f"a parameter that the SideNet does not have: {str(foreign[0])[:100]!r}")
