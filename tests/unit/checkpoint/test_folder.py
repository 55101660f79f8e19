"""Checkpoints on one rank: whole or absent, kept, checked; the newest whole one is found whatever befell others."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.folder import Checkpoints, SavedWorld
from pipeline.checkpoint.manifest import manifest_text
from pipeline.errors import CheckpointError


class Counter:
    """An owner of one number."""

    def __init__(self, name: str, value: int = 0) -> None:
        self.name, self.value = name, value

    def save(self, folder: Path) -> Callable[[], None] | None:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "value").write_text(str(self.value))
        return None

    def load(self, folder: Path, saved: SavedWorld) -> None:
        self.value = int((folder / "deeper" / "value").read_text())


class Clumsy(Counter):
    """Cannot be saved."""

    def save(self, folder: Path) -> Callable[[], None] | None:
        super().save(folder)
        raise OSError(28, "No space left on device")


class Slow(Counter):
    """Takes a snapshot and writes it, or fails to, when it is let."""

    def __init__(self, name: str, value: int = 0, *, error: Exception | None = None) -> None:
        super().__init__(name, value)
        self.let, self.error = threading.Event(), error

    def save(self, folder: Path) -> Callable[[], None] | None:
        snapshot = Counter(self.name, self.value)

        def write() -> None:
            assert self.let.wait(10)
            if self.error is not None:
                raise self.error
            snapshot.save(folder)

        return write


def checkpoints(folder, *, keep=2, **identity):
    return Checkpoints(folder / "checkpoints", keep=keep, group_size=1, identity=identity or {"backbone": "abc"})


def save(found, step, owners=()):
    path = found.save(step, owners)
    found.publish_if_written(wait=True)
    return path


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def latest(folder):
    return (folder / "checkpoints" / "latest").read_text()


def test_every_owner_gets_back_what_it_saved(tmp_path):
    one, two = Counter("one", 11), Counter("two", 22)
    found = checkpoints(tmp_path)
    assert found.newest() is None
    path = save(found, 7, [one, two])
    assert path == found.newest() == tmp_path / "checkpoints" / "step_00000007"
    assert latest(tmp_path) == path.name
    one.value = two.value = 0
    assert found.load(path, [one, two]) == 7
    assert (one.value, two.value) == (11, 22)


def test_the_manifest_names_every_file(tmp_path):
    path = save(checkpoints(tmp_path), 7, [Counter("one", 11)])
    content = {
        "format": 2,
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
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert json.loads((path / "manifest.json").read_text()) == {**content, "manifest_sha256": own}


def test_training_goes_on_while_snapshots_are_written(tmp_path):
    found, slow = checkpoints(tmp_path), Slow("slow", 1)
    save(found, 1)
    path = found.save(2, [slow])
    slow.value = 5  # training goes on
    found.publish_if_written()
    found.publish_if_written()
    assert found.newest() == tmp_path / "checkpoints" / "step_00000001" and not path.exists()
    slow.let.set()
    found.publish_if_written(wait=True)
    assert found.newest() == path
    found.publish_if_written(wait=True)  # nothing is left to do
    assert found.load(path, [slow]) == 2 and slow.value == 1


def test_a_save_waits_for_the_one_before_it(tmp_path):
    found, slow = checkpoints(tmp_path), Slow("slow", 1)
    first = found.save(1, [slow])
    threading.Timer(0.3, slow.let.set).start()
    second = found.save(2, [slow])
    assert found.newest() == first
    found.publish_if_written(wait=True)
    assert found.newest() == second


def test_only_the_newest_are_kept(tmp_path):
    found = checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        save(found, step, [Counter("one")])
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000011"]


def test_going_back_counts_at_once_and_newer_ones_go_when_they_are_passed(tmp_path):
    found, old, new = checkpoints(tmp_path, keep=3), Counter("one", 4), Counter("one", 40)
    back = save(found, 2, [old])
    save(found, 3, [old])
    save(found, 4, [old])
    found.truncate_after(2)
    assert found.newest() == back and latest(tmp_path) == back.name
    assert names(tmp_path) == ["aside_00000003", "aside_00000004", "latest", "step_00000002"]
    assert found.load(tmp_path / "checkpoints" / "aside_00000004", [Counter("one")]) == 4
    save(found, 3, [new])
    assert names(tmp_path) == ["aside_00000004", "latest", "step_00000002", "step_00000003"]
    found.truncate_after(2)  # back again: the newer branch takes the place of the older one
    assert names(tmp_path) == ["aside_00000003", "aside_00000004", "latest", "step_00000002"]
    path = save(found, 4, [new])
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000004"]
    assert found.load(path, [old]) == 4 and old.value == 40


def test_going_back_that_a_crash_cut_short_is_finished(tmp_path):
    found = checkpoints(tmp_path, keep=9)
    for step in (2, 3, 4):
        save(found, step)
    (tmp_path / "checkpoints" / "back_to").write_text("2")  # the crash came before any renaming
    assert found.newest() == tmp_path / "checkpoints" / "step_00000002"
    found.truncate_after(2)
    assert names(tmp_path) == ["aside_00000003", "aside_00000004", "latest", "step_00000002"]


def test_a_checkpoint_that_was_not_named_latest_in_time_counts(tmp_path):
    found = checkpoints(tmp_path)
    save(found, 1)
    path = save(found, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001")
    assert found.newest() == path


@pytest.mark.parametrize("then", [lambda found: found.truncate_after(1), lambda found: save(found, 1)])
def test_left_overs_of_a_crash_go_when_the_run_goes_on(tmp_path, then):
    found = checkpoints(tmp_path)
    save(found, 1)
    for name in ("writing_00000001", "writing_00000003", "removing_step_00000000"):
        (tmp_path / "checkpoints" / name / "one").mkdir(parents=True)
    assert found.newest() == tmp_path / "checkpoints" / "step_00000001"
    then(found)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_save_that_fails_leaves_what_there_was(tmp_path):
    found = checkpoints(tmp_path, keep=1)
    path = save(found, 1, [Counter("one", 1)])
    with pytest.raises(
        CheckpointError, match="rank 0 could not write the checkpoint of step 2; older .* No space left"
    ):
        found.save(2, [Counter("one", 2), Clumsy("two")])
    assert names(tmp_path) == ["latest", "step_00000001", "writing_00000002"]
    assert found.newest() == path
    one = Counter("one")
    assert found.load(path, [one]) == 1 and one.value == 1
    save(found, 3, [Counter("one", 3)])
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_writing_that_fails_in_the_background_is_said_after_the_next_step_and_leaves_nothing(tmp_path):
    found, slow = checkpoints(tmp_path, keep=1), Slow("slow", error=OSError(28, "No space left on device"))
    path = save(found, 1, [Counter("one", 1)])
    found.save(2, [Counter("one", 2), slow])
    slow.let.set()
    with pytest.raises(CheckpointError, match="rank 0 could not write the checkpoint of step 2; .*No space left.*do: "):
        found.publish_if_written(wait=True)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert found.newest() == path
    save(found, 3)
    assert names(tmp_path) == ["latest", "step_00000003"]


def test_writing_that_never_ends_ends_the_run(tmp_path):
    found = checkpoints(tmp_path)
    found.timeout_s = 0.5
    found.save(2, [Slow("slow")])
    with pytest.raises(
        CheckpointError, match="rank 0 could not write the checkpoint of step 2; .*got: still not written"
    ):
        found.publish_if_written(wait=True)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="rank 0 could not write the checkpoint of step 1; older ones"):
        checkpoints(tmp_path).save(1, [])


def flip(path):
    (path / "one" / "deeper" / "value").write_text("12")


def cut(path):
    (path / "one" / "deeper" / "value").write_text("1")


def flip_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 7', '"step": 5'))


def write_manifest(text):
    return lambda path: (path / "manifest.json").write_text(text)


DAMAGE = [
    (flip, "is corrupt; got: one/deeper/value has another hash; do: resume from another one"),
    (cut, "is corrupt; got: one/deeper/value has 1 bytes instead of 2; do"),
    (lambda path: shutil.rmtree(path / "one"), "is corrupt; got: one/deeper/value is missing; do"),
    (
        lambda path: (path / "one" / "mp_rank_01.pt").touch(),
        "is corrupt; got: one/mp_rank_01.pt is not in the manifest",
    ),
    (lambda path: (path / "one" / "x").symlink_to("/etc"), "is corrupt; got: one/x is not in the manifest"),
    (lambda path: (path / "manifest.json").unlink(), "is not a whole checkpoint; got: FileNotFoundError at manifest"),
    (flip_manifest, "is not a whole checkpoint; got: ValueError"),
    (write_manifest("[]"), "is not a whole checkpoint; got: TypeError"),
    (write_manifest('{"format": 1, "st'), "is not a whole checkpoint; got: JSONDecodeError"),
    (write_manifest('{"format": 2}'), "is not a whole checkpoint; got: KeyError at manifest"),
    (shutil.rmtree, "is not a whole checkpoint; got: FileNotFoundError .*expected: a folder step_.*do: give"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(tmp_path, damage, words):
    found, one = checkpoints(tmp_path), Counter("one", 11)
    path = save(found, 7, [one])
    damage(path)
    one.value = 5
    with pytest.raises(CheckpointError, match=words):
        found.load(path, [one])
    assert one.value == 5


@pytest.mark.parametrize(("damage", "words"), DAMAGE[:-1])
def test_the_newest_whole_one_is_taken_and_damage_is_said_loudly(tmp_path, damage, words, caplog):
    found, one = checkpoints(tmp_path, keep=9), Counter("one", 10)
    for step in (3, 5, 7):
        one.value = 2 * step
        path = save(found, step, [one])
    damage(path)
    with caplog.at_level(logging.ERROR):
        newest = found.newest()
        assert newest is not None
        assert found.load(newest, [one], or_older=True) == 5
    assert one.value == 10
    assert "The newest whole checkpoint is looked for." in caplog.text
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(caplog.text)
    found.truncate_after(5)
    assert names(tmp_path) == ["aside_00000007", "latest", "step_00000003", "step_00000005"]
    assert latest(tmp_path) == "step_00000005"


def test_without_any_whole_one_a_run_does_not_start_anew(tmp_path):
    found, one = checkpoints(tmp_path), Counter("one", 11)
    first, second = save(found, 5, [one]), save(found, 7, [one])
    flip(first)
    flip(second)
    with pytest.raises(
        CheckpointError, match="no whole checkpoint is left in .*got: damaged, .*: step_00000005; do: put a"
    ):
        found.load(second, [one], or_older=True)
    cut(first)
    cut(second)
    with pytest.raises(CheckpointError, match="no whole .*got: damaged, as was said: step_00000007, step_00000005; do"):
        found.newest()
    shutil.rmtree(first)
    shutil.rmtree(second)
    with pytest.raises(
        CheckpointError, match="no whole .*got: .*latest names 'step_00000007', which is not there; do: "
    ):
        found.newest()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read: Linux has one")
def test_a_file_that_cannot_be_read_is_damage(tmp_path):
    found, one = checkpoints(tmp_path), Counter("one", 0)
    save(found, 5, [one])
    path = save(found, 7, [one])
    (path / "one" / "deeper" / "value").unlink()
    (path / "one" / "deeper" / "value").symlink_to("/proc/self/mem")  # its first page is not there: EIO
    text = json.loads((path / "manifest.json").read_text())
    del text["manifest_sha256"]
    text["files"]["one/deeper/value"]["size"] = 0
    (path / "manifest.json").write_text(manifest_text(text))
    with pytest.raises(CheckpointError, match="is corrupt; got: one/deeper/value cannot be read .Input/output error"):
        found.load(path, [one])
    assert found.load(path, [one], or_older=True) == 5


@pytest.mark.parametrize("content", [b"step_00000009", b"step_000", b"", b"\xff\x00"])
def test_a_damaged_latest_does_not_matter(tmp_path, content, caplog):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert found.newest() == path
    assert ("which is not there" in caplog.text) == (content != b"")
    found.truncate_after(7)
    assert latest(tmp_path) == path.name


def test_what_costs_no_reading_is_checked_early(tmp_path):
    found = checkpoints(tmp_path)
    path = save(found, 7, [Counter("one", 11)])
    assert found.check(path)["step"] == 7
    flip(path)
    assert found.check(path)["step"] == 7
    cut(path)
    with pytest.raises(CheckpointError, match="has 1 bytes instead of 2"):
        found.check(path)


def test_another_run_or_format_is_refused_whatever_older_ones_there_are(tmp_path):
    found = checkpoints(tmp_path, backbone="abc")
    save(found, 6)
    path = save(found, 7)
    other = checkpoints(tmp_path, backbone="xyz")
    words = "another run; got: backbone 'abc'; expected: backbone 'xyz'; do: start"
    with pytest.raises(CheckpointError, match=words):
        other.load(path, [], or_older=True)
    with pytest.raises(CheckpointError, match=words):
        other.newest()
    (path / "manifest.json").write_text(manifest_text({"format": 3}))
    with pytest.raises(CheckpointError, match="another format; got: format 3; expected: format 2; do: resume it with"):
        found.newest()
    (path / "manifest.json").write_text('{"format": 1}')  # it had no hash of its own
    with pytest.raises(CheckpointError, match="another format; got: format 1; expected: format 2; do: resume it with"):
        found.newest()
