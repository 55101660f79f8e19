"""Importing the authors' checkpoints: what is made, and what is refused; nothing that stands in a file is ever run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.import_official import main
from pipeline.errors import CheckpointError, DataError, LongMemError
from pipeline.face import Memory
from pipeline.model.load import load_longmem
from pipeline.official.convert import import_official
from pipeline.official.dictionary import make_tokenizer, read_dictionary
from pipeline.official.pickles import read_checkpoint
from tests.official import SETTINGS, Record
from tests.tiny_tokenizer import save_tiny_tokenizer

VOCABULARY = 384
Weights = dict[str, Tensor]


def namespace(**fields: Any) -> argparse.Namespace:
    return argparse.Namespace(**fields)


def save(path: Path, model: Mapping[str, Any], settings: Any, **kwargs: Any) -> Path:
    """A checkpoint in fairseq's form."""
    content = {
        "args": None,
        "cfg": {"_name": None, "common": {"fp16": True}, "model": settings},
        "model": dict(model),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 0}],
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }
    torch.save(content, path, **kwargs)
    return path


def save_pair(folder: Path, change: Callable[[Weights, Weights], object] = lambda *_: None) -> tuple[Path, Path]:
    """Both checkpoints; `change` may alter the weights of the backbone and of LongMem."""
    record = Record.read()
    backbone, longmem = dict(record.backbone().model), dict(record.longmem().model)
    change(backbone, longmem)
    alone = save(folder / "backbone.pt", backbone, namespace(newgpt_mode="alibi", arch="newgpt-medium"))
    return alone, save(folder / "longmem.pt", longmem, dict(SETTINGS))


def save_bpe(folder: Path) -> Path:
    """A byte-level encoding in the form of GPT-2's files; of its 300 tokens the first is that of the end of a text."""
    tokenizer = save_tiny_tokenizer(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def save_dictionary(path: Path, symbols: list[str] | None = None) -> Path:
    """GPT-2 ids in another order, as fairseq counted them."""
    if symbols is None:
        symbols = [str(number) for number in reversed(range(300))]
        symbols += [f"madeupword{number:04d}" for number in range(VOCABULARY - 4 - len(symbols))]
    path.write_text("".join(f"{symbol} {1000 - n}\n" for n, symbol in enumerate(symbols)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    backbone, longmem = save_pair(folder)
    dictionary, bpe = save_dictionary(folder / "dict.txt"), save_bpe(folder / "bpe")
    given = [str(backbone), str(longmem), "--dict", str(dictionary), "--bpe", str(bpe)]
    main([*given, "--output", str(folder / "made")])
    return folder / "made"


def test_it_is_a_model_of_transformers(imported: Path) -> None:
    record = Record.read()
    model = AutoModelForCausalLM.from_pretrained(imported)
    tokens = record.tokens("b1", 0)
    expected = record.given("b1", 0, "logits")
    assert expected is not None
    with torch.no_grad():
        logits = model(tokens).logits
    assert float((logits[:, -expected.shape[1] :] - expected).abs().max()) <= 2e-5
    # The next segment reads what the first left.
    memory = model.memorize(tokens[0])
    assert isinstance(memory, Memory)
    expected = record.given("b1", 1, "logits")
    assert expected is not None
    with torch.no_grad():
        logits = model(record.tokens("b1", 1), memory=memory).logits
    assert float((logits[:, -expected.shape[1] :] - expected).abs().median()) <= 3e-4
    written = model.generate(tokens[:, :10], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 14)
    about = json.loads((imported / "official.json").read_text(encoding="utf-8"))
    assert about["sizes"]["memory_layer"] == 3
    assert [file["name"] for file in about["files"]] == ["backbone.pt", "longmem.pt", "dict.txt"]


def test_it_is_loaded_for_evaluation_too(imported: Path) -> None:
    longmem = load_longmem(imported)
    own = Record.read().model()
    for name, parameter in longmem.sidenet.named_parameters():
        assert torch.equal(parameter, own.sidenet.get_parameter(name)), name


def test_its_tokenizer_has_the_ids_of_the_dictionary(imported: Path, tmp_path: Path) -> None:
    plain = save_tiny_tokenizer(tmp_path)
    text = "It was a bright cold day in the harbour: x = 12\n\té"
    expected = [4 + 299 - number for number in plain(text).input_ids]
    for folder in (imported, imported / "backbone"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == text
        assert [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [
            0, 1, 2, 3,
        ]  # fmt: skip


def test_half_precision_on_disk_is_widened(tmp_path: Path) -> None:
    def halve(*models: Weights) -> None:
        for model in models:
            model.update({name: weight.half() for name, weight in model.items()})

    backbone, longmem = save_pair(tmp_path, halve)
    import_official(backbone, longmem, save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    own = Record.read().longmem().model["decoder.layers.0.fc1.weight"]
    assert torch.equal(model.sidenet.layers[0].mlp.fc_in.weight, own.half().float())
    assert not list((tmp_path / "made").glob("*token*"))


def test_a_backbone_stored_wider_is_the_same(tmp_path: Path) -> None:
    def halve(backbone: Weights, longmem: Weights) -> None:
        longmem.update({name: weight.half() for name, weight in longmem.items()})

    backbone, longmem = save_pair(tmp_path, halve)
    import_official(backbone, longmem, save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)


def test_settings_of_omegaconf_are_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As omegaconf 2.3 pickles them: objects of its classes with `__dict__`s, and types as their metadata."""
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        pass

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    settings = DictConfig()
    metadata = {"ref_type": Any, "key_type": str, "resolver_cache": defaultdict(dict)}
    settings.__dict__.update(_content={"k": 32, "chunk_size": 4}, _metadata=metadata)
    path = save(tmp_path / "x.pt", {"a": torch.zeros(1)}, settings)
    monkeypatch.undo()
    assert read_checkpoint(path).settings == {"k": 32, "chunk_size": 4}


def test_an_old_form_of_file_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.arange(3.0)}, namespace(k=8), _use_new_zipfile_serialization=False)
    found = read_checkpoint(path)
    assert torch.equal(found.model["a"], torch.arange(3.0))
    assert found.settings == {"k": 8}


class Malicious:
    """Unpickled by a careless reader it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluated(Malicious):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("is_old_form", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(Malicious, "posix.system"), (Evaluated, "eval")])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, kind: type[Malicious], name: str, is_old_form: bool) -> None:
    marker = tmp_path / "marker"
    backbone, longmem = save_pair(tmp_path)
    for at in range(2):
        for place in ("model", "cfg"):
            bad = save(
                tmp_path / f"bad-{at}-{place}.pt",
                {"x": kind(marker)} if place == "model" else {"x": torch.zeros(1)},
                {"k": kind(marker)} if place == "cfg" else {},
                _use_new_zipfile_serialization=not is_old_form,
            )
            pair = [backbone, longmem]
            pair[at] = bad
            with pytest.raises(CheckpointError, match=f"without running code from it; got: .*{name}"):
                import_official(pair[0], pair[1], save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)
    assert not marker.exists()
    assert not (tmp_path / "made").exists()


def test_a_class_of_somebody_else_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"a": torch.zeros(1)}, {"x": Path("somewhere")})
    with pytest.raises(CheckpointError, match=r"pathlib.*report the name that was refused"):
        read_checkpoint(path)


Change = Callable[[Weights, Weights], object]


def _drop(name: str) -> Change:
    return lambda _, longmem: longmem.pop(name)


def _set(name: str, make: Callable[[Tensor], Tensor], *, of_backbone: bool = False) -> Change:
    def change(backbone: Weights, longmem: Weights) -> None:
        model = backbone if of_backbone else longmem
        model[name] = make(model[name])

    return change


def _foreign(backbone: Weights, longmem: Weights) -> None:
    longmem["decoder.layers.0.self_attn.k_proj.bias"] = torch.zeros(64)


def _two_memory_layers(backbone: Weights, longmem: Weights) -> None:
    longmem["decoder.layers.1.self_attn.memory_bias"] = torch.zeros(4)


def _fewer_layers(backbone: Weights, longmem: Weights) -> None:
    for name in [name for name in longmem if name.startswith("decoder.layers.3.")]:
        del longmem[name]


NESTED = "decoder.pretrained_model.decoder.model."
BAD: Mapping[str, tuple[Change, str]] = {
    "missing": (
        _drop("decoder.layer_norm.bias"),
        r"longmem.pt does not hold the weights.*no decoder.layer_norm.bias \(1 ",
    ),
    "foreign": (_foreign, r"got: a foreign decoder.layers.0.self_attn.k_proj.bias \(1 names"),
    "shape": (
        _set("decoder.layers.1.fc1.bias", lambda x: x[:-1]),
        r"longmem.pt is of another shape; got: decoder.layers.1.fc1.bias: \[255\] of torch.float32; expected: \[256\]",
    ),
    "whole numbers": (
        _set("decoder.layer_norm.bias", lambda x: x.long()),
        r"decoder.layer_norm.bias: \[64\] of torch.int64",
    ),
    "version": (
        _set("decoder.version", lambda x: x - 1),
        r"another version of the decoder; got: decoder.version \[2.0\]",
    ),
    "embedding": (
        _set("decoder.embed_tokens.weight", lambda x: x + 1),
        "two weights differ.*decoder.embed_tokens.weight",
    ),
    "head": (
        _set("decoder.output_projection.weight", lambda x: x + 1),
        "two weights differ.*decoder.output_projection",
    ),
    "other backbone": (
        _set("decoder.model.transformer.ln_f.bias", lambda x: x + 1, of_backbone=True),
        "two weights differ.*decoder.model.transformer.ln_f.bias in backbone.pt",
    ),
    "not finite": (
        _set("decoder.layers.0.fc2.weight", lambda x: x.index_fill(0, torch.tensor([3]), float("nan"))),
        "not finite; got: 256 in decoder.layers.0.fc2.weight",
    ),
    "two memory layers": (_two_memory_layers, "2 layers with a memory_bias; expected: one"),
    "no memory layer": (_drop("decoder.layers.2.self_attn.memory_bias"), "0 layers with a memory_bias"),
    "fewer layers": (_fewer_layers, "8 backbone layers of 64 numbers, 3 layers"),
    "no embedding": (
        lambda backbone, _: backbone.pop("decoder.model.transformer.wte.weight"),
        "no decoder.model.transformer.wte.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_weights_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    change, words = BAD[kind]
    backbone, longmem = save_pair(tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        import_official(backbone, longmem, save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"retrieval_layer_index": 3}, "retrieval_layer_index = 3; expected: 5"),
        ({"activation_fn": "relu"}, "activation_fn = 'relu'; expected: 'gelu'"),
        ({"k": "sixteen"}, "k = 'sixteen'"),
        ({"memory_size": 0}, "memory_size = 0; expected: a count"),
    ],
)
def test_settings_of_another_kind_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    backbone, _ = save_pair(tmp_path)
    longmem = save(tmp_path / "other.pt", Record.read().longmem().model, {**SETTINGS, **settings})
    with pytest.raises(LongMemError, match=words):
        import_official(backbone, longmem, save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    backbone, longmem = save_pair(tmp_path)
    dictionary = save_dictionary(tmp_path / "dict.txt")
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(longmem.read_bytes()[:-1000])
    empty = tmp_path / "empty.pt"
    empty.touch()
    tensors = tmp_path / "tensors.pt"
    torch.save([torch.zeros(1)], tensors)
    for path, words in (
        (truncated, "truncated.pt cannot be read"),
        (empty, "empty.pt cannot be read"),
        (tensors, "tensors.pt is no checkpoint of a model"),
        (tmp_path / "absent.pt", "there is no such checkpoint"),
        (backbone, "backbone.pt is no LongMem of the authors' code"),
    ):
        with pytest.raises(CheckpointError, match=words):
            import_official(backbone, path, dictionary, tmp_path / "made", bpe=None)
    with pytest.raises(CheckpointError, match=r"longmem.pt is no checkpoint of the authors' code"):
        import_official(longmem, longmem, dictionary, tmp_path / "made", bpe=None)


def test_an_output_that_is_there_is_left_alone(tmp_path: Path) -> None:
    backbone, longmem = save_pair(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    with pytest.raises(CheckpointError, match="the output exists already; nothing was written"):
        import_official(backbone, longmem, save_dictionary(tmp_path / "dict.txt"), tmp_path / "made", bpe=None)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["mine"]


def test_a_wrong_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    short = [str(number) for number in range(300)]
    wrong = r"dict.txt belongs to another model; got: 300 symbols and 4 special ones; expected: 384"
    with pytest.raises(DataError, match=wrong):
        read_dictionary(save_dictionary(path, short), VOCABULARY)
    with pytest.raises(DataError, match="dict.txt has a symbol twice; got: '7', again in line 9"):
        read_dictionary(save_dictionary(path, [*short[:8], "7", *short[8:]]), VOCABULARY)
    path.write_text("262 1000\nthe\n", encoding="utf-8")
    with pytest.raises(DataError, match="dict.txt is no dictionary of fairseq; got: line 2: 'the'"):
        read_dictionary(path, VOCABULARY)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="the dictionary cannot be read"):
        read_dictionary(path, VOCABULARY)
    bpe = save_bpe(tmp_path / "bpe")
    wrong = r"does not name the ids of GPT-2's tokenizer; got: \d+ of 256 bytes have no id"
    with pytest.raises(DataError, match=wrong):
        make_tokenizer({str(number): number + 4 for number in range(100)}, str(bpe), longest=64)
    with pytest.raises(DataError, match="GPT-2's tokenizer cannot be read; got: .*nowhere.*--no-tokenizer"):
        make_tokenizer({}, str(tmp_path / "nowhere"), longest=64)


def test_tokens_that_the_dictionary_lacks_are_cut_smaller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bpe = save_bpe(tmp_path)
    vocabulary = json.loads((bpe / "encoder.json").read_text(encoding="utf-8"))
    ids = {str(number): number + 4 for token, number in vocabulary.items() if token != "Ġthe"}
    tokenizer = make_tokenizer(ids, str(bpe), longest=64)
    assert "1 of GPT-2's 300 tokens are not in the dictionary" in caplog.text
    found = tokenizer("over the hills").input_ids
    assert tokenizer.decode(found) == "over the hills"
    assert vocabulary["Ġthe"] + 4 not in found
