"""The two engines on two ranks: what each holds, what they compute, and that frozen means frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.backbone.backbone import identity
from pipeline.config.schema import Config
from tests.ranks import run_ranks
from tests.shards import in_slot_order
from tests.tiny_run import VOCABULARY, TinyRun

TOLERANCE = 1e-4  # float32 logits of order 10, summed in another order
STEPS = 4
SHAPE = (2, 24)  # tokens that all ranks encode alike


def probe() -> torch.Tensor:
    return torch.randint(VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(1))


def two_engines(config: Config) -> dict[str, Any]:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from pipeline.data.lanes import Lanes
    from pipeline.training.build import build_run
    from pipeline.training.engines import made_whole
    from pipeline.training.loop import train
    from tests.distributed.engine_runs import partitioned_bytes

    torch.set_float32_matmul_precision("high")  # as a container may
    run = build_run(config)
    assert torch.get_float32_matmul_precision() == "highest", "float32 products are to be float32's"
    assert run.bank is not None
    model, tokens = run.model, probe()
    backbone_engine: Any = model._encode
    backbone: list[Any] = list(model.backbone.parameters())
    documents = torch.zeros_like(tokens)

    def logits(*, with_backbone_only: bool) -> torch.Tensor:
        encoding = model.encode(tokens, documents)
        if with_backbone_only:
            return -model.backbone_losses(encoding, tokens)
        return model.logits(model.hidden(encoding, None))

    def weights() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.sidenet.named_parameters()}

    result: dict[str, Any] = {
        "logits": logits(with_backbone_only=False),
        "backbone_before": logits(with_backbone_only=True),
        "held": partitioned_bytes(model.backbone),
        "whole": sum(parameter.ds_numel * parameter.element_size() for parameter in backbone),
        "resting": sum(parameter.numel() for parameter in backbone),
        "identity_before": identity(model.backbone.model, made_whole=made_whole),
        "weights_before": weights(),
        "optimizer_of_backbone": isinstance(backbone_engine.optimizer, DeepSpeedZeroOptimizer_Stage3),
        "optimizer_numbers": sum(p.numel() for g in run.trainer.engine.optimizer.param_groups for p in g["params"]),
    }
    remembered = []
    step = run.trainer.step

    def step_and_look(number: int, **kwargs: Any) -> Any:
        record = step(number, **kwargs)
        if number == 1:
            remembered.append(in_slot_order(run.bank))  # type: ignore[arg-type]
        return record

    run.trainer.step = step_and_look  # type: ignore[method-assign]
    train(run)
    again, lanes = model.bank(run.bank.shape.num_lanes), run.trainer.lanes
    fresh = Lanes(
        list(run.stores.train), num_lanes=config.data.lanes, lanes=lanes.lanes, segment_tokens=16, seed=config.run.seed
    )
    for _ in range(config.train.segments_per_step):
        segment = fresh.next_segment()
        of_tokens = torch.from_numpy(segment.documents)
        encoding = model.encode(torch.from_numpy(segment.tokens), of_tokens)
        model.append(again, encoding, start=segment.start, documents=of_tokens)
    return {
        **result,
        "backbone_after": logits(with_backbone_only=True),
        "identity_after": identity(model.backbone.model, made_whole=made_whole),
        "weights_after": weights(),
        "remembered": remembered[0],
        "encoded_again": in_slot_order(again),
        "lanes": lanes.lanes,
    }


@pytest.fixture(scope="module")
def ranks(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    # Nothing of the tiny model is so large that DeepSpeed would partition it unasked.
    shipped = json.loads(Path("ds_configs/backbone_zero3_inference.json").read_text())
    shipped["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(shipped))
    config = tiny_run.config(folder / "run", backbone={"deepspeed": str(folder / "zero3.json")}, train={"steps": STEPS})
    return run_ranks(two_engines, 2, config, init_process_group=False)


def test_each_rank_holds_half_of_the_backbone(ranks, tiny_run):
    model = AutoModelForCausalLM.from_pretrained(tiny_run.backbone)
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for found in ranks:
        assert found["whole"] == whole
        assert found["held"] == pytest.approx(whole / 2, rel=0.01)  # uneven parameters are padded
        assert found["resting"] == 0  # nothing stays whole after a forward pass
    assert not any(found["optimizer_of_backbone"] for found in ranks)


def test_the_optimizer_is_split(ranks):
    trained = sum(weight.numel() for weight in ranks[0]["weights_before"].values())
    for found in ranks:
        assert found["optimizer_numbers"] == pytest.approx(trained / 2, rel=0.02)


def test_before_training_the_logits_are_the_models(ranks, tiny_run):
    model = AutoModelForCausalLM.from_pretrained(tiny_run.backbone)
    with torch.no_grad():
        expected = model(probe()).logits
    for found in ranks:
        torch.testing.assert_close(found["logits"], expected, atol=TOLERANCE, rtol=0)


def test_training_changes_no_byte_of_the_backbone(ranks, tiny_run):
    expected = identity(AutoModelForCausalLM.from_pretrained(tiny_run.backbone))
    for found in ranks:
        assert found["identity_before"] == found["identity_after"] == expected
        assert torch.equal(found["backbone_before"], found["backbone_after"])


def test_memory_of_step_one_equals_memory_encoded_again_at_the_end(ranks):
    assert [found["lanes"] for found in ranks] == [(0, 1), (2, 3)]
    for found in ranks:
        first, again = found["remembered"], found["encoded_again"]
        assert first.keys() == again.keys() and len(first["slots"]) == 8
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(ranks[0]["remembered"]["keys.0"], ranks[1]["remembered"]["keys.0"])


def test_training_changes_every_weight_of_the_sidenet_alike_on_all_ranks(ranks):
    for name, before in ranks[0]["weights_before"].items():
        after = ranks[0]["weights_after"][name]
        assert not torch.equal(before, after), name
        assert torch.equal(ranks[1]["weights_before"][name], before)
        assert torch.equal(ranks[1]["weights_after"][name], after)


def test_gates_move_more_than_weights(ranks):
    moved = {
        name: float((ranks[0]["weights_after"][name] - before).abs().mean())
        for name, before in ranks[0]["weights_before"].items()
    }
    gates = [value for name, value in moved.items() if name.startswith("memory.")]
    weights = [value for name, value in moved.items() if not name.startswith("memory.")]
    assert len(gates) == 4 and min(gates) > 2 * sum(weights) / len(weights)
