"""What each task is tried with on a tiny model: `arguments` of its file writes tiny data and says how it is read."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path


def arguments(folder: Path) -> dict[str, list[str]]:
    """Command-line arguments by task, of every task that has a file here; their data is written into a folder."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        own = folder / module.name
        own.mkdir()
        found[module.name] = importlib.import_module(f"{__name__}.{module.name}").arguments(own)
    return found
