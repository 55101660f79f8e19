"""A disk that fills up while a checkpoint is written: every rank says so, and the last whole checkpoint serves."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.schema import Config
from tests.fault_injection import exact_record, whole_checkpoints
from tests.ranks import run_ranks
from tests.tiny_run import TinyRun

STEPS, EVERY_STEPS = 12, 4
# Bytes: DeepSpeed's files have up to 200,000, a memory shard 130,000 in step 4 and 260,000 in step 8.
NO_ROOM, NO_ROOM_FOR_MEMORY = 100_000, 230_000
DISK_BYTES = 4 << 20


@contextmanager
def largest_file(size: int | None) -> Iterator[None]:
    """Has the operating system refuse to write more than so many bytes into a file of this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def attempt(config: Config) -> str:
    """Trains; what was said, or nothing if it went well."""
    from pipeline.errors import LongMemError
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    try:
        train(build_run(config))
    except LongMemError as error:
        return str(error)
    return ""


def train_with_limits(
    unbroken: Config, bf16: Config, started: Config, full: Config
) -> tuple[str, str, str, list[tuple[int, int]]]:
    """An unbroken run; one whose rank 0 can write no file of DeepSpeed; one whose rank 1 can write no memory."""
    from pipeline.distributed.ranks import rank

    sizes = [least_and_written(config) for config in (unbroken, bf16)]
    attempt(started)
    with largest_file(NO_ROOM if rank() == 0 else None):
        sidenet = attempt(full)
    with largest_file(NO_ROOM_FOR_MEMORY if rank() == 1 else None):
        memory = attempt(full)
    steps = whole_checkpoints(Path(full.run.output_dir, "checkpoints"))
    return sidenet, memory, f"{steps} {attempt(full)}", sizes


def least_and_written(config: Config) -> tuple[int, int]:
    """Trains; what the owners of state say that they will write at least, and what they write."""
    from pipeline.distributed.ranks import gather_objects
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    run = build_run(config)
    train(run)
    least = sum(gather_objects(sum(owner.least_bytes() for owner in run.owners)))
    newest = run.checkpoints.newest()
    assert newest is not None
    return least, sum(entry.size for entry in read_manifest(newest).files.values())


def fill_the_disk(started: Config, full: Config, disk: str) -> tuple[str, str, str]:
    """Goes on with a run on a disk that has room for all of a checkpoint but its memory."""
    from pipeline.distributed.ranks import barrier, rank

    attempt(started)
    filler = Path(disk, "filler")
    if rank() == 0:
        # What a checkpoint takes without memory, its blocks, and the records of four steps.
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 900_000
        filler.write_bytes(b"\0" * free)
    barrier()
    said = attempt(full)
    steps = whole_checkpoints(Path(full.run.output_dir, "checkpoints"))
    left = sorted(path.name for path in Path(full.run.output_dir, "checkpoints").iterdir())
    barrier()
    if rank() == 0:
        filler.unlink()
    barrier()
    return said, f"{steps} {left}", attempt(full)


def config(tiny_run: TinyRun, folder: Path, *, stop: int | None = None, **more: Any) -> Config:
    train: dict[str, Any] = {"steps": STEPS, "stop_after_steps": stop, "histogram_every_steps": 0, **more}
    return tiny_run.config(folder, train=train, memory={"tokens": 512}, checkpoint={"every_steps": EVERY_STEPS})


@pytest.fixture(scope="module")
def limited(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("limited")
    unbroken, full = config(tiny_run, folder / "unbroken"), config(tiny_run, folder / "full")
    bf16 = config(tiny_run, folder / "bf16", stop=EVERY_STEPS, precision="bf16")
    started = config(tiny_run, folder / "full", stop=EVERY_STEPS)
    return folder, run_ranks(train_with_limits, 2, unbroken, bf16, started, full, init_process_group=False)


def test_a_file_that_one_rank_writes_while_training_waits(limited):
    _, said = limited
    for rank in (0, 1):
        words = (
            "rank 0 could not write the checkpoint of step 8; older ones are untouched; got: no room on the disk, or a "
        )
        assert said[rank][0].startswith(words + "quota or a limit on files (RuntimeError: ")
        assert re.search(
            r"\); needed: at least [\d,]{7,} bytes, free: [\d,]+ bytes in /.*/checkpoints; do: see", said[rank][0]
        )
        assert "; do: see to " in said[rank][0]


def test_a_file_that_one_rank_writes_in_the_background(limited):
    _, said = limited
    for rank in (0, 1):
        assert said[rank][1].startswith("rank 1 could not write the checkpoint of step 8; older ones are untouched; ")
        assert "File too large" in said[rank][1] and "needed: at least " in said[rank][1]
        assert said[rank][2] == "[4] "


def test_with_room_again_the_losses_are_those_of_an_unbroken_run(limited):
    folder, _ = limited
    assert exact_record(folder / "full") == exact_record(folder / "unbroken")
    assert len(exact_record(folder / "unbroken")) == STEPS
    assert whole_checkpoints(folder / "full" / "checkpoints") == [8, 12]


def test_what_a_checkpoint_takes_is_known_before_it_is_written(limited):
    """Too much would refuse a save that has room. Files of a tiny run hold more names than numbers."""
    _, said = limited
    for _, _, _, sizes in said:
        for least, written in sizes:
            assert 0.7 * written < least < written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk, and not in every container; the file-size limit is tested")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(tiny_run, disk):
    started, full = config(tiny_run, disk / "run", stop=EVERY_STEPS), config(tiny_run, disk / "run")
    found = run_ranks(fill_the_disk, 2, started, full, str(disk), init_process_group=False)
    for said, left, after in found:
        assert "could not write the checkpoint of step 8; older ones are untouched" in said
        assert "No space left on device" in said
        assert re.search(r"needed: at least 1,\d{3},\d{3} bytes, free: [\d,]+ bytes in ", said)
        assert left == "[4] ['latest', 'step_00000004']"
        assert after == ""
