"""A backbone folder that is not what it says is refused in words before it trains as something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.backbone.backbone import identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.errors import BackboneError
from tests.tiny_models import VARIANTS, save_tiny_model

WEIGHTS = "model.safetensors"


def load(folder: Path) -> PreTrainedModel:
    return load_backbone(str(folder), dtype=torch.float32, attention="sdpa")


def check_headers(folder: Path) -> None:
    check_weights(str(folder), read_backbone_config(str(folder)))


CHECKS = (load, check_headers)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_what_was_saved_is_loaded(tmp_path):
    saved = save_tiny_model("llama", tmp_path)
    assert identity(load(tmp_path)) == identity(saved)


@pytest.mark.parametrize("text", [None, "{}", '{"model_type": "nonsense"}', "{", "[" * 3000])
def test_a_folder_that_is_no_model_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        BackboneError, match="the backbone cannot be loaded; got: backbone.path .*; do: set backbone.path"
    ):
        read_backbone_config(str(tmp_path))


@pytest.mark.parametrize("path", ["/nonexistent", "./gone", "models/of/ours", "~/model", "gone/"])
def test_a_path_that_looks_like_one_is_said_not_to_exist(path):
    with pytest.raises(BackboneError, match=rf"got: backbone.path '{re.escape(path)}' \(which does not exist in /"):
        read_backbone_config(path)


def test_a_file_is_no_backbone(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(BackboneError, match=r"model.bin' \(which is a file\); expected: a Hugging Face model folder"):
        read_backbone_config(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(("family", "name"), [("llama", "model.layers.3"), ("gpt2", "transformer.h.3")])
def test_a_config_with_fewer_layers_than_the_weights_is_refused(tmp_path, family, name):
    save_tiny_model(family, tmp_path)
    change_config(tmp_path, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})
    for check in CHECKS:
        with pytest.raises(BackboneError, match=rf"weights of layers that its config.json does not .* with {name}\."):
            check(tmp_path)


def test_weights_of_a_layer_that_the_config_leaves_out_are_refused(tmp_path):
    save_tiny_model("llama", tmp_path)  # it has biases
    change_config(tmp_path, attention_bias=False)
    for check in CHECKS:
        with pytest.raises(BackboneError, match=r"model.layers.0.self_attn.k_proj.bias, .*\(16 in all\); do: put"):
            check(tmp_path)


def test_what_older_versions_stored_beside_the_weights_is_no_weight(tmp_path):
    saved = save_tiny_model("llama", tmp_path)
    change_weights(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    check_headers(tmp_path)
    assert identity(load(tmp_path)) == identity(saved)


def test_other_shapes_are_named(tmp_path):
    save_tiny_model("llama", tmp_path)
    change_config(tmp_path, hidden_size=64)
    words = (
        r"of other shapes than its config.json asks for; got: .*: model.embed_tokens.weight \[96, 32\] "
        r"\(\d+ weights in all\); expected: \[96, 64\]; do: put back the config.json"
    )
    with pytest.raises(BackboneError, match=words):
        check_headers(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_has_the_right_names_and_shapes(tmp_path, variant):
    save_tiny_model(variant, tmp_path)
    check_headers(tmp_path)


def test_names_may_lack_their_first_part(tmp_path):
    save_tiny_model("gpt2", tmp_path)

    def shorten(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_weights(tmp_path, shorten)
    check_headers(tmp_path)
    change_config(tmp_path, n_layer=3)
    with pytest.raises(BackboneError, match=r"does not ask for: .* with h.3.attn.c_attn.bias, h.3.attn.c_attn.weight"):
        check_headers(tmp_path)


def test_a_lacking_weight_is_named(tmp_path):
    save_tiny_model("llama", tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(BackboneError, match=r"lack weights; got: .* without model.layers.2.mlp.up_proj.weight \(1 in"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 4096])
def test_damaged_files_are_refused(tmp_path, content):
    save_tiny_model("llama", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(BackboneError, match=r"weights cannot be loaded; got: backbone.path .*; do: check the folder"):
        load(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(tmp_path, number):
    save_tiny_model("llama", tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = number

    change_weights(tmp_path, spoil)
    with pytest.raises(BackboneError, match=r"not finite; got: 1 of 1536 in model.layers.1.mlp.up_proj.weight; .*do:"):
        identity(load(tmp_path))
