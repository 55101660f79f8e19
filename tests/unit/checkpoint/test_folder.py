"""Checkpoints on one rank: whole or absent, kept, checked; the newest whole one is found whatever befell others."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.checkpoint.folder import Checkpoints, SavedWorld
from pipeline.checkpoint.manifest import DamageError, digest, manifest_text, read_manifest
from pipeline.errors import CheckpointError


class Counter:
    """An owner of one number."""

    def __init__(self, name: str, value: int = 0) -> None:
        self.name, self.value = name, value

    def save(self, folder: Path) -> Callable[[], None] | None:
        (folder / "deeper").mkdir()
        (folder / "deeper" / "value").write_text(str(self.value))
        return None

    def least_bytes(self) -> int:
        return 0

    def check(self, folder: Path, saved: SavedWorld) -> None:
        text = (folder / "deeper" / "value").read_text()
        if not text.isdecimal():
            raise DamageError("the value is no number", got=text)

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
        "format": 3,
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


class Large(Counter):
    """Says that it writes 1,000 bytes at least."""

    def least_bytes(self) -> int:
        return 1000


@pytest.mark.parametrize("free", [0, 749])
def test_a_save_that_surely_has_no_room_is_not_begun(tmp_path, monkeypatch, free):
    found = checkpoints(tmp_path, keep=1)
    path = save(found, 1, [Counter("one", 1)])
    for module in ("shelf", "room"):
        monkeypatch.setattr(f"pipeline.checkpoint.{module}.free_bytes", lambda _: free)
    words = (
        r"could not write the checkpoint of step 2; older ones are untouched; got: no room on the disk, .*needed: at "
        rf"least 1,000 bytes, free: {free} bytes in /.*/checkpoints; do: see to"
    )
    with pytest.raises(CheckpointError, match=words):
        found.save(2, [Large("one", 2)])
    assert names(tmp_path) == ["latest", "step_00000001"] and found.newest() == path


@pytest.mark.parametrize("free", [750, 10**12, None])
def test_a_save_that_may_have_room_is_begun(tmp_path, monkeypatch, free):
    found = checkpoints(tmp_path, keep=1)
    monkeypatch.setattr("pipeline.checkpoint.shelf.free_bytes", lambda _: free)
    assert save(found, 2, [Large("one", 2)]).is_dir()


@pytest.mark.parametrize(
    ("error", "is_want"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 894592 vs 894496"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (RuntimeError("some other bug"), False),
    ],
)
def test_what_torch_makes_of_a_full_disk_is_said_in_words(tmp_path, error, is_want):
    class Failing(Large):
        def save(self, folder: Path) -> Callable[[], None] | None:
            raise error

    with pytest.raises(CheckpointError, match=re.escape(str(error))) as caught:
        checkpoints(tmp_path).save(2, [Failing("one")])
    assert ("needed: at least 1,000 bytes, free: " in str(caught.value)) == is_want


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
    (write_manifest('{"format": 3}'), "is not a whole checkpoint; got: KeyError at manifest"),
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
    both = r"got: all are damaged: step_00000007 \({0}\), step_00000005 \({0}\); do: put a whole one back"
    with pytest.raises(CheckpointError, match=both.format("one/deeper/value has another hash")):
        found.load(second, [one], or_older=True)
    cut(second)  # found when the job looks for a checkpoint, the other one when it reads it
    assert checkpoints(tmp_path).newest() == first
    words = r"step_00000007 \(one/deeper/value has 1 bytes instead of 2\), step_00000005 \(.* has another hash\); do"
    with pytest.raises(CheckpointError, match=words):
        checkpoints(tmp_path).load(first, [one], or_older=True)
    cut(first)
    with pytest.raises(CheckpointError, match=both.format("one/deeper/value has 1 bytes instead of 2")):
        found.newest()
    shutil.rmtree(first)
    shutil.rmtree(second)
    with pytest.raises(
        CheckpointError, match="no whole .*got: .*latest names 'step_00000007', which is not there; do: "
    ):
        found.newest()


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    found, one = checkpoints(tmp_path), Counter("one", 0)
    save(found, 5, [one])
    path = save(found, 7, [one])

    def bad_sector(file, *, flush=False):
        if "step_00000007" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file)

    monkeypatch.setattr("pipeline.checkpoint.manifest.digest", bad_sector)
    with pytest.raises(CheckpointError, match="is corrupt; got: one/deeper/value cannot be read .Input/output error"):
        found.load(path, [one])
    assert found.load(path, [one], or_older=True) == 5


@pytest.mark.parametrize(
    "content", [b"step_00000009", b"step_000", b"", b"\xff\x00", b"s" * 5000, b"step_" + b"9" * 5000]
)
def test_a_damaged_latest_does_not_matter(tmp_path, content, caplog):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    with caplog.at_level(logging.ERROR):
        assert found.newest() == path
    assert "which is not there" in caplog.text and len(caplog.text) < 2000
    found.truncate_after(7)
    assert latest(tmp_path) == path.name


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_latest_that_is_no_file_does_not_matter_and_nobody_waits_for_it(tmp_path, make, caplog):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    (tmp_path / "checkpoints" / "latest").unlink()
    make(tmp_path / "checkpoints" / "latest")
    assert found.newest() == path
    assert "nothing that can be read" in caplog.text


@pytest.mark.parametrize("content", [b"", b"three", b"-1", b"\xff", b"9" * 5000, "٣".encode()])
def test_a_damaged_back_to_is_said(tmp_path, content):
    found = checkpoints(tmp_path)
    save(found, 7)
    (tmp_path / "checkpoints" / "back_to").write_bytes(content)
    with pytest.raises(CheckpointError, match="back_to is damaged: .*expected: the number of a step; do: write .* or"):
        found.newest()
    # While a run goes on, too: every rank learns of it.
    with pytest.raises(CheckpointError, match="could not write the checkpoint of step 8; older .*back_to is damaged"):
        save(found, 8)


def test_foreign_folders_are_no_checkpoints(tmp_path):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    for name in ("step_9", "step_00000009_old", "step_٣", "step_" + "9" * 100, "step_-0000009"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert found.newest() == path


def test_what_costs_no_reading_is_checked_early(tmp_path):
    found = checkpoints(tmp_path)
    path = save(found, 7, [Counter("one", 11)])
    assert found.check(path).step == 7
    flip(path)
    assert found.check(path).step == 7
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
    (path / "manifest.json").write_text(manifest_text({"format": 4}))
    with pytest.raises(
        CheckpointError, match="another format; got: format 4; expected: format 2 or 3; do: resume it with"
    ):
        found.newest()
    (path / "manifest.json").write_text('{"format": 1}')  # it had no hash of its own
    with pytest.raises(
        CheckpointError, match="another format; got: format 1; expected: format 2 or 3; do: resume it with"
    ):
        found.newest()


HASH = "0" * 64
ENTRY = {"size": 0, "sha256": HASH}
# What a manifest says whose own hash is right, and what is said of it. Nothing in it is believed before it is checked.
REWRITTEN = [
    ({"step": "7"}, r"step is '7' \(Input should be a valid integer\) in manifest.json"),
    ({"step": True}, r"step is True \(Input should be a valid integer\)"),
    ({"step": 7.0}, r"step is 7.0 \(Input should be a valid integer\)"),
    ({"step": None}, "step is None"),
    ({"step": -7}, "step is -7 "),
    ({"step": 10**30}, "step is 10{30} "),
    ({"step": 10**4000}, "step is a whole number of about 4,001 digits"),
    ({"step": 8}, "got: manifest.json of step 8; expected: a folder step_"),
    ({"world_size": 0}, "world_size is 0 "),
    ({"world_size": "1"}, "world_size is '1' "),
    ({"world_size": [1]}, r"world_size is \[1\] "),
    ({"world_size": 10**12}, "world_size is 10{12} "),
    ({"group_size": 0}, "group_size is 0 "),
    ({"group_size": -1}, "group_size is -1 "),
    ({"group_size": 2}, "groups of 2 do not divide 1 ranks"),
    ({"identity": []}, r"identity is \[\] "),
    ({"identity": "x" * 9999}, r"identity is 'x+\.\.\.x+' "),
    ({"files": []}, r"files is \[\] "),
    ({"files": "all"}, "files is 'all' "),
    ({"files": {"one/deeper/value": 2}}, "files.one/deeper/value is 2 "),
    ({"files": {"one/deeper/value": {"size": 2}}}, "files.one/deeper/value.sha256 is missing"),
    ({"files": {"one/deeper/value": {"size": "2", "sha256": HASH}}}, "files.one/deeper/value.size is '2' "),
    ({"files": {"one/deeper/value": {"size": -2, "sha256": HASH}}}, "files.one/deeper/value.size is -2 "),
    ({"files": {"one/deeper/value": {"size": 2, "sha256": "abc"}}}, "files.one/deeper/value.sha256 is 'abc' "),
    ({"files": {"one/deeper/value": {"size": 2, "sha256": 0}}}, "files.one/deeper/value.sha256 is 0 "),
    *[
        ({"files": {name: ENTRY}}, "not the name of a file below the checkpoint")
        for name in (
            "/etc/passwd", "../step_00000005/one", "one/../../value", "..", ".", "", "one//value", "./one", "one/",
            "manifest.json", "one\0", "one\ud800", "one\nvalue",
        )
    ],
    ({"files": {"x" * 5000: ENTRY}}, "x cannot be read .File name too long|x is missing"),
    ({"files": {"one/deeper/value": ENTRY, "one/link": ENTRY}}, "one/link leads outside the checkpoint"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), REWRITTEN)
def test_a_manifest_that_was_rewritten_to_fit_is_not_believed(tmp_path, changes, words, caplog):
    found, one = checkpoints(tmp_path), Counter("one", 10)
    save(found, 5, [one])
    path = save(found, 7, [one])
    (path / "one" / "link").symlink_to("/etc/passwd")
    content = json.loads((path / "manifest.json").read_text())
    del content["manifest_sha256"]
    (path / "manifest.json").write_text(manifest_text({**content, **changes}))
    with pytest.raises(DamageError, match=f"(?s){words}.*do: "):
        found.load(path, [one])
    with caplog.at_level(logging.ERROR):
        newest = found.newest()
    assert newest is not None and newest.name == "step_00000005", caplog.text
    assert found.load(newest, [one], or_older=True) == 5


@pytest.mark.parametrize("key", ["step", "world_size", "group_size", "identity", "files"])
def test_what_a_manifest_leaves_out_is_named(tmp_path, key):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    content = json.loads((path / "manifest.json").read_text())
    del content["manifest_sha256"], content[key]
    (path / "manifest.json").write_text(manifest_text(content))
    with pytest.raises(DamageError, match=f"got: {key} is missing in manifest.json"):
        found.check(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"format": 3, "a": ' + "[" * 5000, "\ud800"])
def test_a_manifest_of_garbage_is_damage(tmp_path, text):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    (path / "manifest.json").write_text(text, errors="surrogatepass")
    with pytest.raises(DamageError, match="is not a whole checkpoint; got: (ValueError|JSONDecodeError|UnicodeDecode)"):
        found.check(path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_is_no_file_is_damage_and_nobody_waits_for_it(tmp_path, make):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    (path / "manifest.json").unlink()
    make(path / "manifest.json")
    with pytest.raises(DamageError, match="is not a whole checkpoint; got: (IsADirectory|OS)Error at manifest.json"):
        found.check(path)


def test_a_checkpoint_under_another_name_of_a_persons_is_a_checkpoint(tmp_path):
    found = checkpoints(tmp_path)
    path = save(found, 7)
    shutil.copytree(path, tmp_path / "best one")
    (tmp_path / "link").symlink_to(path)
    assert found.check(tmp_path / "best one").step == found.check(tmp_path / "link").step == 7
    shutil.copytree(path, path.with_name("step_00000009"))
    with pytest.raises(DamageError, match="got: manifest.json of step 7"):
        found.check(path.with_name("step_00000009"))


def test_what_an_owner_cannot_read_is_damage_before_anything_is_loaded(tmp_path):
    found, one, two = checkpoints(tmp_path), Counter("one", 10), Counter("two", 20)
    save(found, 5, [one, two])
    path = save(found, 7, [one, two])
    (path / "two" / "deeper" / "value").write_text("zz")
    content = json.loads((path / "manifest.json").read_text())
    del content["manifest_sha256"]
    content["files"]["two/deeper/value"] = digest(path / "two" / "deeper" / "value")
    (path / "manifest.json").write_text(manifest_text(content))
    one.value = two.value = 0
    with pytest.raises(DamageError, match="is corrupt; got: two: the value is no number; got: zz; do: resume from"):
        found.load(path, [one, two])
    assert one.value == 0
    assert found.load(path, [one, two], or_older=True) == 5
    assert (one.value, two.value) == (10, 20)


def test_checkpoints_of_this_format_written_before_are_read_as_before(tmp_path):
    path = save(checkpoints(tmp_path), 7, [Counter("one", 11)])
    manifest = read_manifest(path)
    assert (manifest.step, manifest.world_size, manifest.group_size) == (7, 1, 1)
    assert manifest.identity == {"backbone": "abc"} and list(manifest.files) == ["one/deeper/value"]
