"""Parameter groups and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.config.schema import TrainConfig
from pipeline.sidenet.sidenet import SideNet


def build_optimizer(sidenet: SideNet, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over three parameter groups: weights, norms and biases (no decay), gates (no decay, a far larger rate).

    Args:
        sidenet: The SideNet.
        train: Its settings.

    Returns:
        The optimizer; every parameter group carries `learning_rate_factor`, on top of the step's learning rate.
    """
    gates = {id(parameter) for parameter in sidenet.memory.parameters()}
    others = [parameter for parameter in sidenet.parameters() if id(parameter) not in gates]
    parameter_groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [p for p in others if p.dim() > 1], "weight_decay": train.weight_decay},
        {"name": "norms_and_biases", "params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        {"name": "gates", "params": list(sidenet.memory.parameters()), "weight_decay": 0.0},
    ]
    for group in parameter_groups:
        group["learning_rate_factor"] = train.gate_learning_rate_factor if group["name"] == "gates" else 1.0
    return torch.optim.AdamW(
        parameter_groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # one pass over weights and moments instead of a dozen, each with a temporary as large as they
    )


def learning_rate_at(step: int, train: TrainConfig) -> float:
    """The weights' learning rate in one optimizer step, counted from 1: linear warm-up, then the schedule."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    shape = 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    floor = train.final_learning_rate_fraction
    return train.learning_rate * (floor + (1.0 - floor) * shape)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Sets the learning rate of the next step, given that of weights."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_factor"]
