"""The Python standard library's own sources as a text corpus: long, self-referring documents on every machine."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from pipeline.errors import DataError

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"}


def collect(output: Path, *, min_bytes: int) -> int:
    """Copies the running interpreter's library modules into a folder, one `.txt` each.

    Args:
        output: The folder to make.
        min_bytes: Shorter files are left out.

    Returns:
        The number of files.

    Raises:
        DataError: The interpreter has no sources, or the folder is there already.
    """
    if os.path.lexists(output):
        raise DataError("the output exists already", got=output, do="name a folder that does not exist")
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in sorted(library.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(library).parts) and path.stat().st_size >= min_bytes
    ]
    if not found:
        raise DataError(
            "this Python has no library sources of that length",
            got=f"{library}, files of {min_bytes} bytes or more",
            do="give a folder of .txt files instead: bash launch/quickstart.sh --text DIR",
        )
    work = output.with_name(f"{output.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for path in found:
        name = ".".join(path.relative_to(library).with_suffix("").parts)
        (work / f"{name}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    work.rename(output)
    return len(found)
