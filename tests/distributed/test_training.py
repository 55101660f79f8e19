"""Training on one and two ranks: the same numbers as a loop by hand, whatever the options; stops before nonsense."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.scorer import CONDITIONS
from pipeline.config.schema import Config
from pipeline.data.lanes import Lanes
from pipeline.data.store import TokenStore
from pipeline.model.longmem import LongMem, build
from pipeline.model.stream import Stream
from tests.accelerator import accelerator_with
from tests.distributed.engine_runs import (
    TOLERANCE,
    assert_same_tensors,
    assert_same_training,
    of,
    train_one,
    with_gradients,
)
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

STEPS = 5  # memory is full after two
BROKEN_STEP = 3
RECORDED = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds", "memory_fill", "gate_mean"}
PHASES = ("backbone", "append", "retrieve_and_read", "sidenet", "loss", "backward", "optimizer", "data")

TRAFFIC = ("queries", "scores", "thresholds", "partials", "gradients", "query_gradients")

OPTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "base": {},
    "paper": {"sidenet": {"layout": "uniform", "memory_layers": None, "fusion": "gate"}},
    "recomputed": {"sidenet": {"activation_checkpointing": True}},
    "pieces": {"train": {"loss_piece_tokens": 7}},
    "evaluating": {"evaluation": {"every_steps": 2}},
    "faiss": {"memory": {"search": "faiss"}},
    "host": {"memory": {"device": "host"}},
    "bf16 memory": {"memory": {"dtype": "bf16"}},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16": {"train": {"precision": "fp16"}},
    "no memory": {"memory": {"enabled": False}},
    "document": {"memory": {"scope": "document"}},
    "group": {"memory": {"scope": "group"}},
}


def spoil_a_gradient(config: Config) -> dict[str, Any]:
    """One gradient of a step is infinite though the loss is not."""
    warnings: list[str] = []
    weights: list[torch.Tensor] = []

    def spoil(run: Any) -> None:
        step, weight = run.trainer.step, run.model.sidenet.norm.weight

        def spoiled_step(number: int, **kwargs: Any) -> Any:
            hook = weight.register_hook(lambda gradient: gradient * (math.inf if number == BROKEN_STEP else 1.0))
            result = step(number, **kwargs)
            hook.remove()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.sidenet.parameters()]))
            return result

        run.trainer.step = spoiled_step

    def keep_warning(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return True

    logging.getLogger("pipeline.training.recorder").addFilter(keep_warning)
    _, metrics, _ = train_one(config, evaluated=False, prepare=spoil)
    moved = [not torch.equal(before, after) for before, after in pairwise(weights)]
    return {"metrics": metrics, "warnings": warnings, "moved": moved}


def on_one_rank(configs: Mapping[str, Config], with_gradients_of: Config, spoiled: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"gradients": with_gradients(with_gradients_of), "spoiled": spoil_a_gradient(spoiled)}
    for name, config in configs.items():
        with accelerator_with(fp16=True):
            run, metrics, evaluations = train_one(config)
        report = json.loads((run.folder / "evaluation.json").read_text())
        found[name] = {"metrics": metrics, "evaluation": report, "evaluations": evaluations}
    return found


def on_two_ranks(config: Config, to_break: Config, sharded: Mapping[str, Config]) -> dict[str, Any]:
    found = with_gradients(config)
    found["sharded"] = {name: with_gradients(shared) for name, shared in sharded.items()}
    found["broken"] = break_on_rank_one(to_break)
    return found


def break_on_rank_one(config: Config) -> dict[str, Any]:
    """The SideNet of rank 1 puts out not-a-number in the first segment of a step."""
    from pipeline.distributed.ranks import barrier, rank
    from pipeline.errors import TrainingError
    from pipeline.metrics.record import read_metrics

    kept: dict[str, Any] = {}

    def break_it(run: Any) -> None:
        step, norm = run.trainer.step, run.model.sidenet.norm

        def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            kept["hook"].remove()
            return output * float("nan") if rank() == 1 else output

        def broken_step(number: int, **kwargs: Any) -> Any:
            if number == BROKEN_STEP:
                kept["before"] = state(run)
                kept["hook"] = norm.register_forward_hook(spoil)
            return step(number, **kwargs)

        kept["run"] = run
        run.trainer.step = broken_step

    def state(run: Any) -> list[torch.Tensor]:
        masters = [p for group in run.trainer.engine.optimizer.param_groups for p in group["params"]]
        return [p.detach().clone() for p in (*run.model.sidenet.parameters(), *masters)]

    try:
        train_one(config, evaluated=False, prepare=break_it)
    except TrainingError as error:
        after = state(kept["run"])
        same = all(torch.equal(old, new) for old, new in zip(kept["before"], after, strict=True))
        barrier()
        status = json.loads((kept["run"].folder / "status.json").read_text())
        return {"message": str(error), "same": same, "steps": len(read_metrics(kept["run"].folder)), "status": status}
    return {"message": "nothing was raised"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def one(tiny_run: TinyRun, folder: Path) -> dict[str, Any]:
    configs = {}
    for name, overrides in OPTIONS.items():
        sections: dict[str, Any] = {section: dict(keys) for section, keys in overrides.items()}
        sections["train"] = {"steps": STEPS, **sections.get("train", {})}
        configs[name] = tiny_run.config(folder / name, checkpoint={"every_steps": 0}, **sections)
    plain = [tiny_run.config(folder / name, train={"steps": STEPS}) for name in ("one", "spoiled")]
    return run_ranks(on_one_rank, 1, configs, *plain, init_process_group=False)[0]


@pytest.fixture(scope="module")
def two(tiny_run: TinyRun, folder: Path) -> list[dict[str, Any]]:
    configs = [tiny_run.config(folder / name, train={"steps": STEPS}) for name in ("two", "broken")]
    sharded = {
        name: tiny_run.config(
            folder / f"sharded {name}",
            train={"steps": STEPS},
            memory={"group_size": 2},
            sidenet={"activation_checkpointing": name == "recomputed"},
        )
        for name in ("kept", "recomputed")
    }
    return run_ranks(on_two_ranks, 2, *configs, sharded, init_process_group=False, timeout_s=240)


def losses(found: dict[str, Any], name: str) -> list[float]:
    return of(found[name]["metrics"], "loss")


def by_hand(config: Config) -> dict[str, Any]:
    """The same training in plain PyTorch, without DeepSpeed."""
    backbone, sidenet = build(config.model, AutoModelForCausalLM.from_pretrained(config.backbone.path))
    longmem = LongMem(config.model, backbone, sidenet)
    stream = Stream(longmem, longmem.bank(config.data.lanes))
    names = dict(sidenet.named_parameters())
    gates = [parameter for name, parameter in names.items() if name.startswith("memory.")]
    plain = [p for name, p in names.items() if not name.startswith("memory.") and p.dim() == 1]
    decayed = [p for name, p in names.items() if not name.startswith("memory.") and p.dim() == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.01},
            {"params": plain, "weight_decay": 0.0},
            {"params": gates, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
    )
    lanes = Lanes(
        [TokenStore.open(one.path) for one in config.data.mixture],
        num_lanes=4,
        lanes=range(4),
        segment_tokens=16,
        seed=config.run.seed,
    )
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "gradients": []}
    for step in range(1, STEPS + 1):
        total, counted = 0.0, 0
        for _ in range(2):
            segment = lanes.next_segment()
            seen = stream.feed(torch.from_numpy(segment.tokens), torch.from_numpy(segment.documents))
            of_tokens = stream.losses(seen, torch.from_numpy(segment.targets))
            (of_tokens.sum() / (2 * 4 * 16)).backward()
            total += float(of_tokens.detach().sum())
            counted += int((segment.targets >= 0).sum())
        gradients = {name: parameter.grad.clone() for name, parameter in names.items()}  # type: ignore[union-attr]
        norm = float(torch.nn.utils.clip_grad_norm_(names.values(), 1.0))
        rate = 0.003 * (step / 2 if step <= 2 else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 2) / (STEPS - 2))))
        for group, factor in zip(optimizer.param_groups, (1, 1, 10), strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
        found["loss"].append(total / counted)
        found["grad_norm"].append(norm)
        found["gradients"].append(gradients)
    return found | {"weights": {name: parameter.detach() for name, parameter in names.items()}}


def test_one_rank_equals_a_loop_by_hand(one, tiny_run, folder):
    expected = by_hand(tiny_run.config(folder / "unused", train={"steps": STEPS}))
    found = one["gradients"]
    np.testing.assert_allclose(of(found["metrics"], "loss"), expected["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(of(found["metrics"], "grad_norm"), expected["grad_norm"], rtol=1e-4)
    assert_same_tensors(found, expected)
    assert len(set(expected["loss"])) == STEPS


def test_two_ranks_compute_what_one_computes(one, two):
    assert_same_training(two[0], one["gradients"])
    assert [record["step"] for record in two[0]["metrics"]] == list(range(1, STEPS + 1))
    for name, weight in two[0]["weights"].items():
        assert torch.equal(weight, two[1]["weights"][name])


@pytest.mark.parametrize("activations", ["kept", "recomputed"])
def test_a_memory_group_of_two_ranks_computes_what_one_computes(one, two, activations):
    for found in two:
        assert_same_training(found["sharded"][activations], one["gradients"])
    sent = two[0]["sharded"][activations]["metrics"][-1]
    assert all(sent[f"traffic_{purpose}_bytes"] > 0 for purpose in TRAFFIC)
    assert not any(key.startswith("traffic_") for key in two[0]["metrics"][-1]), "a group of one sends nothing"


def test_what_a_step_records(one):
    records = one["base"]["metrics"]
    for number, record in enumerate(records, start=1):
        assert record["step"] == number and record["tokens"] == 2 * 4 * 16
        assert RECORDED | {f"phase_{name}_s" for name in PHASES} <= record.keys()
        seconds = sum(value for key, value in record.items() if key.startswith("phase_"))
        assert 0.5 * record["seconds"] < seconds <= record["seconds"]
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert of(records, "memory_fill") == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert of(records, "learning_rate")[:3] == [0.0015, 0.003, pytest.approx(0.003 * (0.1 + 0.9 * 0.75))]
    assert records[0]["gate_mean"] != records[-1]["gate_mean"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("option", ["recomputed", "evaluating", "host"])
def test_options_that_change_no_bit(one, option):
    assert losses(one, option) == losses(one, "base")
    assert of(one[option]["metrics"], "grad_norm") == of(one["base"]["metrics"], "grad_norm")


@pytest.mark.parametrize("option", ["pieces", "faiss"])
def test_options_that_change_only_the_order_of_sums(one, option):
    np.testing.assert_allclose(losses(one, option), losses(one, "base"), rtol=TOLERANCE)


@pytest.mark.parametrize(("option", "tolerance"), [("bf16 memory", 0.005), ("bf16", 0.05), ("fp16", 0.05)])
def test_options_that_round(one, option, tolerance):
    np.testing.assert_allclose(losses(one, option), losses(one, "base"), rtol=tolerance)
    assert losses(one, option) != losses(one, "base")


@pytest.mark.parametrize("option", ["paper", "no memory", "document", "group"])
def test_options_that_change_what_is_computed(one, option):
    assert np.isfinite(losses(one, option)).all()
    assert losses(one, option) != losses(one, "base")


def test_without_memory_nothing_is_remembered_and_gates_stay(one):
    records = one["no memory"]["metrics"]
    assert set(of(records, "memory_fill")) == {0.0} and set(of(records, "gate_mean")) == {1.0}
    assert set(of(records, "memory_share")) == {0.0}
    assert set(one["no memory"]["evaluation"]["conditions"]) == {"backbone", "memory_off", "longest_window"}


def test_every_run_is_evaluated_at_its_end(one):
    for name in OPTIONS:
        assert one[name]["evaluation"]["step"] == STEPS
        assert one[name]["evaluations"] == (3 if name == "evaluating" else 1)  # after steps 2, 4 and 5
    assert set(one["base"]["evaluation"]["conditions"]) == {name for name in CONDITIONS if name != "window_only"}
    assert one["evaluating"]["evaluation"]["conditions"] == one["base"]["evaluation"]["conditions"]


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_optimizer(two):
    for number, found in enumerate(two):
        broken = found["broken"]
        assert f"the loss of step {BROKEN_STEP} is not finite; the optimizer has not stepped" in broken["message"]
        assert "not finite on rank(s) [1]" in broken["message"] and "do: resume from" in broken["message"]
        assert ("got: nan on this rank" in broken["message"]) == (number == 1)
        assert broken["same"] and broken["steps"] == BROKEN_STEP - 1
        assert broken["status"]["state"] == "failed" and "is not finite" in broken["status"]["reason"]


def test_gradients_that_are_not_finite_leave_the_weights_and_are_told(one):
    found = one["spoiled"]
    assert found["moved"] == [True, False, True, True]  # after steps 2 to 5
    assert of(found["metrics"], "grad_norm")[BROKEN_STEP - 1] is None
    assert found["warnings"] == ["step 3: the gradients are not finite; DeepSpeed has left the weights as they were"]
