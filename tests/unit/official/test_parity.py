"""The authors' code and this project give the same, with small random weights (`tests/official.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.model import ModelSettings
from pipeline.distributed.groups import MemoryGroup
from pipeline.memory.exchange import exchange_of
from pipeline.model.longmem import LongMem
from pipeline.official.convert import build_model
from pipeline.official.layout import Sizes
from tests import official
from tests.official import EXACT, FILLED, LOGITS, REDUCED, Record, bound_of, replay
from tests.ranks import run_ranks

FULL = os.environ.get("LONGMEM_OFFICIAL_RECORD", "")
"""The whole record of 5.9 MB, if somebody has it."""
RECORDS = [REDUCED, pytest.param(Path(FULL), marks=pytest.mark.skipif(not FULL, reason="no LONGMEM_OFFICIAL_RECORD"))]


@pytest.fixture(scope="module", params=RECORDS, ids=["reduced", "full"])
def record(request: pytest.FixtureRequest) -> Record:
    return Record.read(request.param)


@pytest.mark.parametrize("case", FILLED)
def test_every_recorded_quantity(record: Record, case: str) -> None:
    found = replay(record, record.model(), case)
    assert len(found) == len(FILLED[case])
    compared = {name for of_segment in found.values() for name in of_segment}
    assert compared >= {"logits", "knn_slots", "mem_fused", "side_layer2_out"}, "else nothing was compared"
    if case == "b1":
        assert compared >= {"mem_ln1_out", "mem_local_out", "mem_memory_out", "final_norm_out", "backbone_k5"}
        assert compared >= {f"side_layer{layer}_out" for layer in range(4)}
    for segment, differences in found.items():
        for name, difference in differences.items():
            assert difference <= bound_of(name, segment), (segment, name)


def test_with_what_was_in_their_bank(record: Record) -> None:
    """Then no number is stored as another one of fp16, and memory is as exact as the rest."""
    for segment, differences in replay(record, record.model(), "b1", writes_recorded=True).items():
        for name, difference in differences.items():
            assert difference <= bound_of(name, segment, writes_recorded=True), (segment, name)


def test_the_backbone_alone(record: Record) -> None:
    model = record.model().backbone.model
    segments = [segment for segment in (0, 5) if record.given("b1", segment, "backbone_logits") is not None]
    assert segments
    for segment in segments:
        with torch.no_grad():
            found = model(record.tokens("b1", segment), output_hidden_states=True)
        for name, got in [("logits", found.logits), *((f"hidden{i}", x) for i, x in enumerate(found.hidden_states))]:
            expected = record.given("b1", segment, f"backbone_{name}")
            assert expected is not None
            assert float((got[:, -expected.shape[1] :] - expected).abs().max()) <= EXACT, name


def replay_in_a_group(case: str) -> dict[int, dict[str, float]]:
    """Runs on every rank."""
    record = Record.read()
    group = MemoryGroup.build(2, timeout_s=60)
    return replay(record, record.model(), case, exchange=exchange_of(group.process_group))


@pytest.mark.parametrize("case", FILLED)
def test_a_bank_of_two_ranks(case: str) -> None:
    ranks = run_ranks(replay_in_a_group, 2, case)
    found = {segment: differences for rank in ranks for segment, differences in rank.items()}
    assert sorted(found) == list(range(len(FILLED[case])))
    for segment, differences in found.items():
        assert {"logits", "mem_fused"} <= differences.keys()
        for name, difference in differences.items():
            assert difference <= bound_of(name, segment), (segment, name)


def _changed(record: Record, **sections: Mapping[str, Any]) -> LongMem:
    """The model with some settings changed."""
    longmem = record.longmem()
    sizes = Sizes.of(record.backbone(), longmem)
    built = build_model(sizes, longmem, more=sections)
    settings = built.longmem.settings.model_dump()
    settings["memory"]["scope"] = sections.get("memory", {}).get("scope", "group")
    return LongMem(ModelSettings.model_validate(settings), built.longmem.backbone, built.longmem.sidenet)


def _flipped(record: Record) -> LongMem:
    model = record.model()
    (fusion,) = model.sidenet.fusions.values()
    with torch.no_grad():
        fusion.gate.neg_()
    return model


def _other_backbone_epsilon(record: Record) -> LongMem:
    model = record.model()
    for module in model.backbone.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    return model


MISTAKES: Mapping[str, Callable[[Record], LongMem]] = {
    "sign of the gate": _flipped,
    "epsilon of the SideNet": lambda record: _changed(record, sidenet={"norm_epsilon": 1e-6}),
    "epsilon of the backbone": _other_backbone_epsilon,
    "gelu of the SideNet": lambda record: _changed(record, sidenet={"activation": "gelu_new"}),
    "last residual": lambda record: _changed(record, sidenet={"residual": "paper"}),
    "store in fp32": lambda record: _changed(record, memory={"dtype": "fp32"}),
    "store in bf16": lambda record: _changed(record, memory={"dtype": "bf16"}),
    "means of rounded keys": lambda record: _changed(record, memory={"chunk_keys": "stored"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str) -> None:
    record = Record.read()
    found = replay(record, MISTAKES[mistake](record), "b1")
    assert any(
        difference > bound_of(name, segment)
        for segment, differences in found.items()
        for name, difference in differences.items()
    )


def test_a_bank_of_each_row_shows() -> None:
    record = Record.read()
    found = replay(record, _changed(record, memory={"scope": "lane"}), "b2")
    assert max(differences["logits"] for differences in found.values()) > 100 * LOGITS


def test_forgetting_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record.read()
    monkeypatch.setattr(official, "visible", lambda *args, **kwargs: None)
    found = replay(record, record.model(), "b1")
    assert max(differences["logits"] for differences in found.values()) > 100 * LOGITS
