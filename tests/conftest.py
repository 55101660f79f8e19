"""What holds for every test: no hub, one thread, no noise from tokenizers; the longest files come first."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch or transformers, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background makes them ignore Ctrl-C, and every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ROOT = Path(__file__).parent
# Workers of pytest-xdist take file after file: here are those that take longer than about half a minute, the longest
# first, so that the last ones end together.
LONGEST = (
    "end_to_end/test_slurm.py",
    "distributed/test_sharded_memory.py",
    "end_to_end/test_train.py",
    "end_to_end/test_ways_to_start.py",
    "distributed/test_sharded_engines.py",
    "distributed/test_sharded_evaluation.py",
    "end_to_end/test_lost_rank.py",
    "distributed/test_faults.py",
    "end_to_end/test_prepare_data_ends.py",
    "end_to_end/test_fault_injection.py",
    "distributed/test_elastic.py",
    "distributed/test_ill_runs.py",
    "end_to_end/test_wheel.py",
    "end_to_end/test_launchers.py",
    "unit/face/test_generate_families.py",
    "unit/face/test_transformers.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first."""
    places = {_ROOT / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "tests/conftest.py names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))
