"""Efficiency: what is read are the losses that it must be, growth has closed forms, and what is left out is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.cost import Cost, exponent, read_in_segments, read_with_full_attention, slope
from eval.efficiency_report import FORWARD, FULL, LONGMEM, TRAINING, efficiency_section
from eval.model_scorer import ModelScorer
from eval.report import Lines
from eval.runner import EvaluationError
from eval.scorer import MEMORY_ON, How
from eval.task import Given
from eval.tasks import efficiency
from eval.tasks.efficiency import Efficiency, EfficiencyOptions, expected
from pipeline.data.tokenizer import load_tokenizer
from pipeline.memory.room import Room
from pipeline.model.longmem import LongMem, build
from tests.oracle_scorer import OracleScorer
from tests.tiny_config import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

TOLERANCE = 1e-4  # float32 losses
SEGMENT, LENGTH = 16, 96
MEMORY = {"tokens": 64, "position": "clamp:12", "window_tokens": 8, "sink": True}
SIDENET = {"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 1.0}


@pytest.fixture(scope="module")
def given(tiny_run, tmp_path_factory):
    config = tiny_run.config(tmp_path_factory.mktemp("run"))
    return Given(load_tokenizer(tiny_run.backbone), config, longest=128)


def model_of(family="llama", **memory):
    config = tiny_config(backbone={"context_tokens": 8}, memory=MEMORY | memory, sidenet=SIDENET)
    return LongMem(config.model, *build(config.model, tiny_model(family)))


@pytest.fixture(scope="module")
def longmem():
    return model_of()


@pytest.fixture(scope="module")
def text():
    return torch.from_numpy(np.random.default_rng(0).integers(1, VOCABULARY, (1, LENGTH)))


def make(given, longmem, **options):
    """A task whose text has tokens of the tiny model."""
    task = Efficiency(EfficiencyOptions(**options), given)
    items = task.items()
    task._text = task._text % VOCABULARY
    return task, items, ModelScorer(longmem)


class TestReading:
    @pytest.mark.parametrize("trains", [False, True])
    def test_full_attention_gives_the_causal_models_own_losses(self, longmem, text, trains):
        with torch.no_grad():
            logits = longmem.backbone.model(text, use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
        found = read_with_full_attention(longmem, text, trains=trains)
        assert found.shape == (1, LENGTH) and found[0, -1] == 0 and not found.requires_grad
        torch.testing.assert_close(found[0, :-1], wanted, atol=TOLERANCE, rtol=0)

    @pytest.mark.parametrize("trains", [False, True])
    def test_segments_give_the_losses_of_a_document_that_is_followed(self, longmem, text, trains):
        scorer = ModelScorer(longmem)
        how = {"on": How(MEMORY_ON)}
        wanted = scorer.follow([text[0].numpy()], first_scored=0, num_tokens=LENGTH, hows=how)["on"][0]
        found = read_in_segments(longmem, scorer.exchange, text, trains=trains)
        np.testing.assert_allclose(found[0].double().numpy(), wanted, atol=TOLERANCE)

    def test_training_works_out_gradients_and_leaves_no_trace(self, longmem, text, monkeypatch):
        backbone, sidenet = longmem.backbone, longmem.sidenet
        kept = backbone.tap_points, backbone.call_layers, backbone.memory_layers
        frozen = {name: p.requires_grad for name, p in (*backbone.named_parameters(), *sidenet.named_parameters())}
        seen = []
        losses = longmem.losses

        def spied(hidden, targets):
            hidden.register_hook(lambda gradient: seen.append(float(gradient.abs().sum())))
            return losses(hidden, targets)

        monkeypatch.setattr(longmem, "losses", spied)
        read_with_full_attention(longmem, text, trains=True)
        assert len(seen) == 1 and seen[0] > 0
        read_in_segments(longmem, ModelScorer(longmem).exchange, text, trains=True)
        assert len(seen) == 1 + LENGTH // SEGMENT and min(seen) > 0
        assert kept == (backbone.tap_points, backbone.call_layers, backbone.memory_layers)
        assert frozen == {n: p.requires_grad for n, p in (*backbone.named_parameters(), *sidenet.named_parameters())}
        assert all(p.grad is None for p in (*backbone.parameters(), *sidenet.parameters()))

    def test_every_weight_of_every_layer_gets_a_gradient(self, longmem, text, monkeypatch):
        got = set()
        handles = []
        for name, parameter in longmem.backbone.decoder.named_parameters():
            parameter.requires_grad_(True)
            handles.append(parameter.register_hook(lambda gradient, name=name: got.add(name)))
            parameter.requires_grad_(False)
        read_with_full_attention(longmem, text, trains=True)
        for handle in handles:
            handle.remove()
        assert got == {name for name, _ in longmem.backbone.decoder.named_parameters()}

    def test_the_backbone_keeps_nothing_but_its_last_tap(self, longmem, text):
        with longmem.backbone.keeping_nothing():
            encoding = longmem.runs_backbone(text, None)
        assert list(encoding.taps) == [len(longmem.backbone.layers)]
        assert not encoding.calls and not encoding.memory
        assert len(longmem.encode(text, None).memory) == len(longmem.backbone.layers)

    def test_without_memory_segments_are_read_too(self, text):
        longmem = model_of(enabled=False)
        assert read_in_segments(longmem, ModelScorer(longmem).exchange, text)[0, :-1].min() > 0


class TestGrowth:
    @pytest.mark.parametrize("power", [0.5, 1, 2])
    def test_a_power_law_has_its_power(self, power):
        lengths = [512, 1024, 4096]
        assert exponent(lengths, [3 * length**power for length in lengths]) == pytest.approx(power)

    def test_a_parabola_has_its_slope(self):
        lengths = [100, 200, 700]
        assert slope(lengths, [2e-3 * length + 5e-6 * length**2 for length in lengths]) == pytest.approx(5e-6)
        assert slope(lengths, [2e-3 * length for length in lengths]) == pytest.approx(0)

    def test_one_length_says_nothing_of_growth(self):
        assert exponent([512], [1.0]) is None and slope([512], [1.0]) is None

    def test_full_attention_may_take_the_square_of_the_time(self):
        cost = Cost(3.0, 100, 150)
        assert expected(cost, 2.0, is_full=True, is_eager=False) == (12, 100)
        assert expected(cost, 2.0, is_full=True, is_eager=True) == (12, 200)
        assert expected(cost, 2.0, is_full=False, is_eager=True) == (6, 100)
        assert expected(Cost(3.0, None, None), 2.0, is_full=False, is_eager=False) == (6, None)


class TestTask:
    def test_measures_both_in_every_round(self, given, longmem):
        task, items, scorer = make(given, longmem, lengths=(32, 96), rounds=2)
        scores = {item.name: task.score(item, scorer) for item in items}
        assert list(scores) == ["round 0", "round 1"]
        for one in scores.values():
            assert list(one["costs"]) == [FORWARD, TRAINING]
            for systems in one["costs"].values():
                for costs in systems.values():
                    assert list(costs) == ["32", "96"] and all(cost["seconds"] > 0 for cost in costs.values())
        section = task.report(scores)
        assert len(section.tables) == 3 and len(section.plots) == 4 and not section.missing
        assert section.figures["rounds"] == 2
        figures = section.figures[FORWARD][LONGMEM]
        assert figures["tokens_per_second"][96] == 96 / figures["seconds"][96]
        assert not task.deterministic

    def test_turns_are_taken(self, given, longmem, monkeypatch):
        task, items, scorer = make(given, longmem, lengths=(16, 32), rounds=2)
        turns = []
        reader = efficiency._reader

        def noting(scorer, system, mode):
            turns.append((system, mode))
            return reader(scorer, system, mode)

        monkeypatch.setattr(efficiency, "_reader", noting)
        for item in items:
            task.score(item, scorer)
        systems = [system for system, mode in turns if mode == FORWARD][2:]  # the first ones warm up
        assert systems == [FULL, LONGMEM, LONGMEM, FULL, LONGMEM, FULL, FULL, LONGMEM]

    def test_what_would_take_too_long_is_left_out_with_all_that_is_longer(self, given, longmem):
        task, items, scorer = make(given, longmem, lengths=(16, 32, 96), rounds=1, most_seconds=0.0)
        scores = {items[0].name: task.score(items[0], scorer)}
        costs = scores["round 0"]["costs"][FORWARD][FULL]
        assert "seconds" in costs["16"]
        assert "s would be more than efficiency.most_seconds, 0" in costs["32"]["left_out"]
        assert costs["96"]["left_out"] == "so was 32"
        section = task.report(scores)
        assert "backbone, full attention, forward, 96 tokens: so was 32" in section.missing
        assert section.tables[0].rows[1][1:] == ["-"] * 5
        assert section.figures[FORWARD][FULL]["exponent"] is None

    def test_what_does_not_fit_is_left_out(self, given, longmem, monkeypatch):
        monkeypatch.setattr(efficiency, "cost_of", lambda run, device: Cost(0.1, 0, 800))
        monkeypatch.setattr(efficiency, "room_on", lambda device: Room(2000, 4000, "host"))
        task, items, scorer = make(given, longmem, lengths=(16, 32, 48), rounds=1)
        costs = task.score(items[0], scorer)["costs"][TRAINING][FULL]
        # 1,600 bytes are less than nine tenths of 2,000; then three halves of 800 are, too; but not for twice as many.
        assert "left_out" not in costs["32"] and "left_out" not in costs["48"]
        task, items, scorer = make(given, longmem, lengths=(16, 48), rounds=1)
        left_out = task.score(items[0], scorer)["costs"][TRAINING][FULL]["48"]["left_out"]
        assert left_out == "about 0.0 GiB do not fit into the memory that is free"

    def test_where_memory_ends_the_rest_goes_on(self, given, longmem, monkeypatch):
        real = efficiency.read_with_full_attention

        def reads(model, tokens, **kwargs):
            if tokens.shape[1] > 32:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return real(model, tokens, **kwargs)

        monkeypatch.setattr(efficiency, "read_with_full_attention", reads)
        task, items, scorer = make(given, longmem, lengths=(32, 64, 96), rounds=1)
        costs = task.score(items[0], scorer)["costs"][FORWARD]
        assert costs[FULL]["64"] == {"left_out": "there was not enough memory"}
        assert costs[FULL]["96"] == {"left_out": "so was 64"} and "seconds" in costs[LONGMEM]["96"]

    def test_learned_positions_end(self, given):
        longmem = model_of("gpt2")
        task, items, scorer = make(given, longmem, lengths=(128, 144), rounds=1)
        costs = task.score(items[0], scorer)["costs"][FORWARD]
        assert (
            costs[FULL]["144"] == {"left_out": "the backbone has 128 positions"} and "seconds" in costs[LONGMEM]["144"]
        )

    def test_lengths_are_made_whole_segments(self, given, longmem):
        task, items, scorer = make(given, longmem, lengths=(40, 32, 17, 1), rounds=1)
        assert list(task.score(items[0], scorer)["costs"][FORWARD][FULL]) == ["16", "32", "48"]

    def test_nothing_to_measure_is_refused(self, given):
        with pytest.raises(EvaluationError, match="nothing to measure; do: name lengths"):
            Efficiency(EfficiencyOptions(lengths=()), given).items()

    def test_only_a_model_has_a_cost(self, given):
        task = Efficiency(EfficiencyOptions(lengths=(16,)), given)
        with pytest.raises(EvaluationError, match="measures a model itself; got: OracleScorer"):
            task.score(task.items()[0], OracleScorer())


def test_medians_over_rounds_are_reported():
    def cost(seconds, peak):
        return {"seconds": seconds, "before_bytes": 2**20, "peak_bytes": peak * 2**20}

    rounds = [
        {FORWARD: {FULL: {"100": cost(a, 3), "200": cost(4 * a, 9)}, LONGMEM: {"100": cost(2, 2), "200": cost(4, 2)}}}
        for a in (1.0, 2.0, 10.0)
    ]
    section = efficiency_section(rounds, "rule", "cpu", 2)
    first, second = section.tables[0].rows
    assert first == ["100", "50 [10, 100]", "50 [50, 50]", "1.00", "3 (+2)", "2 (+1)"]
    assert second == ["200", "25 [5, 50]", "50 [50, 50]", "2.00", "9 (+8)", "2 (+1)"]
    growth = section.tables[1].rows
    # 20 ms a token, then 40 ms: 20 ms for 100 tokens more, 200 ms for 1,000.
    assert growth[0] == ["backbone, full attention, forward", "2.00", "20,000.0", "+200,000.00"]
    assert growth[1] == ["LongMem, forward", "1.00", "20,000.0", "+0.00"]
    speeds = section.plots[0]
    assert isinstance(speeds, Lines) and speeds.lines["LongMem"] == ([100, 200], [50, 50])
    assert section.missing == ["training: a backbone that is split over ranks cannot be trained"]
