"""An export is a model of transformers: whole or absent, its card true, and what it was before it was exported."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from launch.export import main
from pipeline.backbone.backbone import identity
from pipeline.backbone.load import load_backbone
from pipeline.data.tokenizer import tokenizer_identity
from pipeline.errors import BackboneError, CheckpointError, ConfigError, DataError, LongMemError
from pipeline.face import LongMemForCausalLM
from pipeline.face.export import export
from pipeline.model.load import load_longmem, read_trained
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Context, Stream
from tests.tiny_checkpoint import save_checkpoints, trained_longmem
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import save_tiny_model, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

TOLERANCE = 1e-5  # float32 logits of size 1 to 10; rows read on their own are products of other shapes
SEGMENT = 16
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {"config.json", "config.yaml", "export.json", "generation_config.json", "model.safetensors", "README.md"}
TABLE = "held-out tokens  loss (nats)\n(c) memory on  1.2500"
HELD_OUT = {
    "step": 7,
    "context_tokens": 16,
    "num_documents": 3,
    "num_tokens": 45,
    "conditions": {"memory_on": {"loss_nats": 1.25, "perplexity": 3.49, "loss_standard_error": None}},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone's folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("exported") / "tiny-llama"
    save_tiny_model("llama", folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(backbone: Path) -> TinyLongMem:
    """A trained LongMem beside it."""
    return trained_longmem(
        backbone={"path": str(backbone), "context_tokens": 4},
        memory={"sink": True, "position": "clamp:12"},
        data={"path": "/texts/old-books", "lanes": 2},
        train={"steps": 9, "segments_per_step": 3},
    )


@pytest.fixture()
def run(tiny: TinyLongMem, tmp_path: Path) -> Path:
    """A run folder with two checkpoints of it, metrics, and an evaluation of the newest."""
    run = save_checkpoints(tiny, tmp_path / "run")
    lines = [json.dumps({"step": step, "loss": 2.0 + step}) for step in range(1, 9)]  # the last one was not saved
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "evaluation.json").write_text(json.dumps(HELD_OUT))
    (run / "evaluation.txt").write_text(TABLE + "\n")
    return run


@pytest.fixture()
def exported(run: Path, tmp_path: Path) -> Path:
    export(run, tmp_path / "out")
    return tmp_path / "out"


def change(file: Path, how: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def two_segments(longmem: LongMem) -> Tensor:
    """Logits `[2, 2 T, V]` of two segments as training reads them: the second remembers the first."""
    tokens, stream, num_context = tiny_tokens((2, 2 * SEGMENT)), Stream(longmem, longmem.bank(2)), 0
    documents, found = torch.zeros_like(tokens), []
    with torch.no_grad():
        for start in (0, SEGMENT):
            before = slice(start - num_context, start)
            context = Context(tokens[:, before], documents[:, before])
            own, of_own = (ids[:, start : start + SEGMENT] for ids in (tokens, documents))
            found.append(longmem.logits(stream.hidden(stream.feed(own, of_own, context))))
            num_context = longmem.settings.context_tokens
    return torch.cat(found, dim=1)


def logits_of(model: LongMemForCausalLM) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny_tokens((2, 2 * SEGMENT))).logits
    return found


def test_an_exported_model_is_the_trained_one(tiny, exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LongMemForCausalLM and not model.training
    torch.testing.assert_close(logits_of(model), two_segments(tiny.longmem), atol=TOLERANCE, rtol=0)
    untrained = trained_longmem(memory={"enabled": False})  # the same weights: memory must matter
    assert not torch.allclose(logits_of(model)[:, SEGMENT:], two_segments(untrained.longmem)[:, SEGMENT:], atol=0.01)
    torch.testing.assert_close(two_segments(load_longmem(exported)), two_segments(tiny.longmem), atol=0, rtol=0)


def test_what_lies_in_the_folder(exported, backbone):
    assert {path.name for path in exported.iterdir()} == FILES | TOKENIZER
    config = AutoConfig.from_pretrained(exported)
    assert config.architectures == ["LongMemForCausalLM"] and config.backbone_name == str(backbone)
    assert config.backbone_hash == identity(tiny_model("llama"))
    assert config.trained == {
        "step": 7, "of_steps": 9, "lanes": 2, "segment_tokens": 16, "segments_per_step": 3, "precision": "fp32",
        "tokens": 7 * 2 * 3 * 16,
        "loss_nats": 6.0,  # the mean of 3 to 9
        "held_out": {
            "context_tokens": 16, "num_documents": 3, "num_tokens": 45,
            "conditions": {"memory_on": {"loss_nats": 1.25, "perplexity": 3.49}},
        },
    }  # fmt: skip
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (exported, backbone))
    assert tokenizer_identity(one) == tokenizer_identity(other)


def test_the_card_states_the_figures_of_the_run(exported):
    _, front, page = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["longmem", "memory"],
    }  # fmt: skip
    assert f"After step 7, by the run itself:\n\n```text\n{TABLE}\n```\n" in page
    assert "| optimizer steps | 7 of 9 |\n| tokens read | 672 |\n| a step | 2 lanes x 3 segments x 16 tokens |" in page
    assert "6.0000 nats a token" in page and "`old-books`" in page and "tiny-llama" in page
    assert "4 layers, 1 of which look" in page
    assert str(exported.parent) not in page, "a card goes to others"


def test_the_card_names_the_sources_of_a_mixture_and_their_shares(backbone, tmp_path):
    sources = ({"path": "/texts/books", "weight": 7}, {"path": "/texts/code"})
    tiny = trained_longmem(backbone={"path": str(backbone)}, data={"path": None, "sources": sources, "lanes": 2})
    export(save_checkpoints(tiny, tmp_path / "run"), tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| text | a mixture of the token stores `books` (87.5%), `code` (12.5%) |" in page and "/texts" not in page


def test_the_code_of_the_card_runs(exported, backbone, monkeypatch):
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (exported.parent / "book.txt").write_text("It was a bright cold day in the harbour.")
    monkeypatch.chdir(exported.parent)
    code = code.replace("THIS_FOLDER", str(exported)).replace("FOLDER_OF/tiny-llama", str(backbone))
    assert len(code.strip().splitlines()) == 5
    # The tokenizer knows more tokens than the model: such a book is refused, after all that comes before has run.
    with pytest.raises(DataError, match="vocabulary"):
        exec(code, {})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "the folder of the run holds no evaluation.json."),
        (lambda run: change(run / "evaluation.json", lambda one: one.update(step=4)), "that of step 4, of other w"),
        (lambda run: (run / "evaluation.txt").unlink(), "evaluation.json or evaluation.txt of the run is damaged"),
        (lambda run: change(run / "evaluation.json", lambda one: one.update(conditions=3)), "of the run is damaged"),
    ],
)
def test_figures_that_are_not_those_of_the_weights_are_left_out_and_the_card_says_why(run, tmp_path, spoil, words):
    spoil(run)
    export(run, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"Nothing was: {words}" in page or words in page
    assert TABLE not in page and "held_out" not in AutoConfig.from_pretrained(tmp_path / "out").trained


def test_a_checkpoint_without_its_run_folder(run, tmp_path, capsys):
    checkpoint = shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "far" / "away" / "step_00000004")
    main([str(checkpoint), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{checkpoint} -> {tmp_path}/out\n"
    page = (tmp_path / "out" / "README.md").read_text()
    assert "holds no evaluation.json and no metrics.jsonl." in page and "| training loss | not known" in page


def test_a_backbone_that_cannot_be_reached_is_named_by_hand(run, tmp_path, backbone):
    moved = shutil.copytree(backbone, tmp_path / "moved")
    gone = backbone.rename(backbone.with_name("gone"))
    try:
        with pytest.raises(BackboneError, match=r"configuration cannot be read.*tiny-llama.*name it with --backbone"):
            main([str(run), "--output", str(tmp_path / "new" / "out")])
        assert not (tmp_path / "new").exists()
        main([str(run), "--output", str(tmp_path / "out"), "--backbone", str(moved)])
        assert AutoConfig.from_pretrained(tmp_path / "out").backbone_name == str(moved)
        two_segments(load_longmem(tmp_path / "out"))
    finally:
        gone.rename(backbone)


def test_a_backbone_that_goes_with_the_export(run, tmp_path, tiny, backbone):
    copied = shutil.copytree(backbone, tmp_path / "copied")
    main([str(run), "--output", str(tmp_path / "out"), "--backbone", str(copied), "--save-backbone"])
    shutil.rmtree(copied)
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert {path.name for path in (moved / "backbone").iterdir()} == TOKENIZER | {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    expected = two_segments(tiny.longmem)
    torch.testing.assert_close(logits_of(LongMemForCausalLM.from_pretrained(moved)), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(two_segments(load_longmem(moved)), expected, atol=0, rtol=0)
    assert "The backbone lies in `backbone/`" in (moved / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "layers", "words"),
    [("gpt2", 4, "do not fit its settings and backbone; got: .*"), ("llama", 3, "do not fit.*")],
)
def test_another_backbone_is_found_out_without_its_weights(run, tmp_path, family, layers, words):
    save_tiny_model(family, tmp_path / "other", layers=layers)
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"trained beside another backbone; got: .*/other \(.*{words}--backbone"):
        export(run, tmp_path / "out", backbone=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_a_backbone_of_the_same_size_is_found_out_when_it_is_loaded(exported, tmp_path):
    save_tiny_model("llama", tmp_path / "other", seed=1)
    for load in (LongMemForCausalLM.from_pretrained, load_longmem):
        with pytest.raises(CheckpointError, match="trained beside another backbone; got: [0-9a-f]{64}; exp.*do: load"):
            load(exported, backbone=str(tmp_path / "other"))


def test_a_backbone_without_a_tokenizer_or_with_a_damaged_one(run, tmp_path):
    save_tiny_model("llama", tmp_path / "bare")
    export(run, tmp_path / "out", backbone=str(tmp_path / "bare"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "tokenizer = ...  # the backbone's own" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no tokenizer that can be loaded"):
        export(run, tmp_path / "other", backbone=str(tmp_path / "bare"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (Exception("No space left on device (os error 28)"), CheckpointError, "nothing is left of it; .*needed: at l"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_a_failure_half_way_leaves_nothing(run, tmp_path, monkeypatch, error, raised, words):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    with pytest.raises(raised, match=words):
        export(run, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_what_exists_is_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="the output exists already; nothing was written"):
        export(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, read_trained])
@pytest.mark.parametrize(
    ("newer", "error", "words"),
    [
        ({"longmem_format": 2}, CheckpointError, "saved by a newer version; got: longmem_format 2; expected: 1; do:"),
        ({"settings": {"memory": {"colour": "red"}}}, ConfigError, "memory.colour"),
        ({"settings": {"taste": 3}}, ConfigError, "taste"),
        ({"settings": {"memory": {"tokens": 30}}}, ConfigError, "memory.tokens is not a multiple"),
    ],
)
def test_what_a_newer_version_saved_is_refused_in_words(exported, load, newer, error, words):
    change(exported / "config.json", lambda content: content.update(newer))
    with pytest.raises(error, match=words):
        load(exported)


@pytest.mark.parametrize("text", ["{", '{"model_type": "longmem", "trained": 3}', '[{"model_type": "longmem"}]'])
def test_a_damaged_config_is_refused(exported, text):
    (exported / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="holds no LongMem; got: .*config.json: .*; do: make one"):
        read_trained(exported)


def test_the_settings_of_config_json_are_those_that_count(exported):
    change(exported / "config.json", lambda content: content["settings"]["memory"].update(tokens=64))
    assert AutoModelForCausalLM.from_pretrained(exported).longmem.settings.memory.tokens == 64
    trained = read_trained(exported)
    assert (trained.config.memory.tokens, trained.config.data.path) == (64, "/texts/old-books")
    assert read_trained(exported, ["--memory.tokens", "48"]).config.memory.tokens == 48


def test_an_export_of_an_older_version(tiny, exported):
    for name in FILES - {"model.safetensors", "config.yaml", "export.json"}:
        (exported / name).unlink()
    torch.testing.assert_close(two_segments(load_longmem(exported)), two_segments(tiny.longmem), atol=0, rtol=0)


@pytest.mark.parametrize("save_backbone", [False, True])
def test_what_save_pretrained_wrote_is_read_without_a_run(tiny, exported, tmp_path, caplog, save_backbone):
    saved, model = tmp_path / "saved", LongMemForCausalLM.from_pretrained(exported)
    model.save_pretrained(saved, save_backbone=save_backbone)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(two_segments(load_longmem(saved)), two_segments(tiny.longmem), atol=0, rtol=0)
    assert "not how it was trained: data.path is not known (add --data.path DIR" in caplog.text
    trained = read_trained(saved, ["--data.path", "/texts"])
    assert trained.config.model == tiny.config.model and trained.config.data.path == "/texts"
    mixed = read_trained(saved, ["--data.sources=[{path: /texts/a}, {path: /texts/b}]"])
    assert [source.path for source in mixed.config.data.mixture] == ["/texts/a", "/texts/b"]
    assert trained.config.train.steps == 7 and trained.backbone == identity(tiny_model("llama"))


def test_a_model_saved_in_bf16_is_compared_with_its_backbone_in_bf16(backbone, tiny, tmp_path):
    causal_lm = load_backbone(str(backbone), dtype=torch.bfloat16, attention="sdpa")
    config = AutoConfig.for_model("longmem", backbone_config=causal_lm.config, backbone_name=str(backbone))
    config.settings = tiny.config.model.model_dump(mode="json")
    LongMemForCausalLM(config, causal_lm).save_pretrained(tmp_path / "saved")
    assert read_trained(tmp_path / "saved").config.train.precision == "bf16"
    assert LongMemForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    assert load_longmem(tmp_path / "saved").dtype == torch.bfloat16


def test_a_saved_model_whose_backbone_is_not_known_says_so(exported):
    change(exported / "config.json", lambda content: content.update(backbone_name=""))
    (exported / "config.yaml").unlink()
    with pytest.raises(LongMemError, match="backbone.path 'not known'"):
        load_longmem(exported)
