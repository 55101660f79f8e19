"""The SideNet's layers as copies of the backbone's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.activations import ACT2FN

from pipeline.backbone.backbone import Backbone
from pipeline.errors import BackboneError

ACTIVATIONS = ("act", "act_fn", "activation_fn", "gelu_impl")
"""What families call the activation in their MLP."""


@dataclass(frozen=True)
class Habits:
    """What copies do otherwise than what they are copies of.

    Attributes:
        norm_epsilon: Epsilon of their norms; None: as it was.
        activation: Of their MLPs, by transformers' name; None: as it was.
    """

    norm_epsilon: float | None = None
    activation: str | None = None


def trainable_copy(module: nn.Module, backbone: Backbone, habits: Habits) -> nn.Module:
    """Copies a module of the backbone, but for the hooks that were put on it.

    Collective: with a partitioned backbone every rank must call it together.

    Args:
        module: A layer, or the final norm.
        backbone: Whose it is.
        habits: What the copy does otherwise.

    Returns:
        A copy with parameters of its own.

    Raises:
        BackboneError: It has no norm or activation where another one is asked for.
    """
    with backbone.made_whole(list(module.parameters())):
        clone = copy.deepcopy(module, {id(backbone): backbone})  # its hooks hold the backbone, which is not copied
    for part in clone.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._forward_hooks_with_kwargs.clear()
        part._forward_pre_hooks_with_kwargs.clear()
    for parameter in clone.parameters():
        parameter.requires_grad_(True)
    _adopt(clone, habits, backbone.model.config.model_type)
    return clone


def _adopt(clone: nn.Module, habits: Habits, family: str) -> None:
    if habits.norm_epsilon is not None:
        for part, name in _having(clone, ("eps", "variance_epsilon"), "norm_epsilon", family):
            setattr(part, name, habits.norm_epsilon)
    if habits.activation is not None:
        for part, name in _having(clone, ACTIVATIONS, "activation", family):
            setattr(part, name, ACT2FN[habits.activation])


def _having(clone: nn.Module, names: Sequence[str], setting: str, family: str) -> list[tuple[nn.Module, str]]:
    found = [(part, name) for part in clone.modules() for name in names if hasattr(part, name)]
    if not found:
        raise BackboneError(
            f"in the layers of {family} there is nothing that sidenet.{setting} could be set of",
            expected=f"a module with {' or '.join(names)}",
            do=f"leave sidenet.{setting} out",
        )
    return found
