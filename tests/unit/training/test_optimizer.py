"""Parameter groups of a tiny SideNet and learning rates worked out by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.model.longmem import build
from pipeline.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from tests.tiny_config import tiny_config
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parameter_is_in_one_group(family):
    config = tiny_config(
        sidenet={"layout": "top", "num_layers": 2, "memory_layers": [1, 2]},
        train={"weight_decay": 0.3, "gate_learning_rate_factor": 50.0, "adam_beta1": 0.8, "adam_epsilon": 1e-6},
    )
    _, sidenet = build(config.model, tiny_model(family))
    optimizer = build_optimizer(sidenet, config.train)
    names = {id(parameter): name for name, parameter in sidenet.named_parameters()}
    groups = {group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups["gates"] == {"memory.1.gate", "memory.2.gate"}
    assert all(name.endswith("bias") or "norm" in name or "ln_" in name for name in groups["norms_and_biases"])
    assert not any(name.endswith("bias") or "norm" in name or "ln_" in name for name in groups["weights"])
    assert sum(len(group) for group in groups.values()) == len(names) == len(set().union(*groups.values()))
    settings = {
        group["name"]: (group["weight_decay"], group["learning_rate_factor"]) for group in optimizer.param_groups
    }
    assert settings == {"weights": (0.3, 1.0), "norms_and_biases": (0.0, 1.0), "gates": (0.0, 50.0)}
    assert all(group["betas"] == (0.8, 0.98) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 25.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]),
    ],
)
def test_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    train = tiny_config(
        train={
            "steps": 6,
            "warmup_steps": 2,
            "learning_rate": 1.0,
            "schedule": schedule,
            "final_learning_rate_fraction": 0.2,
        }
    ).train
    assert [learning_rate_at(step, train) for step in range(1, 7)] == pytest.approx(expected)


def test_a_run_that_is_all_warm_up_ends_at_the_highest_learning_rate():
    train = tiny_config(train={"steps": 4, "warmup_steps": 4, "learning_rate": 2.0}).train
    assert [learning_rate_at(step, train) for step in (1, 2, 3, 4)] == [0.5, 1.0, 1.5, 2.0]


def test_without_warm_up_the_first_step_is_on_the_schedule():
    train = tiny_config(train={"steps": 2, "learning_rate": 1.0, "schedule": "linear"}).train
    assert [learning_rate_at(step, train) for step in (1, 2)] == [pytest.approx(0.55), pytest.approx(0.1)]
