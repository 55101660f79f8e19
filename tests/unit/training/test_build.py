"""What is checked before any weight is loaded: settings against data and backbone."""

from __future__ import annotations

import logging

import pytest

from pipeline.checkpoint.folder import Checkpoints
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.training.build import check_inputs, check_positions, find_checkpoint
from pipeline.training.engines import check_precision
from tests.accelerator import accelerator_with
from tests.tiny_models import tiny_model
from tests.tiny_run import TRAIN_TOKENS, save_store


def test_a_good_run_gets_both_splits(tiny_run, tmp_path):
    stores = check_inputs(tiny_run.config(tmp_path))
    assert [store.num_documents for store in stores.train] == [len(TRAIN_TOKENS)]
    assert [store.num_documents for store in stores.validation] == [4]


def test_without_validation_there_is_a_warning(tiny_run, tmp_path, caplog):
    data = save_store(tmp_path / "data", {"train": TRAIN_TOKENS}, tokenizer_from=tiny_run.backbone)
    with caplog.at_level(logging.WARNING):
        assert check_inputs(tiny_run.config(tmp_path, data={"path": str(data)})).validation == []
    assert "has no validation split: there will be no held-out evaluation" in caplog.text


def test_held_out_documents_must_be_long_enough(tiny_run, tmp_path):
    with pytest.raises(DataError, match=r"long enough to be evaluated; got: .* 101 tokens; expected: 112 tokens; do"):
        check_inputs(tiny_run.config(tmp_path, evaluation={"context_tokens": 80}))


def test_more_lanes_than_documents_are_refused(tiny_run, tmp_path):
    with pytest.raises(DataError, match="more lanes than documents .*do: lower data.lanes to at most 7"):
        check_inputs(tiny_run.config(tmp_path, data={"lanes": 8}))


def test_a_layer_that_is_not_there_is_refused(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path, profile="paper", sidenet={"memory_layers": [3]})
    with pytest.raises(
        ConfigError, match=r"sidenet.memory_layers is \[3\]; expected different SideNet layers from 1 to 2"
    ):
        check_inputs(config)


@pytest.mark.parametrize(("family", "fits"), [("gpt2", False), ("opt", False), ("llama", True), ("bloom", True)])
def test_segment_and_context_must_fit_learned_positions(tiny_run, tmp_path, family, fits):
    backbone = tiny_model(family).config
    config = tiny_run.config(tmp_path, backbone={"context_tokens": 113})  # and 16 of a segment, of 128
    if fits:
        check_positions(config, backbone)
        return
    with pytest.raises(
        ConfigError, match=r"backbone.context_tokens 113 and .* 16 are .*got: 129; expected: at most 128"
    ):
        check_positions(config, backbone)
    check_positions(tiny_run.config(tmp_path, backbone={"context_tokens": 112}), backbone)


def test_fp16_is_refused_where_there_is_none(tiny_run, tmp_path):
    config = tiny_run.config(tmp_path, train={"precision": "fp16"})
    with (
        accelerator_with(fp16=False),
        pytest.raises(ConfigError, match=r"fp16, which this accelerator \(\w+\) does not .*expected: one of fp32"),
    ):
        check_precision(config)
    with accelerator_with(fp16=True):
        check_precision(config)
    check_precision(tiny_run.config(tmp_path))


def test_without_checkpoint_or_with_none_a_run_starts_anew(tiny_run, tmp_path):
    assert find_checkpoint(tiny_run.config(tmp_path), tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001")
    assert find_checkpoint(tiny_run.config(tmp_path, run={"resume": "none"}), tmp_path) is None


class Nothing:
    name = "nothing"

    def least_bytes(self):
        return 0

    def save(self, folder):
        """There is nothing to write."""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"train": {"segments_per_step": 4}},
            "got: segments_per_step 2; expected: segments_per_step 4; do: start with",
        ),
        ({"backbone": {"context_tokens": 8}}, "got: left context 0; expected: left context 8; do: start with"),
        ({"train": {"precision": "bf16"}}, "got: precision 'fp32'; expected: precision 'bf16'; do: start with"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_settings_is_refused_early(tiny_run, tmp_path, overrides, words):
    found = {"precision": "fp32", "memory": True, "segments_per_step": 2}
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, group_size=1, identity=found)
    saved = checkpoints.save(3, [Nothing()])  # type: ignore[list-item]
    checkpoints.publish_if_written(wait=True)
    resume = {"run": {"resume": str(saved)}}
    assert find_checkpoint(tiny_run.config(tmp_path / "other", **resume), tmp_path / "other") == saved
    with pytest.raises(CheckpointError, match=f"belongs to another run; {words}"):
        find_checkpoint(tiny_run.config(tmp_path / "other", **resume, **overrides), tmp_path / "other")
