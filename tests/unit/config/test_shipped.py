"""Everything in configs/ and ds_configs/ loads, whatever files there are; the written reference is fresh."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.config.deepspeed import backbone_deepspeed, sidenet_deepspeed
from pipeline.config.fields import all_settings
from pipeline.config.load import load_config
from pipeline.config.reference import help_text, markdown_page
from pipeline.config.schema import Config

REPOSITORY = Path(__file__).resolve().parents[3]
RUN_FILES = sorted((REPOSITORY / "configs").iterdir())
ENGINE_FILES = sorted((REPOSITORY / "ds_configs").iterdir())


def test_both_folders_hold_what_the_documents_name() -> None:
    names = {path.name for path in [*RUN_FILES, *ENGINE_FILES]}
    assert {
        "quickstart.yaml",
        "paper.yaml",
        "deep.yaml",
        "backbone_zero3_inference.json",
        "sidenet_zero2.json",
    } <= names
    assert all(f"`{path.name}`" in markdown_page() for path in ENGINE_FILES)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_every_run_file_loads_with_its_engines(path: Path) -> None:
    config = load_config(path)
    for world_size in (1, 2):
        engines = backbone_deepspeed(config, world_size), sidenet_deepspeed(config, world_size)
        assert [engine["zero_optimization"]["stage"] for engine in engines] == [3, 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.name)
def test_deepspeed_itself_accepts_every_engine_file(make: Callable[..., Config], path: Path, precision: str) -> None:
    is_backbone = path.name.startswith("backbone_zero3_")
    assert is_backbone or path.name.startswith("sidenet_zero2")
    config = make(
        "--train.segments_per_step=3", f"--train.precision={precision}",
        f"--{'backbone' if is_backbone else 'train'}.deepspeed={path}",
    )  # fmt: skip
    # Imported here: DeepSpeed is slow to import and no other test of this room needs it.
    engine_config = import_module("deepspeed.runtime.config").DeepSpeedConfig
    engine = engine_config((backbone_deepspeed if is_backbone else sidenet_deepspeed)(config, 1))
    assert engine.zero_optimization_stage == (3 if is_backbone else 2)
    assert engine.train_batch_size == (4 if is_backbone else 12)
    assert (engine.bfloat16_config.enabled, engine.float16_config.enabled) == (precision == "bf16", precision == "fp16")


def test_paper_and_deep_are_the_profiles_of_the_design() -> None:
    paper = load_config(REPOSITORY / "configs" / "paper.yaml")
    num_segments = paper.data.lanes * paper.train.segments_per_step
    assert num_segments == 256
    assert paper.train.steps * num_segments * paper.train.segment_tokens == pytest.approx(26e9, rel=0.02)
    assert (paper.sidenet.layout, paper.sidenet.fusion, paper.memory.position) == ("uniform", "gate", "none")
    for name in ("deep.yaml", "quickstart.yaml"):
        deep = load_config(REPOSITORY / "configs" / name)
        assert (deep.sidenet.layout, deep.sidenet.memory_layers) == ("top", "all")
        assert (deep.sidenet.fusion, deep.memory.position) == ("joint", "fixed:768")
        assert (deep.memory.sink, deep.memory.window_tokens, deep.memory.retrieve_for) == (True, 512, "kv_head")


def test_a_run_file_is_looked_for_here_and_then_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config("configs/paper.yaml")
    assert shipped == load_config(REPOSITORY / "configs" / "paper.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "paper.yaml").write_bytes((REPOSITORY / "configs" / "deep.yaml").read_bytes())
    assert load_config("configs/paper.yaml") != shipped


def test_every_setting_has_words_and_help_fits_the_terminal() -> None:
    assert all(setting.text.endswith(".") for setting in all_settings().values())
    lines = help_text().splitlines()
    lines.remove(f"      {REPOSITORY / 'configs'}")  # as long as it is
    assert max(len(line) for line in lines) <= 120


def test_the_written_reference_is_fresh() -> None:
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown_page(), "stale; do: python -m tools.write_configuration_docs"
