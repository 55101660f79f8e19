"""fairseq's checkpoints are pickles. Here they are read by torch's restricted unpickler, which runs no code of theirs.

It makes numbers, text, containers, tensors and `argparse.Namespace`, takes settings of `omegaconf` as plain data, and
refuses everything else by name. Neither fairseq nor omegaconf is needed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, load_failure


class _Plain:
    """Stands for an object of omegaconf: what was pickled of it, never its class."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_OMEGACONF = (
    "base.Metadata",
    "base.ContainerMetadata",
    "dictconfig.DictConfig",
    "listconfig.ListConfig",
    "nodes.AnyNode",
    "nodes.BooleanNode",
    "nodes.BytesNode",
    "nodes.EnumNode",
    "nodes.FloatNode",
    "nodes.IntegerNode",
    "nodes.PathNode",
    "nodes.StringNode",
)


_TYPES = ("typing.Any", *(f"builtins.{name}" for name in ("str", "int", "float", "bool", "bytes", "dict", "list")))
"""What omegaconf names as the types of its nodes."""


def _allowed() -> list[Any]:
    # A class for each name: torch keeps them by class.
    names = (*(f"omegaconf.{name}" for name in _OMEGACONF), *_TYPES)
    return [argparse.Namespace, defaultdict, *((type("Plain", (_Plain,), {}), name) for name in names)]


@dataclass(frozen=True)
class Checkpoint:
    """A fairseq checkpoint.

    Attributes:
        path: Its file.
        model: Its state dict, on the CPU, as it is on the disk.
        settings: Of its model: what fairseq calls `cfg.model`, or `args` in old ones.
    """

    path: Path
    model: Mapping[str, Tensor]
    settings: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that fairseq wrote, without running anything that stands in it.

    Args:
        path: The file; its tensors are mapped, not copied, where its form allows that.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is none, it is damaged, or holds anything but what is allowed.
    """
    if not path.is_file():
        raise CheckpointError("there is no such checkpoint", got=path, expected="a .pt file that fairseq wrote")
    try:
        with torch.serialization.safe_globals(_allowed()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # of torch before 1.6
    except Exception as error:  # it may hold anything at all
        raise CheckpointError(
            f"{path.name} cannot be read as a checkpoint without running code from it",
            got=load_failure(error),
            expected="tensors, numbers, text, containers and argparse.Namespace",
            do="download it again; if it is the authors' own file, report the name that was refused",
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, Mapping) or not model or not all(isinstance(x, Tensor) for x in model.values()):
        of = ", ".join(map(str, content)) if isinstance(content, dict) else "?"
        raise CheckpointError(
            f"{path.name} is no checkpoint of a model",
            got=f"a {type(content).__name__} of {of}"[:300],
            expected="what fairseq saves: a dictionary whose `model` holds tensors by their names",
        )
    return Checkpoint(path, model, _settings(content))


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(content.get("cfg"))
    found = plain.get("model") if isinstance(plain, dict) else None
    if not isinstance(found, dict):
        found = _plain(content.get("args"))
    return {str(name): value for name, value in found.items()} if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """Namespaces and omegaconf's containers as dictionaries and lists."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, _Plain):
        state = value.state
        value = state.get("_content", state.get("_val")) if isinstance(state, Mapping) else None
        return _plain(value)
    if isinstance(value, Mapping):
        return {str(_plain(name)): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
