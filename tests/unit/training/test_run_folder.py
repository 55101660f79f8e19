"""Who may write into a run folder."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline.errors import TrainingError
from pipeline.training.run_folder import check_folder, claim
from tests.tiny_config import tiny_config


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_gets_settings_and_versions(tmp_path):
    config, folder = tiny_config(), tmp_path / "deep" / "run"
    check_folder(folder, config)
    assert not folder.exists()
    claim(folder, config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.model_dump(mode="json")
    assert "torch" in json.loads((folder / "versions.json").read_text())


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    claim(tmp_path, tiny_config())
    assert (tmp_path / "config.yaml").is_file()


def test_the_same_run_goes_on_with_what_may_change(tmp_path):
    claim(tmp_path, tiny_config(sidenet={"memory_layers": [1, 2]}))
    longer = tiny_config(
        sidenet={"memory_layers": [1, 2]},
        train={"stop_after_steps": 1, "loss_piece_tokens": 9},
        checkpoint={"keep": 5},
        evaluation={"documents": 3},
    )
    claim(tmp_path, longer)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["checkpoint"]["keep"] == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train": {"learning_rate": 0.5}}, r"train.learning_rate 0.5; expected: train.learning_rate 0.0002"),
        ({"train": {"steps": 3}, "memory": {"tokens": 64}}, r"got: memory.tokens 64, train.steps 3; expected"),
        ({"sidenet": {"memory_layers": [2]}}, r"got: sidenet.memory_layers \(2,\); expected: .* None"),
    ],
)
def test_another_configuration_is_refused_and_nothing_written(tmp_path, overrides, words):
    claim(tmp_path, tiny_config())
    before = content(tmp_path)
    for refuse in (check_folder, claim):
        with pytest.raises(TrainingError, match=f"another configuration; nothing was written; .*{words}.*do: choose"):
            refuse(tmp_path, tiny_config(**overrides))
    assert content(tmp_path) == before


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(TrainingError, match="not a run; nothing was written; got: .* without config.yaml; do: choose"):
        claim(tmp_path, tiny_config())
    assert content(tmp_path) == {"thesis.tex": b"precious"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(TrainingError, match="run.output_dir is not a folder; got: .*/run; do: choose"):
        claim(tmp_path / "run", tiny_config())


def test_a_run_that_is_not_to_be_resumed_needs_a_folder_of_its_own(tmp_path):
    config = tiny_config(run={"resume": "none"})
    claim(tmp_path, config)
    with pytest.raises(TrainingError, match="already holds this run, and run.resume is 'none'; .*do: set run.resume"):
        claim(tmp_path, config)


def test_what_a_job_leaves_that_was_stopped_while_loading_is_no_other_run(tmp_path):
    for name in ("status.json", "lock"):
        (tmp_path / name).touch()
    check_folder(tmp_path, tiny_config())


def test_what_a_killed_start_left_while_it_loaded_is_no_obstacle_and_goes(tmp_path):
    (tmp_path / ".universal" / "engine").mkdir(parents=True)
    claim(tmp_path, tiny_config())
    assert not (tmp_path / ".universal").exists()


def test_memory_groups_may_change(tmp_path):
    claim(tmp_path, tiny_config())
    claim(tmp_path, tiny_config(memory={"group_size": 2}, checkpoint={"memory": "replay"}))
