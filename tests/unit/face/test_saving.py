"""Folders of a LongMem: Auto classes, backbones given and missing, damage in words, dtypes, copies."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from pipeline.errors import BackboneError, CheckpointError, ConfigError, LongMemError
from pipeline.face import LongMemConfig, LongMemForCausalLM
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import save_tiny_model, tiny_model
from tests.unit.face.models import QUIET, TOLERANCE, tiny_face

IDS = tiny_tokens((2, 40))
SENSIBLE = 0.5  # of bfloat16 logits of size 1 to 10


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbones, and a LongMem beside one of them."""
    folder = tmp_path_factory.mktemp("saved")
    backbone = save_tiny_model("llama", folder / "backbone")
    save_tiny_model("llama", folder / "another", seed=1)
    tiny_face(backbone=backbone, name=str(folder / "backbone")).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> torch.Tensor:
    """Logits."""
    model = tiny_face(name=str(saved / "backbone"))
    with torch.no_grad():
        return model(IDS).logits


def logits(model: LongMemForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_auto_classes_know_it(saved, expected):
    config = AutoConfig.from_pretrained(saved / "model")
    assert isinstance(config, LongMemConfig) and config.vocab_size == 96 and config.num_hidden_layers == 4
    assert getattr(config, "max_position_embeddings", None) is None, "generate would take it for the end of a stream"
    model = AutoModelForCausalLM.from_pretrained(
        saved / "model", dtype="auto", device_map="cpu", revision="main", trust_remote_code=False
    )
    assert isinstance(model, LongMemForCausalLM) and not model.training and torch.equal(logits(model), expected)
    told, info = AutoModelForCausalLM.from_pretrained(saved / "model", output_loading_info=True)
    assert torch.equal(logits(told), expected) and not any(info.values()) and "missing_keys" in info
    shutil.copytree(saved / "model", saved / "all" / "mine", dirs_exist_ok=True)
    for load in (AutoModelForCausalLM, LongMemForCausalLM):
        assert torch.equal(logits(load.from_pretrained(saved / "all", subfolder="mine")), expected)
    eager = AutoModelForCausalLM.from_pretrained(saved / "model", attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert isinstance(AutoModelForCausalLM.from_config(config), LongMemForCausalLM)
    with pytest.raises(ValueError, match="LongMemConfig"):
        AutoModelForImageClassification.from_pretrained(saved / "model")


@pytest.mark.parametrize("load", [LongMemForCausalLM, AutoModelForCausalLM])
def test_a_backbone_may_be_given(saved, expected, load):
    backbone = AutoModelForCausalLM.from_pretrained(saved / "backbone")
    before = {name: parameter.data_ptr() for name, parameter in backbone.named_parameters()}
    models = [load.from_pretrained(saved / "model", backbone=backbone) for _ in range(2)]
    for model in models:
        assert {name: parameter.data_ptr() for name, parameter in model.backbone.named_parameters()} == before
        # Its weights lie where they were mapped: there some kernels round otherwise.
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    alone = tiny_model("llama")(IDS).logits
    torch.testing.assert_close(backbone(IDS).logits, alone, rtol=0, atol=1e-4, msg="it still works alone")
    shutil.copytree(saved / "backbone", saved / "moved", dirs_exist_ok=True)
    assert torch.equal(logits(load.from_pretrained(saved / "model", backbone=str(saved / "moved"))), expected)


@pytest.mark.parametrize("load", [LongMemForCausalLM, AutoModelForCausalLM])
def test_settings_are_laid_over_the_saved_ones(saved, load):
    plain = LongMemConfig.from_pretrained(saved / "model").settings
    model = load.from_pretrained(saved / "model", settings={"memory": {"tokens": 64, "top_k_tokens": 16}})
    changed = {**plain, "memory": {**plain["memory"], "tokens": 64, "top_k_tokens": 16}}
    assert model.config.settings == changed
    assert model.longmem.settings.memory.tokens == 64
    for wrong, words in (
        ({"memory": {"tokns": 64}}, "memory.tokns"),
        ({"memory": 3}, "these are no sections; got: 3; do: give a dictionary"),
        ({"memory": {"tokens": 33}}, "memory.tokens is not a multiple of memory.chunk_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            load.from_pretrained(saved / "model", settings=wrong)


Change = Callable[[dict[str, Any]], object]
SAID: dict[str, tuple[Change, type[LongMemError], str]] = {
    "no backbone": (
        lambda said: said.update(backbone_name=""),
        BackboneError,
        r"the backbone that .* stands beside cannot be loaded; got: .*; do: say where it is: from_pretrained\(..., bac",
    ),
    "a backbone that is gone": (
        lambda said: said.update(backbone_name="/nowhere/at/all"),
        BackboneError,
        "stands beside cannot be loaded; got: .*/nowhere/at/all.*does not exist.*; do: say where it is",
    ),
    "a backbone inside that is not": (
        lambda said: said.update(backbone_name="backbone"),
        CheckpointError,
        "the folder holds no LongMem; got: .*: backbone/config.json: ",
    ),
    "another backbone": (
        lambda said: said.update(backbone_name=said["backbone_name"].replace("/backbone", "/another")),
        CheckpointError,
        "were trained beside another backbone; got: .*; expected: .*; do: load the one that they were trained beside",
    ),
    "a newer form": (
        lambda said: said.update(longmem_format=2),
        CheckpointError,
        "saved by a newer version; got: longmem_format 2; expected: 1; do: load it with the version of LongMem that sa",
    ),
    "an unknown setting": (lambda said: said["settings"]["memory"].update(weather=1), ConfigError, "memory.weather"),
    "an unknown section": (lambda said: said["settings"].update(weather={}), ConfigError, "weather Extra inputs are"),
    "a contradiction": (
        lambda said: said["settings"]["memory"].update(tokens=33),
        ConfigError,
        "memory.tokens is not a multiple of memory.chunk_size; got: 33 and 4",
    ),
    "no settings": (lambda said: said.update(settings="deep"), ConfigError, "settings of the saved model"),
    "other layers": (
        lambda said: said["settings"]["sidenet"].update(num_layers=3),
        CheckpointError,
        r"do not fit its settings and backbone; got: layers.3.*14 in all.*; do: put back the files that belong togethe",
    ),
    "nothing of the backbone": (
        lambda said: said.pop("backbone_config"),
        CheckpointError,
        "config.json: it says nothing of the backbone; expected: ",
    ),
    "a backbone of an unknown kind": (
        lambda said: said["backbone_config"].update(model_type="llama9"),
        CheckpointError,
        "the backbone's model type is not known; got: model_type 'llama9'; .*; do: install the version of transformers",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_folder_that_says_something_else(saved, tmp_path, name):
    change, kind, words = SAID[name]
    shutil.copytree(saved / "model", tmp_path / "model")
    said = json.loads((tmp_path / "model/config.json").read_text())
    change(said)
    (tmp_path / "model/config.json").write_text(json.dumps(said))
    for load in (LongMemForCausalLM, AutoModelForCausalLM):
        with pytest.raises(kind, match=words):
            load.from_pretrained(tmp_path / "model")


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "no weights": (
        "model.safetensors",
        None,
        "model.safetensors: .*; expected: config.json and model.safetensors; do: ",
    ),
    "cut weights": ("model.safetensors", b"cut", "model.safetensors: SafetensorError"),
    "empty weights": ("model.safetensors", b"", "model.safetensors: SafetensorError"),
    "no configuration": ("config.json", None, "config.json: .*; do: make one with launch/export.py or save_pretrained"),
    "a cut configuration": ("config.json", b"cut", "config.json: JSONDecodeError"),
    "an empty configuration": ("config.json", b"", "config.json: JSONDecodeError"),
    "a list": ("config.json", b"[1, 2]", "config.json: ValueError: it is no JSON object"),
    "no text": ("config.json", b"\xff\xfe\x00", "config.json: UnicodeDecodeError"),
    "another model": ("config.json", b'{"model_type": "llama"}', "config.json: its model_type is not longmem"),
    "cut generation settings": ("generation_config.json", b"cut", "generation_config.json: OSError"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder(saved, tmp_path, name):
    file, content, words = FILES[name]
    shutil.copytree(saved / "model", tmp_path / "model")
    path = tmp_path / "model" / file
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    with pytest.raises(CheckpointError, match=f"the folder holds no LongMem; got: .*model.*: {words}"):
        LongMemForCausalLM.from_pretrained(tmp_path / "model")


def test_what_is_no_folder_of_a_longmem(saved, tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", saved / "model" / "config.json", "someone/something"):
        with pytest.raises(CheckpointError, match="the folder holds no LongMem; got: "):
            LongMemForCausalLM.from_pretrained(name)
    with pytest.raises(CheckpointError, match="backbone.*: config.json: its model_type is not longmem"):
        LongMemForCausalLM.from_pretrained(saved / "backbone")
    with pytest.raises(CheckpointError, match="this is a file; got: .*config.json; expected: a folder"):
        tiny_face().save_pretrained(saved / "model" / "config.json")


GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "several devices": (
        {"device_map": {"backbone": 0, "sidenet": "cpu"}},
        'not split over devices; got: device_map with 2 of them; expected: one device; do: give device_map="cuda:0"',
    ),
    "balanced": (
        {"device_map": "balanced"},
        "there is no such device; got: device_map 'balanced'; expected: one device",
    ),
    "int8": (
        {"dtype": torch.int8},
        "a LongMem has no such dtype; got: torch.int8; expected: float32, bfloat16 or float",
    ),
    "float8": ({"dtype": "float8"}, "a LongMem has no such dtype; got: float8"),
    "quantization": ({"quantization_config": {}}, "from_pretrained does not know this; got: quantization_config; do: "),
    "another backbone": ({"backbone": tiny_model("llama", seed=1)}, "were trained beside another backbone"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_loading_cannot_do(saved, name):
    given, words = GIVEN[name]
    with pytest.raises(CheckpointError, match=words):
        LongMemForCausalLM.from_pretrained(saved / "model", **given)


def test_another_dtype(saved, expected, tmp_path):
    """Memory follows the model, however it came by its dtype."""
    asked = LongMemForCausalLM.from_pretrained(saved / "model", dtype=torch.bfloat16)
    put = LongMemForCausalLM.from_pretrained(saved / "model").to(torch.bfloat16)
    for model in (asked, put, AutoModelForCausalLM.from_pretrained(saved / "model", dtype="bfloat16")):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
        assert model.memorize(IDS[0], progress=False).dtype == "bf16"
        assert torch.equal(logits(model), logits(asked)) and (logits(model) - expected).abs().mean() < SENSIBLE
        assert torch.equal(
            model.generate(IDS, max_new_tokens=12, **QUIET),
            model.generate(IDS, max_new_tokens=12, use_cache=False, **QUIET),
        )
    memory = LongMemForCausalLM.from_pretrained(saved / "model").memorize(IDS[0], progress=False)
    assert memory.dtype == "fp32" and put(IDS, memory=memory).logits.dtype == torch.float32
    put.save_pretrained(tmp_path / "beside")
    put.save_pretrained(tmp_path / "with", save_backbone=True)
    put.to(torch.float32).save_pretrained(tmp_path / "back")
    for name in ("beside", "with", "back"):
        assert (logits(LongMemForCausalLM.from_pretrained(tmp_path / name)) - expected).abs().mean() < SENSIBLE


def test_copies_are_models_of_their_own(saved, expected):
    model = LongMemForCausalLM.from_pretrained(saved / "model")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert torch.equal(logits(twin), expected)
    config = copy.deepcopy(twin.config)
    config.backbone_config.hidden_size = 7
    config.settings["memory"]["tokens"] = 4
    assert twin.config.hidden_size == 32 and twin.config.settings["memory"]["tokens"] == 32
    assert LongMemConfig.from_dict(twin.config.to_dict()).to_dict() == twin.config.to_dict()


def test_a_backbone_of_which_nobody_knows_where_it_lies_is_saved_too(tmp_path):
    model = tiny_face()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "backbone" / "model.safetensors").is_file()
    assert torch.equal(logits(LongMemForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_folder_holds_the_sidenet_and_no_pickle(saved, tmp_path):
    files = {"config.json", "model.safetensors", "generation_config.json"}
    assert {path.name for path in (saved / "model").iterdir()} == files
    model = LongMemForCausalLM.from_pretrained(saved / "model")
    model.save_pretrained(tmp_path / "model", save_backbone=True, max_shard_size="20KB")  # a SideNet stays one file
    assert {path.name for path in (tmp_path / "model").iterdir()} == files | {"backbone"}
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert torch.equal(logits(LongMemForCausalLM.from_pretrained(tmp_path / "moved")), logits(model))
