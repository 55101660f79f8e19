"""What --overwrite may replace: a store, all of it, and nothing that somebody else has put beside or into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from pipeline.data.info import INFO_FILE
from pipeline.data.text import readable
from pipeline.errors import DataError

_SPLIT_FILES = ("data-*.arrow", "cache-*.arrow", "state.json", "dataset_info.json")

Inventory = dict[str, tuple[int, int, int]]
"""Of a file by its name: inode, bytes, time of change in ns."""


def replaceable(output: Path) -> Inventory:
    """The files of a store that may be replaced as a whole.

    Args:
        output: The folder of the store.

    Returns:
        All that is in it.

    Raises:
        DataError: It is no store, has foreign files in it, or is a mount point.
        PermissionError: It may not be replaced.
    """
    try:
        whole = json.loads((output / INFO_FILE).read_text(encoding="utf-8"))
        int(whole["format_version"])
        splits = {name: set(split.get("files", ())) for name, split in whole["splits"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise no_store(output, f"a folder whose {INFO_FILE} is not that of a store") from error
    files = inventory(output)
    foreign = [name for name in files if name != INFO_FILE and not _is_ours(name, splits)]
    if foreign:
        raise DataError(
            "the store at the output has foreign files in it, which --overwrite would delete",
            got=f"{readable(output)} with {readable(', '.join(sorted(foreign)[:5]))}",
            do="move them away, or choose another --output",
        )
    if _is_mount_point(output):
        raise DataError(
            "the output is a mount point with a store in it, which cannot be exchanged as a whole",
            got=readable(output),
            do="delete what is in it and start again, or choose a folder below it as --output",
        )
    for folder in (output, output.parent):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return files


def inventory(folder: Path) -> Inventory:
    """All that is below a folder: files, links, and folders without anything in them."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    for here, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        empty = [name for name in folders if name not in links and not os.listdir(os.path.join(here, name))]
        for name in (*names, *links, *empty):
            path = os.path.join(here, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _is_ours(name: str, splits: Mapping[str, set[str]]) -> bool:
    """Whether a file is one of a store's; `splits`: the files of each split, none where the store does not say."""
    split, _, file = name.rpartition("/")
    if split not in splits:
        return False
    return file in (splits[split] or {file}) and any(fnmatch(file, kind) for kind in _SPLIT_FILES)


def _is_mount_point(folder: Path) -> bool:
    """Whether it is one, a bind mount of the same file system too, which os.path.ismount does not see."""
    return os.path.ismount(folder) or _mount_of(folder) != _mount_of(folder.parent)


def _mount_of(folder: Path) -> str:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
            return next((line for line in lines if line.startswith("mnt_id:")), "")
        finally:
            os.close(descriptor)
    return ""


def no_store(output: Path, what: str) -> DataError:
    """The words for an output that is something else."""
    return DataError(
        "the output exists and is not a token store",
        got=f"{readable(output)}, {readable(what)}",
        do="choose another --output",
    )
