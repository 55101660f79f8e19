"""Exports: whole or absent, of checkpoints that are whole, and a model again beside the right backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.export import export
from pipeline.errors import BackboneError, CheckpointError
from pipeline.model.load import load_longmem
from tests.tiny_checkpoint import save_checkpoints, trained_longmem
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import tiny_model

FILES = ["config.yaml", "export.json", "model.safetensors"]


@pytest.fixture
def tiny() -> TinyLongMem:
    """A trained LongMem: its weights are not those of its backbone."""
    return trained_longmem()


@pytest.fixture
def run(tiny: TinyLongMem, tmp_path: Path) -> Path:
    """A run folder with two checkpoints of it."""
    return save_checkpoints(tiny, tmp_path / "run")


def test_the_newest_checkpoint_of_a_run_or_the_one_that_is_named(run, tmp_path):
    assert export(run, tmp_path / "newest").name == "step_00000007"
    assert export(run / "checkpoints" / "step_00000004", tmp_path / "deep" / "older").name == "step_00000004"
    for folder, step in ((tmp_path / "newest", 7), (tmp_path / "deep" / "older", 4)):
        assert sorted(path.name for path in folder.iterdir()) == FILES
        assert json.loads((folder / "export.json").read_text())["step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "newest", "run"]


def test_an_exported_model_is_the_trained_one(tiny, run, tmp_path):
    export(run, tmp_path / "out")
    loaded, tokens, documents = load_longmem(tmp_path / "out", backbone=tiny_model("llama")), tiny_tokens((2, 16)), None
    documents = torch.zeros_like(tokens)
    with torch.no_grad():
        logits = loaded.logits(loaded.hidden(loaded.encode(tokens, documents), None))
    assert torch.equal(logits, tiny.logits(tokens, memory=False))
    assert loaded.settings == tiny.config.model
    untrained = TinyLongMem(tiny_model("llama"), lanes=2, sidenet=tiny.config.sidenet.model_dump())
    assert not torch.allclose(logits, untrained.logits(tokens, memory=False), atol=0.01)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_nothing_is_overwritten(run, tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="output exists already; nothing was written; got: .*/out; do: name a new"
    ):
        export(run, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused_and_nothing_written(run, tmp_path):
    weights = run / "checkpoints" / "step_00000007" / "sidenet" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="step_00000007 is corrupt; got: sidenet/model.safetensors has another hash"
    ):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint; got: .*; expected: a folder step_.*do: name one"):
        export(tmp_path, tmp_path / "out")


def test_a_run_or_a_checkpoint_is_a_model_in_one_call(tiny, run, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "backbone")
    tokens = tiny_tokens((2, 16))
    documents = torch.zeros_like(tokens)
    for source in (run, run / "checkpoints" / "step_00000004"):
        loaded = load_longmem(source, backbone=str(tmp_path / "backbone"))
        with torch.no_grad():
            logits = loaded.logits(loaded.hidden(loaded.encode(tokens, documents), None))
        torch.testing.assert_close(logits, tiny.logits(tokens, memory=False), atol=0, rtol=0)
    with pytest.raises(BackboneError, match=r"backbone.path '/no/such/backbone' \(which does not exist"):
        load_longmem(run, backbone="/no/such/backbone")
    with pytest.raises(CheckpointError, match="no checkpoint; got: "):
        load_longmem(tmp_path / "backbone", backbone=tiny_model("llama"))


def test_weights_of_another_backbone_are_refused(run, tmp_path):
    export(run, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="trained beside another backbone; got: [0-9a-f]{64}; expected: .*do: load"
    ):
        load_longmem(tmp_path / "out", backbone=tiny_model("gpt2"))


def test_a_folder_that_is_no_export_is_refused(run, tmp_path):
    export(run, tmp_path / "out")
    weights, about = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "export.json"
    whole = about.read_text()
    for content in ("{", "[]", '{"step": 3}'):
        about.write_text(content)
        with pytest.raises(CheckpointError, match="holds no LongMem; got: .*export.json: .*Error.*expected: .*do"):
            load_longmem(tmp_path / "out", backbone=tiny_model("llama"))
    about.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="holds no LongMem; got: .*SafetensorError"):
        load_longmem(tmp_path / "out", backbone=tiny_model("llama"))


def test_weights_that_do_not_fit_their_settings_are_refused(run, tmp_path):
    export(run, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    fewer = load_file(weights)
    del fewer["norm.weight"]
    save_file(fewer, weights)
    with pytest.raises(CheckpointError, match=r"do not fit its settings .*; got: norm.weight: None \(1 in all\); exp"):
        load_longmem(tmp_path / "out", backbone=tiny_model("llama"))
