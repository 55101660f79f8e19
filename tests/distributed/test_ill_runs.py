"""A run that is ill ends on every rank, with its last whole checkpoint intact and the reason in status.json."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny_run import TinyRun

ILL_STEP = 5  # a checkpoint was written after step 3, the next is due after step 6
FILE_LIMIT = 6000  # bytes: metrics and status are smaller, every part of a checkpoint is larger

Harm = Callable[[Config], None]


def limit_files(config: Config) -> None:
    """As on a full disk: files of this process cannot grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(config: Config) -> None:
    with open(Path(config.run.output_dir) / "ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def make_read_only(config: Config) -> None:
    mount("-o", "remount,ro", f"{config.run.output_dir}/checkpoints")


def change_store(config: Config) -> None:
    os.utime(Path(config.data.mixture[0].path) / "store.json")


def have_a_bug(config: Config) -> None:
    raise KeyError("a bug")


HARM: Mapping[str, tuple[int, Harm, str]] = {  # the rank that does it, and what status.json says
    "file limit": (0, limit_files, "rank 0 could not write"),
    "file limit on rank 1": (1, limit_files, "rank 1 could not write the checkpoint of step 6"),
    "changed store": (0, change_store, "has changed since it was opened; got: other size or time of change, or gone: "),
    "bug": (1, have_a_bug, "rank 1 failed in step 5: KeyError: 'a bug'"),
    "full disk": (0, fill_disk, "No space left on device"),
    "read-only": (0, make_read_only, "Read-only file system"),
}


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def train_into(harm: str, config: Config) -> None:
    """Trains; one rank does the harm in the middle of a step."""
    from pipeline.distributed.ranks import rank
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    culprit, do, _ = HARM[harm]
    run = build_run(config)
    step = run.trainer.step

    def harmed(number: int, **kwargs: Any) -> Any:
        if number == ILL_STEP:
            run.checkpoints.publish_if_written(wait=True)
            if rank() == culprit:
                do(config)
        return step(number, **kwargs)

    run.trainer.step = harmed  # type: ignore[method-assign]
    train(run)


@pytest.fixture()
def mounted(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Mounts file systems of two megabytes."""
    folders: list[Path] = []

    def mount_at(folder: Path) -> None:
        if not mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)):
            pytest.skip("a small file system cannot be mounted here (that takes root and CAP_SYS_ADMIN)")
        folders.append(folder)

    yield mount_at
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("harm", HARM)
def test_an_ill_run_ends_with_its_checkpoint_intact_and_says_why(
    harm: str, tiny_run: TinyRun, tmp_path: Path, mounted: Callable[[Path], None]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_run.data, data)
    config = tiny_run.config(
        run, data={"path": str(data)}, memory={"group_size": 2}, train={"histogram_every_steps": 0}
    )
    (run / "checkpoints").mkdir(parents=True)
    if harm == "full disk":
        mounted(run)
    elif harm == "read-only":
        mounted(run / "checkpoints")
    if harm != "full disk":
        (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")  # else it would be no run's folder
    words = HARM[harm][2]
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(train_into, 2, harm, config, init_process_group=False, timeout_s=100)
    assert words in str(caught.value)
    assert "rank 0 raised" in str(caught.value) and "rank 1 raised" in str(caught.value)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and words in status["reason"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003"
    newest = run / "checkpoints" / "step_00000003"
    for name, entry in read_manifest(newest).files.items():
        assert hashlib.sha256((newest / name).read_bytes()).hexdigest() == entry.sha256


def train_until_removed(when: str, config: Config) -> None:
    """Trains; rank 0 removes the run folder in a step, before the next one is saved, or while it is saved."""
    from pipeline.distributed.ranks import barrier, rank
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    run = build_run(config)
    step, save = run.trainer.step, run.owners[1].save

    def remove() -> None:
        run.checkpoints.publish_if_written(wait=True)
        if rank() == 0:
            shutil.rmtree(config.run.output_dir)
        barrier()

    def stepped(number: int, **kwargs: Any) -> Any:
        if number == ILL_STEP and when == "in a step":
            remove()
        return step(number, **kwargs)

    def saved(folder: Path) -> Any:
        rest = save(folder)
        if "writing_00000006" in str(folder) and when == "while saving":
            remove()
        return rest

    run.trainer.step = stepped  # type: ignore[method-assign]
    run.owners[1].save = saved  # type: ignore[method-assign]
    train(run)


@pytest.mark.parametrize("when", ["in a step", "while saving"])
def test_a_run_folder_that_is_removed_ends_the_run_and_is_not_made_again(
    when: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    with pytest.raises(RanksFailedError, match=r"run folder was removed while the run trained.*do: put the") as caught:
        run_ranks(train_until_removed, 2, when, tiny_run.config(tmp_path / "run"), init_process_group=False)
    assert "rank 0 raised" in str(caught.value) and "rank 1 raised" in str(caught.value)
    assert str(caught.value).count("the run folder was removed while the run trained") > 1  # rank 1 says it, too
    assert not (tmp_path / "run").exists()


def lose_rank_one(config: Config) -> None:
    """Rank 1 is killed while the backbone is loaded."""
    from transformers import AutoModelForCausalLM

    from pipeline.training.build import build_run

    if os.environ["RANK"] == "1":
        AutoModelForCausalLM.from_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    build_run(config)


def test_a_rank_that_is_lost_while_the_backbone_is_loaded_is_named(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path / "run", run={"collective_timeout_s": 10})
    words = "rank 1 died or fell silent; its last sign: loading the backbone"
    with pytest.raises(RanksFailedError, match=words):
        run_ranks(lose_rank_one, 2, config, init_process_group=False, timeout_s=100)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0) and words in status["reason"]
