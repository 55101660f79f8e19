"""Files by the names that the documents give them: in the working folder, or among those that come with LongMem."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "shipped"  # setup.py puts them there

SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
"""Holds `configs/` and `ds_configs/`: a folder of the installed package, or the repository."""


def find_file(name: str | Path) -> Path | None:
    """The file or folder in the working folder, else the shipped one; None where there is neither."""
    return next((path for path in (Path(name), SHIPPED / name) if os.path.lexists(path)), None)


def looked_in(name: str | Path) -> str:
    """The part of an error that says where `find_file` looked; empty where the name says it."""
    return "" if Path(name).is_absolute() else f"; looked in: {Path.cwd()} and {SHIPPED}"
