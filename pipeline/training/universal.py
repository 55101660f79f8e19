"""ZeRO partitions of another number of ranks, by DeepSpeed's universal checkpoint.

The checkpoint is converted aside into one file for each parameter and kind of state, every rank takes its part of
them, and they go away. The checkpoint itself is only read.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.checkpoint import ds_to_universal

from pipeline.checkpoint.background import Background, wait_for_all
from pipeline.distributed.ranks import barrier, gather_objects, rank
from pipeline.errors import CheckpointError
from pipeline.training.pickles import load_failure


def load_universal(engine: Any, folder: Path, tag: str, *, scratch: Path) -> None:
    """Loads what another number of ranks saved: weights, fp32 master weights, optimizer states, loss scale, counters.

    Collective: every rank must call it.

    Args:
        engine: A ZeRO-2 engine.
        folder: As given to the engine's `save_checkpoint`.
        tag: Likewise.
        scratch: A folder that all ranks share, made and removed here; what an interrupted attempt left goes first.

    Raises:
        CheckpointError: The checkpoint could not be converted; it is untouched.
    """
    try:
        _on_rank_zero_patiently(lambda: _convert(folder / tag, scratch / tag))
        with _as_universal(engine), plainly_named(scratch) as (link,):
            engine.load_checkpoint(str(link), tag=tag)
        barrier()
    finally:
        if rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def plainly_named(*folders: Path) -> Iterator[list[Path]]:
    """Other names for folders, for a while: DeepSpeed 0.19 reads brackets and plus signs in a path as a pattern."""
    with tempfile.TemporaryDirectory(prefix="longmem-") as name:
        links = [Path(name, f"link_{number}") for number in range(len(folders))]
        for link, folder in zip(links, folders, strict=True):
            link.symlink_to(folder.resolve())
        yield links


def _convert(source: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    # It tells the console every stage. Redirecting the console would silence the whole process, its watch too.
    vars(ds_to_universal)["print"] = lambda *_, **__: None
    with plainly_named(source, target) as (source_link, target_link):
        arguments = argparse.Namespace(
            input_folder=str(source_link),
            output_folder=str(target_link),
            num_extract_workers=1,  # more would be forks of a process that holds an accelerator
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(arguments)


@contextmanager
def _as_universal(engine: Any) -> Iterator[None]:
    """Makes `load_checkpoint` take a universal checkpoint, on ranks that hold nothing of a small group too.

    A universal checkpoint is announced to DeepSpeed in the JSON that starts an engine; which checkpoint is loaded, and
    how many ranks wrote it, is known for sure only now. DeepSpeed 0.19 fails with an IndexError on a rank that holds
    no part of some group, like the few gates on many ranks: it does not look at groups that are hidden from it.
    """
    optimizer = engine.optimizer.optimizer
    held = [any(p._hp_mapping is not None for p in group) for group in engine.optimizer.bit16_groups]
    groups, count = optimizer.param_groups, held.index(False) if False in held else len(held)
    assert not any(held[count:]), "the smallest group must be the last one"
    optimizer.param_groups, engine._config.load_universal_checkpoint = groups[:count], True
    try:
        yield
    finally:
        optimizer.param_groups, engine._config.load_universal_checkpoint = groups, False


def _on_rank_zero_patiently(work: Callable[[], None]) -> None:
    """As `on_rank_zero`, but however long it takes."""
    task = Background(work) if rank() == 0 else None
    wait_for_all(task)
    error = None if task is None else task.error
    words = gather_objects(None if error is None else load_failure(error))[0]
    if words is not None:
        raise CheckpointError(
            "the optimizer's state could not be converted for another number of ranks; the checkpoint is untouched",
            got=words,
            do="make room on the disk of run.output_dir, or resume with the number of ranks that saved it",
        ) from error
