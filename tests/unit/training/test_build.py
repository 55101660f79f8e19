"""What is checked before any weight is loaded: settings against data and backbone."""

from __future__ import annotations

import logging
import shutil

import pytest

from pipeline.checkpoint.folder import Checkpoints
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.training.build import check_inputs, check_positions, find_checkpoint
from pipeline.training.engines import check_precision
from tests.accelerator import accelerator_with
from tests.tiny_models import tiny_model
from tests.tiny_run import TRAIN_TOKENS, save_store
from tests.tiny_tokenizer import save_tiny_tokenizer


def test_a_good_run_gets_both_splits(tiny_run, tmp_path):
    stores = check_inputs(tiny_run.config(tmp_path))
    assert [store.num_documents for store in stores.train] == [len(TRAIN_TOKENS)]
    assert [store.num_documents for store in stores.validation] == [4]


def test_without_validation_there_is_a_warning(tiny_run, tmp_path, caplog):
    data = save_store(tmp_path / "data", {"train": TRAIN_TOKENS}, tokenizer_from=tiny_run.backbone)
    with caplog.at_level(logging.WARNING):
        assert check_inputs(tiny_run.config(tmp_path, data={"path": str(data)})).validation == []
    assert "has no validation split: there will be no held-out evaluation" in caplog.text


def test_a_mixture_has_a_store_for_each_source_and_held_out_documents_of_those_that_have_any(
    tiny_run, tmp_path, caplog
):
    stores = check_inputs(tiny_run.config(tmp_path, data=tiny_run.mixture))
    assert [store.path for store in stores.train] == [tiny_run.data, tiny_run.more] and stores.shares == [0.6, 0.4]
    assert [store.path for store in stores.validation] == [tiny_run.data, tiny_run.more]
    assert "validation split" not in caplog.text
    bare = save_store(tmp_path / "bare", {"train": TRAIN_TOKENS}, tokenizer_from=tiny_run.backbone)
    sources = [{"path": str(bare)}, {"path": str(tiny_run.more)}]
    stores = check_inputs(tiny_run.config(tmp_path, data={"path": None, "sources": sources}))
    assert [store.path for store in stores.validation] == [tiny_run.more] and len(stores.opened) == 3
    assert f"{bare} has no validation split" in caplog.text


@pytest.mark.parametrize(
    ("lengths", "lanes", "words"),
    [
        ((90, 90), 4, "more lanes than documents .*; got: data.lanes 4, 2 documents of {bad}; do: lower data.lanes to"),
        ((90, 90, 3, 90), 2, "1 of 4 documents are shorter than a chunk .*; got: {bad}, the shortest has 3 tokens"),
    ],
)
def test_a_source_whose_documents_do_not_do_is_named(tiny_run, tmp_path, lengths, lanes, words):
    bad = save_store(tmp_path / "bad", {"train": lengths}, tokenizer_from=tiny_run.backbone)
    sources = [{"path": str(tiny_run.data)}, {"path": str(bad)}]
    with pytest.raises(DataError, match=words.format(bad=bad)):
        check_inputs(tiny_run.config(tmp_path, data={"path": None, "sources": sources, "lanes": lanes}))


def test_a_source_of_another_tokenizer_or_that_is_not_there_is_named(tiny_run, tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer", 260)
    other = save_store(tmp_path / "other", {"train": TRAIN_TOKENS}, tokenizer_from=tmp_path / "tokenizer")
    for path, words in ((other, f"store {other} was made with another tokenizer"), ("/none", "not exist; got: /none")):
        sources = [{"path": str(tiny_run.data)}, {"path": str(path)}]
        with pytest.raises(DataError, match=words):
            check_inputs(tiny_run.config(tmp_path, data={"path": None, "sources": sources}))


def test_every_source_is_verified_and_watched(tiny_run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny_run.data, tmp_path / name)
    sources = [{"path": str(tmp_path / "one")}, {"path": str(tmp_path / "two")}]
    stores = check_inputs(tiny_run.config(tmp_path, data={"path": None, "sources": sources}))
    stores.verify()
    stores.check_unchanged()
    (arrow,) = (tmp_path / "two" / "train").glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    with pytest.raises(DataError, match="two.* has changed since it was opened"):
        stores.check_unchanged()
    with pytest.raises(DataError, match="two"):
        stores.verify()


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


def test_a_checkpoint_of_other_sources_or_weights_is_refused_early(tiny_run, tmp_path):
    def config(*sources):
        listed = [{"path": str(path), "weight": weight} for path, weight in sources]
        return tiny_run.config(tmp_path, data={"path": None, "sources": listed}, run={"resume": str(saved)})

    def find(config):
        return find_checkpoint(config, tmp_path, data=check_inputs(config).identity)

    saved, data, more = tmp_path / "unknown", tiny_run.data, tiny_run.more
    identity = check_inputs(config((data, 3), (more, 2))).identity
    found = {"precision": "fp32", "memory": True, "segments_per_step": 2, **identity}
    (tmp_path / "run").mkdir()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=1, group_size=1, identity=found)
    saved = checkpoints.save(3, [Nothing()])  # type: ignore[list-item]
    checkpoints.publish_if_written(wait=True)
    assert find(config((data, 3), (more, 2))) == find(config((data, 6), (more, 4))) == saved
    shares = r"got: shares of data.sources \[0.6, 0.4\]; expected: shares of data.sources \[0.5, 0.5\]; do: start with"
    with pytest.raises(CheckpointError, match=f"belongs to another run; {shares}"):
        find(config((data, 1), (more, 1)))
    for sources in (((more, 3), (data, 2)), ((data, 1),)):
        with pytest.raises(CheckpointError, match="belongs to another run; got: token store .*; do: start with"):
            find(config(*sources))
