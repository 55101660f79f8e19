"""A backbone folder that is not what it says is refused in words before it trains as something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.backbone.backbone import identity
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.errors import BackboneError
from pipeline.planning.shapes import read_shape
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
        r"other weights than its config.json asks for; got: .*: model.embed_tokens.weight has the shape \[96, 32\]; "
        r"expected: \[96, 64\]; do: put back the config.json"
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


@pytest.mark.parametrize("kind", ["bin", "bin shards", "shards"])
def test_weights_in_other_files_are_held_against_the_config_too(tmp_path, kind):
    save_tiny_model("llama", tmp_path)
    tensors, file = load_file(tmp_path / WEIGHTS), "model.safetensors" if kind == "shards" else "pytorch_model.bin"
    (tmp_path / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"whole": names} if kind == "bin" else {"one": names[::2], "two": names[1::2]}
    for part, of_part in parts.items():
        content = {name: tensors[name] for name in of_part}
        if kind == "shards":
            save_file(content, tmp_path / part, metadata={"format": "pt"})
            (tmp_path / part).rename(tmp_path / f"{part}.safetensors")
        else:
            torch.save(content, tmp_path / (file if kind == "bin" else f"{part}.bin"))
    if kind != "bin":
        suffix = ".safetensors" if kind == "shards" else ".bin"
        index = {name: f"{part}{suffix}" for part, of_part in parts.items() for name in of_part}
        (tmp_path / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    check_headers(tmp_path)
    change_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(BackboneError, match="does not ask for: .* with model.layers.3"):
        check_headers(tmp_path)


def test_files_that_transformers_does_not_read_do_not_matter(tmp_path):
    save_tiny_model("llama", tmp_path)
    save_file({"model.layers.9.x.weight": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    check_headers(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, {"a": "../x"}, {"a": "gone"}])
def test_an_index_of_something_else_is_refused(tmp_path, weight_map):
    save_tiny_model("llama", tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "x.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BackboneError, match=r"cannot be loaded; got: .*model.safetensors.index.json.*; do: check"):
        check_headers(tmp_path)


def test_a_pickle_of_weights_is_not_executed(tmp_path):
    save_tiny_model("llama", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "made").encode() + b"'\ntR.")
    with pytest.raises(BackboneError, match=r"cannot be loaded; got: .*pytorch_model.bin: "):
        check_headers(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_head_of_its_own_is_not_dropped_for_a_tie(tmp_path):
    save_tiny_model("llama", tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(BackboneError, match=r"the LM head is not the embedding; expected: .* tie_word_embeddings; do:"):
        check_headers(tmp_path)
    change_weights(
        tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0})
    )
    check_headers(tmp_path)


def test_weights_of_whole_numbers_are_refused(tmp_path):
    save_tiny_model("llama", tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(BackboneError, match=rf"{name} holds whole numbers; expected: floating-point numbers"):
        check_headers(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_act": "bogus"},
        {"rope_parameters": {"rope_type": "bogus"}},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": None},
        {"vocab_size": -3},
        {"rms_norm_eps": float("nan")},
        {"dtype": "float99"},
    ],
    ids=lambda settings: "-".join(map(str, *settings.items())),
)
def test_odd_values_in_a_config_are_refused_in_words(tmp_path, settings):
    save_tiny_model("llama", tmp_path)
    change_config(tmp_path, **settings)
    with pytest.raises(BackboneError, match=r"got: backbone.path .*; do: (set backbone.path|check|put back)"):
        check_headers(tmp_path)
        load(tmp_path)
    with suppress(BackboneError):  # a plan needs less of it
        read_shape(str(tmp_path))


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
