"""SIGKILL at every single file operation of saving, of going back and of removing: a whole checkpoint always counts."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipeline.checkpoint.folder import Checkpoints
from tests.fault_injection import die_at, whole_checkpoints
from tests.unit.checkpoint.test_folder import Counter, checkpoints, latest, names, save


def killed_at(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Does something in a copy of this process that dies before one of its file operations; whether it came there."""
    child = os.fork()
    if child == 0:
        die_at(number, str(folder / "checkpoints"), folder / "note")
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the work itself failed: {status}"
    return status == signal.SIGKILL


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3, of which two are kept."""
    folder = tmp_path_factory.mktemp("begun")
    for step in (1, 2, 3):
        save(checkpoints(folder, keep=2), step, [Counter("one", 10 * step)])
    return folder


def save_four(found: Checkpoints) -> None:
    save(found, 4, [Counter("one", 40)])


def go_back(found: Checkpoints) -> None:
    found.truncate_after(2)


def go_back_and_save(found: Checkpoints) -> None:
    found.truncate_after(2)
    save(found, 3, [Counter("one", 300)])


# What is done after steps 1, 2 and 3 were saved; what may be the newest checkpoint then, and what must be in the end.
CASES = [
    (save_four, {3, 4}, 4),
    (go_back, {2, 3}, 2),
    (go_back_and_save, {2, 3}, 3),
]


@pytest.mark.parametrize(("work", "possible", "last"), CASES, ids=["save", "go back", "go back and save"])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(begun, tmp_path, work, possible, last):
    number, newest_seen = 1, []
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(begun, folder)
        found = checkpoints(folder, keep=2)
        if not killed_at(number, folder, partial(work, found)):
            break
        whole = whole_checkpoints(folder / "checkpoints")  # fails if there is one that is not whole
        newest = found.newest()
        assert newest is not None
        step, one = int(newest.name[5:]), Counter("one")
        assert step in possible and step in whole
        assert found.load(newest, [one]) == step and one.value in (10 * step, 300)
        newest_seen.append(step)
        # The run goes on from there, and nothing of the accident is left.
        found.truncate_after(step)
        assert latest(folder) == newest.name
        save(found, 5, [Counter("one", 50)])
        assert found.newest() == folder / "checkpoints" / "step_00000005"
        assert len(names(folder)) == 3, names(folder)
        number += 1
    assert number > 10
    assert set(newest_seen) == possible
    assert checkpoints(tmp_path / str(number)).newest() == tmp_path / str(number) / "checkpoints" / f"step_{last:08d}"
