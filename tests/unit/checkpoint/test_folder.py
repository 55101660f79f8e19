"""Checkpoints on one rank: whole or absent, kept, checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint.folder import Checkpoints, SavedWorld
from pipeline.errors import CheckpointError


class Counter:
    """An owner of one number."""

    def __init__(self, name: str, value: int = 0) -> None:
        self.name, self.value = name, value

    def save(self, folder: Path) -> None:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "value").write_text(str(self.value))

    def load(self, folder: Path, saved: SavedWorld) -> None:
        self.value = int((folder / "deeper" / "value").read_text())


class Clumsy(Counter):
    """Cannot be saved."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError(28, "No space left on device")


def checkpoints(folder, *, keep=2, **identity):
    return Checkpoints(folder / "checkpoints", keep=keep, group_size=1, identity=identity or {"backbone": "abc"})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_every_owner_gets_back_what_it_saved(tmp_path):
    one, two = Counter("one", 11), Counter("two", 22)
    found = checkpoints(tmp_path)
    assert found.latest() is None
    path = found.save(7, [one, two])
    assert path == found.latest() == tmp_path / "checkpoints" / "step_00000007"
    one.value = two.value = 0
    assert found.load(path, [one, two]) == 7
    assert (one.value, two.value) == (11, 22)


def test_the_manifest_names_every_file(tmp_path):
    path = checkpoints(tmp_path).save(7, [Counter("one", 11)])
    assert json.loads((path / "manifest.json").read_text()) == {
        "format": 1,
        "step": 7,
        "world_size": 1,
        "group_size": 1,
        "identity": {"backbone": "abc"},
        "files": {
            # sha256sum of the two bytes "11"
            "one/deeper/value": {
                "size": 2,
                "sha256": "4fc82b26aecb47d2868c4efbe3581732a3e7cbcc6c2efb32062c08170a05eeb8",
            }
        },
    }


def test_only_the_newest_are_kept(tmp_path):
    found = checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        found.save(step, [Counter("one")])
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000011"]


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    found = checkpoints(tmp_path, keep=1)
    old, new = Counter("one", 4), Counter("one", 40)
    found.save(4, [old])
    assert found.save(3, [new]) == found.latest()
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004"]
    found.save(4, [new])
    assert names(tmp_path) == ["latest", "step_00000004"]
    assert found.load(tmp_path / "checkpoints" / "step_00000004", [old]) == 4 and old.value == 40


def test_a_save_that_fails_leaves_what_there_was(tmp_path):
    found = checkpoints(tmp_path, keep=1)
    path = found.save(1, [Counter("one", 1)])
    with pytest.raises(
        CheckpointError, match="rank 0 could not write the checkpoint of step 2; older .* No space left"
    ):
        found.save(2, [Counter("one", 2), Clumsy("two")])
    assert names(tmp_path) == ["latest", "step_00000001", "writing_00000002"]
    assert found.latest() == path
    one = Counter("one")
    assert found.load(path, [one]) == 1 and one.value == 1
    found.save(3, [Counter("one", 3)])
    assert names(tmp_path) == ["latest", "step_00000003"]


def flip(path):
    (path / "one" / "deeper" / "value").write_text("12")


def cut(path):
    (path / "one" / "deeper" / "value").write_text("1")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "is corrupt; got: one/deeper/value has another hash; do: resume from another one"),
        (cut, "is corrupt; got: one/deeper/value has 1 bytes instead of 2; do"),
        (lambda path: shutil.rmtree(path / "one"), "is corrupt; got: one/deeper/value is missing; do"),
        (
            lambda path: (path / "manifest.json").unlink(),
            "is not a whole checkpoint; got: FileNotFoundError at manifest",
        ),
        (lambda path: (path / "manifest.json").write_text("[]"), "is not a whole checkpoint; got: TypeError"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 2}'),
            "another format; got: format 2; expected: ",
        ),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 1}'),
            "is not a whole checkpoint; got: KeyError at manifest",
        ),
        (shutil.rmtree, "is not a whole checkpoint; got: FileNotFoundError .*expected: a folder step_.*do: give"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(tmp_path, damage, words):
    found, one = checkpoints(tmp_path), Counter("one", 11)
    path = found.save(7, [one])
    damage(path)
    one.value = 5
    with pytest.raises(CheckpointError, match=words):
        found.load(path, [one])
    assert one.value == 5


def test_what_costs_no_reading_is_checked_early(tmp_path):
    found = checkpoints(tmp_path)
    path = found.save(7, [Counter("one", 11)])
    assert found.check(path)["step"] == 7
    flip(path)
    assert found.check(path)["step"] == 7
    cut(path)
    with pytest.raises(CheckpointError, match="has 1 bytes instead of 2"):
        found.check(path)


def test_another_run_is_refused(tmp_path):
    path = checkpoints(tmp_path, backbone="abc").save(7, [])
    other = checkpoints(tmp_path, backbone="xyz")
    with pytest.raises(CheckpointError, match="another run; got: backbone 'abc'; expected: backbone 'xyz'; do: start"):
        other.load(path, [])
