"""The plan held against what two ranks really hold and send."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config.schema import Config
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import Traffic
from tests.distributed.sharded_training import Case, bank_bytes, banks_made, train
from tests.ranks import run_ranks
from tests.tiny_config import tiny_config
from tests.tiny_models import tiny_model
from tests.tiny_run import TinyRun

TOLERANCE = 0.1
READS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "one memory layer": {},
    "all, joint, clamp": {
        "memory": {"position": "clamp:24"},
        "sidenet": {"layout": "top", "memory_layers": "all", "fusion": "joint"},
    },
    "document, checkpointing": {
        "memory": {"scope": "document", "top_k_tokens": 16},
        "sidenet": {"activation_checkpointing": True},
    },
}


def two_engines(config: Config) -> dict[str, Any]:
    """Trains three steps, evaluates, and trains a fourth; the bytes that this rank holds, those that its engines sent
    in the third, and those that its reads sent in the fourth."""
    from eval.while_training import evaluate
    from pipeline.training.build import build_run
    from tests.distributed.engine_runs import partitioned_bytes

    with counted() as sent:
        run = build_run(config)
        assert run.bank is not None and run.stores.validation
        for step in (1, 2):  # ZeRO-3 learns in the first passes what to keep
            run.trainer.step(step)
        sent.update({kind: 0 for kind in sent})
        run.trainer.step(3)
        in_a_step = dict(sent)
    with banks_made() as banks:
        evaluate(run.model, run.stores.validation, config, group=run.group)
    traffic = run.trainer.step(4).traffic
    optimizer = run.trainer.engine.optimizer
    masters = [part for group in optimizer.param_groups for part in group["params"]]
    moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    return {
        "backbone partition": partitioned_bytes(run.model.backbone),
        "SideNet": sum(parameter.nbytes for parameter in run.model.sidenet.parameters()),
        "optimizer": sum(t.nbytes for t in (*masters, *moments)),
        "memory bank": bank_bytes(run.bank),
        "evaluation's memory": max(banks),
        "traffic": traffic,
        "sent": in_a_step,
    }


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts, while it is open, the bytes that DeepSpeed's engines send: the same reckoning as the plan's."""
    sent = {"all-gather": 0, "all-reduce": 0}
    others, gather, reduce = int(os.environ["WORLD_SIZE"]) - 1, dist.all_gather_into_tensor, dist.all_reduce

    def all_gather(output_tensor: Any, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["all-gather"] += others * input_tensor.nbytes
        return gather(output_tensor, input_tensor, *args, **kwargs)

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["all-reduce"] += 2 * others * tensor.nbytes // (others + 1)
        return reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed takes one of them when it starts, and the other where it joins several into one.
        patch.setattr(dist, "all_gather_into_tensor", all_gather)
        patch.setattr(dist.distributed_c10d, "all_gather_into_tensor", all_gather)
        patch.setattr(dist, "all_reduce", all_reduce)
        yield sent


def is_of_engine(traffic: Traffic) -> bool:
    """Whether DeepSpeed sends it."""
    return traffic.purpose.startswith(("backbone", "SideNet"))


def check_reads(found: Mapping[str, int], plan: Plan) -> None:
    """Compares what reading memory sent with the plan: to the byte, or with a bound (test_sharded_read.py has those
    to the byte)."""
    planned = {t.purpose: t for t in plan.traffic if not is_of_engine(t)}
    assert set(found) <= planned.keys() <= {*found, "ties"}  # equal scores may happen to be none
    for purpose, num_bytes in found.items():
        expected = planned[purpose]
        assert 0 < num_bytes <= expected.num_bytes if expected.at_most else num_bytes == expected.num_bytes, purpose


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "group of 2"])
def measured(
    request, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Config, list[Any]]]:
    config = tiny_run.config(tmp_path_factory.mktemp("plan") / "run", memory={"group_size": request.param})
    yield config, run_ranks(two_engines, 2, config, init_process_group=False)


def test_bytes_are_what_the_ranks_hold(measured):
    from pipeline.planning.plan import make_plan
    from pipeline.planning.shapes import read_shape

    config, ranks = measured
    plan = make_plan(config, read_shape(config.backbone.path), world_size=2)
    for found in ranks:
        for name in ("memory bank", "SideNet"):
            assert found[name] == plan.part(name).num_bytes
        for name in ("backbone partition", "optimizer"):
            assert found[name] == pytest.approx(plan.part(name).num_bytes, rel=TOLERANCE)
    # Of the only pair of documents a second group has none.
    held = plan.part("evaluation's memory").num_bytes
    assert [found["evaluation's memory"] for found in ranks] == (
        [held, held] if config.memory.group_size == 2 else [held, 0]
    )


def test_traffic_is_what_the_ranks_send(measured):
    from pipeline.planning.plan import make_plan
    from pipeline.planning.shapes import read_shape

    config, ranks = measured
    plan = make_plan(config, read_shape(config.backbone.path), world_size=2)
    engines = {
        kind: sum(t.num_bytes for t in plan.traffic if is_of_engine(t) and t.collective == kind)
        for kind in ("all-gather", "all-reduce")
    }
    for found in ranks:
        check_reads(found["traffic"], plan)
        assert found["sent"] == pytest.approx(engines, rel=TOLERANCE)


@pytest.mark.parametrize("name", READS)
def test_memory_traffic_is_what_is_counted(name):
    from pipeline.planning.plan import make_plan
    from pipeline.planning.shapes import shape_of

    case = Case(sections=READS[name], steps=2)
    sections = {key: dict(value) for key, value in case.sections.items()}
    sections["train"] = {"segment_tokens": 16, "segments_per_step": 4}
    sections["memory"] = {**sections.get("memory", {}), "group_size": 2}
    config = tiny_config(**sections, data={"lanes": case.lanes})
    plan = make_plan(config, shape_of(tiny_model(case.family).config), world_size=2)
    for found in run_ranks(train, 2, case, 2):
        check_reads(found.traffic, plan)
