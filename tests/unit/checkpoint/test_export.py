"""An export is whole or absent, and says why it is absent."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.export import export
from pipeline.checkpoint.folder import Checkpoints
from pipeline.checkpoint.manifest import manifest_text
from pipeline.errors import CheckpointError
from tests.unit.checkpoint.test_folder import Counter

SIZE = 200_000


class SideNet(Counter):
    """As much of it as an export needs."""

    def save(self, folder: Path) -> Callable[[], None] | None:
        (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
        (folder / "config.yaml").write_text("run: {}\n")
        return None


@pytest.fixture()
def run(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, group_size=1, identity={"backbone": "abc"})
    checkpoints.save(7, [SideNet("sidenet")])
    checkpoints.publish_if_written(wait=True)
    return tmp_path


def test_the_weights_of_the_newest_checkpoint(run):
    export(run, run / "made" / "too" / "exported")
    assert sorted(path.name for path in (run / "made" / "too" / "exported").iterdir()) == [
        "config.yaml", "export.json", "model.safetensors",
    ]  # fmt: skip


def test_where_nothing_can_be_written(run):
    (run / "file").write_text("precious")
    cases = {
        run / "file" / "exported": "Not a directory: '.*/file'",
        run / "file" / "deeper" / "exported": "Not a directory",
        run / ("x" * 300): "File name too long",
        run / "new" / ("x" * 300): "File name too long",
        Path("/proc/exported"): "/proc",
    }
    before = sorted(run.rglob("*"))
    for output, words in cases.items():
        with pytest.raises(
            CheckpointError, match=f"output cannot be written; nothing is left of it; got: .*{words}.*do: n"
        ):
            export(run, output)
    assert sorted(run.rglob("*")) == before
    (run / "dangling").symlink_to("nowhere")
    for output in (run / "dangling", run / "file", run):
        with pytest.raises(CheckpointError, match="the output exists already; nothing was written; got: .*; do: name"):
            export(run, output)


@pytest.fixture(params=["read-only", "full"])
def ill_disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    options = {"read-only": "ro", "full": "size=64k"}[request.param]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a file system cannot be mounted here (that takes root and CAP_SYS_ADMIN)")
    yield request.param, folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_ill_disk(run, ill_disk):
    kind, folder = ill_disk
    words = {
        "read-only": r"Read-only file system: .*\); expected: a new folder",
        "full": r"No space left on device.*\); needed: at least 200,008 bytes, free: [\d,]+ bytes in .*/exported;",
    }[kind]
    with pytest.raises(CheckpointError, match=f"output cannot be written; nothing is left of it; got: .*{words}"):
        export(run, folder / "new" / "exported")
    assert not list(folder.iterdir())


def test_a_manifest_without_the_weights(run):
    checkpoint = run / "checkpoints" / "step_00000007"
    content = json.loads((checkpoint / "manifest.json").read_text())
    del content["manifest_sha256"], content["files"]["sidenet/model.safetensors"]
    (checkpoint / "manifest.json").write_text(manifest_text(content))
    (checkpoint / "sidenet" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is corrupt; got: sidenet/model.safetensors is not in its manifest; do:"):
        export(run, run / "exported")


@pytest.mark.parametrize("source", ["nowhere", "x" * 5000, "file", "file/below"])
def test_what_holds_no_checkpoint(run, source):
    (run / "file").touch()
    with pytest.raises(CheckpointError, match="there is no checkpoint; got: .*; expected: a folder step_"):
        export(run / source, run / "exported")
