"""Trains with both engines in the processes of a test, and compares two such runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Config

TOLERANCE = 1e-5  # float32, summed in another order
GRADIENT_TOLERANCE = 1e-4  # of the largest gradient


def partitioned_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters of a module under ZeRO-3 that this rank holds."""
    return sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in module.parameters())


def train_one(
    config: Config, *, evaluated: bool = True, prepare: Callable[[Any], None] | None = None
) -> tuple[Any, list[dict[str, Any]], int]:
    """Builds and trains; every rank gets the run, the lines of metrics.jsonl and the number of evaluations."""
    from eval.while_training import evaluate
    from pipeline.distributed.ranks import barrier
    from pipeline.metrics.record import read_metrics
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    evaluations = 0

    def evaluation(model: Any, stores: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        return evaluate(model, stores, config, group=run.group)

    run = build_run(config)
    if prepare is not None:
        prepare(run)
    train(run, evaluate=evaluation if evaluated else None)
    barrier()
    return run, read_metrics(run.folder), evaluations


def with_gradients(config: Config) -> dict[str, Any]:
    """Trains and keeps every step's gradients, as the optimizer gets them but for clipping, and the last weights."""
    from deepspeed.utils import safe_get_full_grad

    gradients: list[dict[str, torch.Tensor]] = []

    def keep_gradients(run: Any) -> None:
        check = run.trainer._check_finite

        def check_and_keep(number: int, totals: torch.Tensor) -> None:
            parameters = run.model.sidenet.named_parameters()
            gradients.append({name: safe_get_full_grad(parameter).clone() for name, parameter in parameters})
            check(number, totals)

        run.trainer._check_finite = check_and_keep

    run, metrics, _ = train_one(config, evaluated=False, prepare=keep_gradients)
    weights = {name: parameter.detach().clone() for name, parameter in run.model.sidenet.named_parameters()}
    return {"metrics": metrics, "gradients": gradients, "weights": weights}


def of(metrics: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in metrics]


def assert_same_training(left: dict[str, Any], right: dict[str, Any], *, later: float = GRADIENT_TOLERANCE) -> None:
    """Losses, gradients and weights are the same; `later` bounds gradients from the second step on."""
    np.testing.assert_allclose(of(left["metrics"], "loss"), of(right["metrics"], "loss"), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(of(left["metrics"], "grad_norm"), of(right["metrics"], "grad_norm"), rtol=later)
    assert_same_tensors(left, right, later=later)


def assert_same_tensors(left: dict[str, Any], right: dict[str, Any], *, later: float = GRADIENT_TOLERANCE) -> None:
    """Gradients and weights are the same."""
    for step, (mine, other) in enumerate(zip(left["gradients"], right["gradients"], strict=True)):
        assert mine.keys() == other.keys()
        largest = max(float(gradient.abs().max()) for gradient in other.values())
        for name in mine:
            # Of the largest: sums of terms that nearly cancel. Later of the parameter's own, if that is more.
            bound = max(GRADIENT_TOLERANCE * largest, later * float(other[name].abs().max()) * bool(step))
            torch.testing.assert_close(mine[name], other[name], atol=bound, rtol=0)
    for name, weight in left["weights"].items():
        # Adam makes a step of the full learning rate out of the sign of a gradient that is nearly zero.
        assert float((weight - right["weights"][name]).abs().mean()) < 1e-5, name
