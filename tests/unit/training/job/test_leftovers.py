"""What a killed rank leaves behind does not stop later jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from torch.utils import cpp_extension

from pipeline.training.job.leftovers import DyingLock, lock_extensions_for_life

TAKE_AND_DIE = """
import os, signal, sys
from pipeline.training.job.leftovers import DyingLock
assert DyingLock(sys.argv[1]).try_acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_ends_with_its_holder(tmp_path):
    path = str(tmp_path / "lock")
    ended = subprocess.run([sys.executable, "-c", TAKE_AND_DIE, path], check=False)
    assert ended.returncode == -signal.SIGKILL
    one, other = DyingLock(path), DyingLock(path)
    assert one.try_acquire() and not other.try_acquire()
    one.release()
    other.wait()
    again = DyingLock(path)
    assert again.try_acquire()
    again.release()


def test_an_extension_compiles_whatever_lock_a_killed_process_left(tmp_path):
    lock_extensions_for_life()
    (tmp_path / "lock").touch()  # torch's own lock: it would wait for ever
    baton = cpp_extension.FileBaton(os.path.join(tmp_path, "lock"))
    assert isinstance(baton, DyingLock) and baton.try_acquire()
    baton.release()
