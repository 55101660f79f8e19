"""Who may write into a run folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.errors import TrainingError
from pipeline.training.job.run_folder import check_folder, claim
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


DAMAGED = {
    "empty": b"",
    "garbage": b"\x00\x01\x02",
    "binary": b"\xff\xfe",
    "a list": b"- run\n",
    "text": b"run",
    "a section that is none": b"run: 5\n",
    "deep": b"run: " + b"[" * 3000 + b"]" * 3000,
    "digits": b"run:\n  seed: " + b"9" * 5000,
    "cut": b"run:\n  output_dir: 'x",
    "large": b"#" * (17 << 20),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_settings_are_said_and_left_as_they_are(tmp_path, content):
    claim(tmp_path, tiny_config())
    (tmp_path / "config.yaml").write_bytes(content)
    before = content_and_names(tmp_path)
    words = r"settings in the run folder are damaged; nothing was written; got: .*config.yaml \(.*do: copy sidenet/conf"
    with pytest.raises(TrainingError, match=words) as caught:
        claim(tmp_path, tiny_config())
    assert content_and_names(tmp_path) == before and len(str(caught.value)) < 2000


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("config.yaml")])
def test_settings_that_are_no_file_are_said_and_nobody_waits_for_them(tmp_path, make):
    make(tmp_path / "config.yaml")
    with pytest.raises(TrainingError, match="the settings in the run folder are damaged"):
        check_folder(tmp_path, tiny_config())


def test_settings_that_came_later_are_at_their_defaults(tmp_path):
    config = tiny_config(train={"weight_decay": 0.5})
    claim(tmp_path, config)
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del found["train"]["adam_beta1"], found["evaluation"], found["sidenet"]["memory_layers"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    check_folder(tmp_path, config)
    del found["train"]["weight_decay"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(TrainingError, match=r"got: train.weight_decay 0.5; expected: train.weight_decay 0.01 "):
        check_folder(tmp_path, config)
    found["train"] |= {"weight_decay": 0.5, "not_known": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(TrainingError, match=r"got: train.not_known None; expected: train.not_known 1"):
        check_folder(tmp_path, config)


def content_and_names(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_a_folder_below_a_file_or_in_no_place_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    cases = {
        tmp_path / "file" / "run": "Not a directory: .*file",
        tmp_path / "file" / "deeper" / "run": "Not a directory: .*file",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / ("x" * 300) / "run": "File name too long",
        tmp_path / "dangling" / "run": "Not a directory: .*dangling",
        Path("/proc/runs/one"): "/proc|No such file",
    }
    before = sorted(tmp_path.iterdir())
    for folder, words in cases.items():
        with pytest.raises(TrainingError, match=f"run.output_dir cannot be used; got: .*{words}.*; expected: a folder"):
            check_folder(folder, tiny_config())
    with pytest.raises(TrainingError, match="run.output_dir is not a folder; got: .*dangling; do: choose"):
        check_folder(tmp_path / "dangling", tiny_config())
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture()
def read_only(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=False).returncode:
        folder.chmod(0o500)
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere, and a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
    folder.chmod(0o700)


def test_where_nothing_can_be_written_is_said_before_anything_is_loaded(read_only):
    for folder in (read_only, read_only / "run", read_only / "deeper" / "run"):
        with pytest.raises(
            TrainingError, match=r"run.output_dir cannot be used; got: .*; do: see to its disk \(mounted"
        ):
            check_folder(folder, tiny_config())


def test_a_check_leaves_nothing(tmp_path):
    check_folder(tmp_path / "a" / "b", tiny_config())
    check_folder(tmp_path, tiny_config())
    assert not list(tmp_path.iterdir())
