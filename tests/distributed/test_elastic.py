"""Going on with other numbers of ranks and other memory groups: the losses are those of the run that never stopped.

And what comes out of it: weights that are exported from the checkpoints of any of these worlds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.schema import Config
from pipeline.face import LongMemForCausalLM
from pipeline.face.export import export
from pipeline.metrics.record import read_metrics
from pipeline.model.load import load_longmem
from tests.distributed.elastic_runs import SEGMENT, Trained, die_while_converting, logits_of, tokens_of_two, train_all
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny_run import TinyRun

pytestmark = pytest.mark.timeout(600)  # one fixture trains everything: two minutes of one core's work
TOLERANCE = 1e-5  # float32, nats; sums over ranks and shards are taken in another order
FACE_TOLERANCE = 1e-5  # what an export promises
LOGITS_TOLERANCE = 1e-4  # float32 logits of order 10, from weights that are whole instead of partitioned
EXACT = ("step", "loss", "grad_norm", "learning_rate", "memory_fill", "gate_mean", "memory_share", "tokens")
WORLDS, STOPS = (1, 2, 4, 2, 2), (3, 5, 7, 8, 10)  # ranks of each leg of a run, and its last step
SAVE, REPLAY = "save", "replay"


@dataclass(frozen=True)
class Case:
    """A run that moves from world to world.

    Attributes:
        profile: Of the tiny run.
        group_sizes: Of each leg; the last two legs have as many ranks.
        memory: `checkpoint.memory` of each leg.
        scope: `memory.scope`.
        mixture: Whether two sources are read.
    """

    profile: str
    group_sizes: tuple[int, ...]
    memory: tuple[str, ...]
    scope: str = "lane"
    mixture: bool = False


CASES: Mapping[str, Case] = {
    "paper_save": Case("paper", (1, 2, 2, 1, 2), (SAVE,) * 5),
    "document_replay": Case("deep", (1, 2, 4, 2, 1), (REPLAY,) * 5, scope="document", mixture=True),
    # Always one group: another number would share banks otherwise.
    "group_both": Case("deep", (1, 2, 4, 2, 2), (REPLAY, SAVE, SAVE, REPLAY, SAVE), scope="group"),
}


class Runs:
    """All runs, leg by leg.

    Args:
        tiny_run: What they read.
        folder: Where they write; with characters that a path may have.
    """

    def __init__(self, tiny_run: TinyRun, folder: Path) -> None:
        self.tiny_run, self.folder = tiny_run, folder
        self.trained: dict[tuple[str, int], Trained] = {}

    def config(self, name: str, case: Case, leg: int, *, group_size: int | None = None, **changes: Any) -> Config:
        """Settings of a leg."""
        return self.tiny_run.config(
            self.folder / name,
            profile=case.profile,
            data=self.tiny_run.mixture if case.mixture else {},
            # 152 tokens: no whole number of segments of 16, and forgotten from step 3 on.
            memory={"tokens": 152, "scope": case.scope, "group_size": group_size or case.group_sizes[leg]},
            train={"steps": STOPS[-1], "stop_after_steps": STOPS[leg], "segments_per_step": 4, **changes},
            checkpoint={"every_steps": 0, "memory": case.memory[leg], "keep": 9},
        )

    def unbroken(self, name: str) -> Config:
        """Settings of a run on one rank that never stops."""
        return self.config(f"{name}_unbroken", CASES[name], len(STOPS) - 1, group_size=1)

    def train(self, leg: int, more: Mapping[str, Config] | None = None) -> None:
        """Trains a leg of every case, then more runs, each rank in one process."""
        wanted = {name: self.config(name, case, leg) for name, case in CASES.items()} | dict(more or {})
        found = run_ranks(train_all, WORLDS[leg], list(wanted.values()), init_process_group=False, timeout_s=240)
        self.trained |= {(name, leg): trained for name, trained in zip(wanted, found[0], strict=True)}

    def weights_and_logits(self, name: str, leg: int, *, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
        """Exports the checkpoint of a leg, and makes a model of it again."""
        output = self.folder / f"exported_{name}_{leg}"
        export(self.folder / name / "checkpoints" / f"step_{STOPS[leg]:08d}", output)
        backbone = AutoModelForCausalLM.from_pretrained(self.tiny_run.backbone, dtype=dtype)
        model = load_longmem(output, backbone=backbone)
        model.sidenet.to(dtype)
        return load_file(output / "model.safetensors"), logits_of(model)


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every case, moved from world to world and unbroken; runs that are killed, refused, or go on where they were."""
    runs = Runs(tiny_run, tmp_path_factory.mktemp("elastic [c++]"))
    paper = CASES["paper_save"]
    whole = {f"{name}_unbroken": runs.unbroken(name) for name in CASES}
    runs.train(0, whole)
    moved_on = runs.config("killed", paper, 1)
    first = runs.folder / "paper_save" / "checkpoints" / "step_00000003"
    moved_on = moved_on.model_copy(update={"run": moved_on.run.model_copy(update={"resume": str(first)})})
    with pytest.raises(RanksFailedError, match="rank 0 died without a word, exit code -9"):
        run_ranks(die_while_converting, 2, moved_on, init_process_group=False)
    left = {path.name for path in (runs.folder / "killed").iterdir()}
    assert ".universal" in left and "config.yaml" not in left
    stopping = Case("paper", (2,) * 5, (REPLAY,) * 5)
    two = {
        "killed": moved_on,
        "two_unbroken": runs.config("two_unbroken", stopping, 3),
        "two_stopped": runs.config("two_stopped", stopping, 0),
        "two_resumed": runs.config("two_stopped", stopping, 3),
        "bf16": runs.config("bf16", stopping, 1, precision="bf16"),
    }
    runs.train(1, two)
    runs.train(2)
    runs.train(3, {"group_refused": runs.config("group_both", CASES["group_both"], 4, group_size=1)})
    runs.train(4)
    return runs


@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_those_of_the_unbroken_run(runs: Runs, name: str) -> None:
    unbroken, moved = read_metrics(runs.folder / f"{name}_unbroken"), read_metrics(runs.folder / name)
    assert len(unbroken) == STOPS[-1] and len({record["loss"] for record in unbroken}) == STOPS[-1]
    for key in ("step", "tokens", "learning_rate", "memory_fill"):
        assert [record[key] for record in moved] == [record[key] for record in unbroken], key
    got, expected = ([record["loss"] for record in records] for records in (moved, unbroken))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    # Every leg went on from the end of the one before: a checkpoint that is passed over is put aside, and then removed.
    kept = [path.name for path in sorted((runs.folder / name / "checkpoints").glob("step_*"))]
    assert kept == [f"step_{step:08d}" for step in STOPS]


def test_memory_that_is_read_again_goes_on_bit_for_bit(runs: Runs) -> None:
    whole, stopped = (
        [tuple(record[key] for key in EXACT) for record in read_metrics(runs.folder / name)]
        for name in ("two_unbroken", "two_stopped")
    )
    assert whole == stopped
    files = [path.name for path in (runs.folder / "two_stopped" / "checkpoints" / "step_00000003").rglob("*")]
    assert "memory" in files and "rank_00000.json" in files and "rank_00000.safetensors" in files
    assert not list((runs.folder / "two_stopped" / "checkpoints" / "step_00000003" / "memory").iterdir())


def test_a_start_that_was_killed_while_it_converted_costs_nothing(runs: Runs) -> None:
    killed, moved = read_metrics(runs.folder / "killed"), read_metrics(runs.folder / "paper_save")
    assert [record["loss"] for record in killed] == [record["loss"] for record in moved[3:5]]
    assert not (runs.folder / "killed" / ".universal").exists()
    assert not (runs.folder / "paper_save" / ".universal").exists()


def test_another_number_of_groups_is_refused_where_their_lanes_share_a_bank(runs: Runs) -> None:
    refusal = runs.trained["group_refused", 3].refusal
    assert refusal is not None
    words = "memory groups (the lanes of one share a bank, as memory.scope is 'group')"
    assert f"got: {words} 1; expected: {words} 2; do: start with" in refusal


@pytest.mark.parametrize("leg", [0, 1, 2])
@pytest.mark.parametrize("name", ["paper_save", "document_replay"])
def test_exported_weights_are_those_that_were_trained(runs: Runs, name: str, leg: int) -> None:
    weights, logits = runs.weights_and_logits(name, leg, dtype=torch.float32)
    trained = runs.trained[name, leg]
    assert weights.keys() == trained.weights.keys()
    assert all(torch.equal(weights[key], trained.weights[key]) for key in weights)
    torch.testing.assert_close(logits, trained.logits, rtol=0, atol=LOGITS_TOLERANCE)
    model = LongMemForCausalLM.from_pretrained(runs.folder / f"exported_{name}_{leg}")
    with torch.no_grad():
        logits = model(tokens_of_two()).logits[:, SEGMENT:]
    torch.testing.assert_close(logits, trained.logits, rtol=0, atol=FACE_TOLERANCE)
    other = runs.trained[name, 0 if leg else 1].logits
    assert not torch.allclose(logits, other, rtol=0, atol=100 * LOGITS_TOLERANCE)


def test_exported_weights_of_bf16_are_the_master_weights(runs: Runs) -> None:
    weights, logits = runs.weights_and_logits("bf16", 1, dtype=torch.bfloat16)
    trained = runs.trained["bf16", 1]
    for key, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), trained.weights[key])
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
    torch.testing.assert_close(logits, trained.logits)
