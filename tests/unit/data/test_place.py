"""The place of a store: what is there at the end is replaced only if it is what was there at the start."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from pipeline.data import place as module
from pipeline.data import replaced
from pipeline.data.claim import Claim
from pipeline.data.ending import StopSignals
from pipeline.data.place import agree, publish, work_folder
from pipeline.errors import DataError


def make_store(folder, mark="old"):
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "data-00000-of-00001.arrow").write_text(mark)
    (folder / "store.json").write_text(json.dumps({"format_version": 1, "splits": {"train": {}}}))


def mark(folder):
    return (folder / "train" / "data-00000-of-00001.arrow").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def preparing(output, *, overwrite=False):
    """Work on a store; published at the end of the block."""
    with work_folder(agree(output, overwrite=overwrite), overwrite=overwrite, stop=StopSignals()) as (place, work):
        make_store(work / "store", "new")
        yield work
        publish(place, work, work / "store")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a store", "a link to nothing", "lost+found"])
def test_a_store_comes_to_its_place(tmp_path, there):
    output = tmp_path / "below" / "store"
    if there in ("an empty folder", "lost+found"):
        (output / there if there == "lost+found" else output).mkdir(parents=True)
    elif there == "a store":
        make_store(output)
    elif there == "a link to nothing":
        output.parent.mkdir()
        output.symlink_to(tmp_path / "elsewhere")
    with preparing(output, overwrite=True):
        assert there != "a store" or mark(output) == "old"
    assert mark(output) == "new"
    assert names(output) == ["lost+found"] * (there == "lost+found") + ["store.json", "train"]
    assert names(output.parent) == ["store"] and output.is_symlink() == (there == "a link to nothing")


def test_an_empty_folder_is_filled_not_replaced(tmp_path):
    output = tmp_path / "store"
    output.mkdir(mode=0o750)
    before = output.stat()
    with preparing(output) as work:
        assert work.parent == output
    assert os.path.samestat(before, output.stat()) and output.stat().st_mode == before.st_mode


def test_a_folder_that_is_filled_gets_store_json_last(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    moved = []
    rename = os.rename

    def noted(old, new):
        moved.append(new.name)
        rename(old, new)

    monkeypatch.setattr(os, "rename", noted)
    with preparing(tmp_path / "store"):
        pass
    assert moved == ["train", "store.json"]


def test_a_folder_that_cannot_be_filled_is_empty_again(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    rename = os.rename

    def fail(old, new):
        if os.path.basename(new) == "store.json":
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DataError, match="output cannot be written; got: .*Input/output error"), preparing(
        tmp_path / "store"
    ):  # fmt: skip
        pass
    assert names(tmp_path / "store") == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("appears", ["a folder with a file", "an empty folder", "a file", "a store", "a link"])
def test_what_appears_meanwhile_is_kept(tmp_path, appears, overwrite):
    output, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(DataError, match="something else is at the output.*left as it is"), preparing(
        output, overwrite=overwrite
    ):  # fmt: skip
        if appears == "a file":
            output.write_text("mine")
        elif appears == "a link":
            output.symlink_to(elsewhere)
        elif appears == "a store":
            make_store(output, "mine")
        else:
            output.mkdir()
            if appears == "a folder with a file":
                (output / "mine").touch()
    assert names(tmp_path) == ["elsewhere", "store"] and names(elsewhere) == []
    assert output.is_file() == (appears == "a file") and output.is_symlink() == (appears == "a link")
    if appears == "a store":
        assert mark(output) == "mine"
    elif output.is_dir():
        assert names(output) == ["mine"] * (appears == "a folder with a file")


def test_what_appears_in_an_empty_output_is_kept(tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(DataError, match="something else is at the output"), preparing(tmp_path / "store"):
        (tmp_path / "store" / "mine").touch()
    assert names(tmp_path / "store") == ["mine"]


@pytest.mark.parametrize("change", ["a file more", "another store", "gone", "another folder", "rewritten", "a link"])
def test_a_store_is_replaced_only_if_it_is_still_the_same(tmp_path, change):
    output, away = tmp_path / "store", tmp_path / "away"
    make_store(output)
    with pytest.raises(DataError, match="something else is at the output"), preparing(output, overwrite=True):
        if change == "a file more":
            (output / "train" / "notes.json").touch()
        elif change == "rewritten":
            (output / "train" / "data-00000-of-00001.arrow").write_text("mine")
        else:
            output.rename(away)
        if change == "another store":
            shutil.copytree(away, output)
        elif change == "another folder":
            output.mkdir()
            (output / "mine").touch()
        elif change == "a link":
            output.symlink_to(away)
    if change == "a file more":
        assert names(output / "train") == ["data-00000-of-00001.arrow", "notes.json"]
    elif change == "another folder":
        assert names(output) == ["mine"]
    elif change == "gone":
        assert names(tmp_path) == ["away"]
    else:
        assert mark(output) == ("mine" if change == "rewritten" else "old")
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_what_comes_between_the_two_renames_is_kept_and_so_is_the_old_store(tmp_path, monkeypatch, caplog):
    output = tmp_path / "store"
    make_store(output)
    put = module._put

    def late(store, to):
        output.mkdir()
        (output / "mine").touch()
        put(store, to)

    monkeypatch.setattr(module, "_put", late)
    with pytest.raises(DataError, match="something else is at the output"), preparing(output, overwrite=True):
        pass
    kept, there = names(tmp_path)[1], names(output)
    assert there == ["mine"] and kept.startswith("store.before-") and mark(tmp_path / kept) == "old"
    assert f"what was at {output} is now at {tmp_path / kept}" in caplog.text


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "a newer store"])
def test_a_preparation_that_was_killed_while_it_exchanged_stores(tmp_path, there):
    output, left = tmp_path / "store", tmp_path / ".store.preparing-12345678"
    make_store(left / "replaced")
    (tmp_path / ".store.preparing.lock").write_text(json.dumps({"work": left.name}))
    if there == "a newer store":
        make_store(output, "newer")
        with preparing(output, overwrite=True):
            assert mark(output) == "newer" and not left.exists()
        assert mark(output) == "new"
    else:
        if there == "an empty folder":
            output.mkdir()
        with pytest.raises(DataError, match="output exists already"), preparing(output):
            pass
        assert mark(output) == "old"
    assert names(tmp_path) == ["store"]


def test_an_empty_folder_whose_store_another_has_just_put_aside_is_not_filled(tmp_path, monkeypatch):
    make_store(tmp_path / "store")
    put = module._put

    def late(store, to):
        to.mkdir()
        with pytest.raises(DataError, match="another preparation is making this store"), preparing(to):
            pass
        to.rmdir()
        put(store, to)

    monkeypatch.setattr(module, "_put", late)
    with preparing(tmp_path / "store", overwrite=True):
        pass
    assert mark(tmp_path / "store") == "new" and names(tmp_path) == ["store"]


def test_a_store_that_cannot_be_exchanged_stays(tmp_path, monkeypatch):
    make_store(tmp_path / "store")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_put", fail)
    with pytest.raises(DataError, match="cannot be written"), preparing(tmp_path / "store", overwrite=True):
        pass
    assert names(tmp_path) == ["store"] and mark(tmp_path / "store") == "old"


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "train/notes.txt", "train/deep/state.json", "test/state.json", "links"]
)
def test_overwrite_refuses_a_store_with_foreign_files(tmp_path, foreign):
    output = tmp_path / "store"
    make_store(output)
    path = output / foreign
    path.parent.mkdir(exist_ok=True)
    if foreign == "links":
        path.symlink_to(tmp_path)
    else:
        path.touch()
    with pytest.raises(DataError, match=f"has foreign files in it.*{foreign}.*move them away"):
        agree(output, overwrite=True)


def test_overwrite_refuses_a_file_that_is_named_like_a_part_and_is_none(tmp_path):
    output = tmp_path / "store"
    make_store(output)
    split = {"files": {"state.json": {"size": 1, "sha256": "0" * 64}}}
    (output / "store.json").write_text(json.dumps({"format_version": 1, "splits": {"train": split}}))
    with pytest.raises(DataError, match=r"has foreign files in it.*train/data-\S+arrow"):
        agree(output, overwrite=True)


@pytest.mark.parametrize("text", ["", "[]", '{"splits": 3}', '{"items": []}', '{"splits": {}}'])
def test_overwrite_refuses_a_folder_with_another_store_json(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(DataError, match="not a token store; got: .*whose store.json is not that of a store"):
        agree(tmp_path, overwrite=True)


def test_outputs_that_cannot_be_are_errors_in_words(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output, match in {
        tmp_path / "file": "exists and is not a token store; got: .*file, a file",
        tmp_path / "file" / "below": "cannot be written; got: .*Not a directory",
        tmp_path / "loop": "cannot be written; got: .*symbolic links",
        tmp_path / ("x" * 250): "cannot be written; got: .*File name too long",
        tmp_path / "caf\udce9": r"name of the output is not UTF-8; got: .*caf\\xe9",
    }.items():
        with pytest.raises(DataError, match=match), preparing(output):
            pass
    assert names(tmp_path) == ["file", "loop"]


def test_folders_that_may_not_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    make_store(tmp_path / "store")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(DataError, match=f"cannot be written; got: {tmp_path}/store .Permission denied: {tmp_path}"):
        agree(tmp_path / "store", overwrite=True)


def test_of_two_at_once_the_second_is_refused_within_a_process_too(tmp_path):
    with preparing(tmp_path / "store"):
        with pytest.raises(DataError, match="another preparation is making this store"), preparing(tmp_path / "store"):
            pass
        with preparing(tmp_path / "other"):
            pass
    assert names(tmp_path) == ["other", "store"]


def test_a_lock_that_is_released_while_it_is_taken_is_no_lock(tmp_path, monkeypatch):
    """The holder removes the file between opening and locking: the lock on the removed one keeps nobody out."""
    first, second = Claim(tmp_path, "x"), Claim(tmp_path, "x")
    first.lock.touch()
    lockf = fcntl.lockf

    def late(descriptor, how):
        if first.lock.exists() and os.path.samestat(os.fstat(descriptor), before):
            first.lock.unlink()
        return lockf(descriptor, how)

    before = first.lock.stat()
    held_open = first.lock.open()  # its inode is not used again
    monkeypatch.setattr(fcntl, "lockf", late)
    with second.held(rescue=lambda _: None, stop=StopSignals()):
        assert not os.path.samestat(second.lock.stat(), before)
    held_open.close()
    assert names(tmp_path) == []


def test_where_there_are_no_locks_it_warns_and_removes_nobodys_folder(tmp_path, monkeypatch, caplog):
    (tmp_path / ".store.preparing-12345678").mkdir()
    (tmp_path / ".store.preparing.lock").write_text(json.dumps({"work": ".store.preparing-12345678"}))

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with preparing(tmp_path / "store"):
        pass
    assert names(tmp_path) == [".store.preparing-12345678", "store"]
    assert "cannot be locked" in caplog.text and "it can be deleted" in caplog.text


@pytest.fixture(params=["a disk", "a bind mount"])
def mount_point(tmp_path, request):
    folder = tmp_path / "volume"
    folder.mkdir()
    (tmp_path / "behind").mkdir()
    kinds = {"a disk": ["-t", "tmpfs", "-o", "size=1m", "tmpfs"], "a bind mount": ["--bind", str(tmp_path / "behind")]}
    done = subprocess.run(["mount", *kinds[request.param], str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount, and not in every container; an empty folder is filled in place in any case")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_mount_point_is_filled_and_exchanged_only_by_hand(mount_point):
    with preparing(mount_point):
        pass
    assert mark(mount_point) == "new" and names(mount_point) == ["store.json", "train"]
    with pytest.raises(DataError, match="is a mount point with a store in it.*delete what is in it"):
        agree(mount_point, overwrite=True)


def test_a_mount_point_that_os_path_does_not_see(tmp_path, monkeypatch):
    make_store(tmp_path / "store")
    monkeypatch.setattr(replaced, "_mount_of", lambda folder: str(folder))
    with pytest.raises(DataError, match="is a mount point with a store in it"):
        agree(tmp_path / "store", overwrite=True)
