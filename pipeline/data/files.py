"""Finding the input files. What cannot be read is named, never passed over: as an error, or on a list."""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.text import home, readable
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_NAMED = 5


def is_text_file(name: str) -> bool:
    """Whether a file of this name is read; small and capital letters are the same."""
    return name.lower().endswith(SUFFIXES)


def find_files(inputs: Sequence[str | Path], *, left_out: list[str] | None = None) -> list[Path]:
    """List the input files: those given, and those below the folders given; each file once, in a fixed order.

    Args:
        inputs: Files and folders. Folders are searched to any depth, through symbolic links too; hidden files and
            folders in them are skipped.
        left_out: Gets a line for each file and folder that cannot be read, which is left out then; None if that is an
            error.

    Returns:
        The files; in the order of the inputs, those of a folder sorted.

    Raises:
        DataError: An input is missing, is of an unknown kind, is a folder without readable files, or cannot be read.
    """
    search = _Search()
    found: dict[str, Path] = {}
    for given in inputs:
        for path in search.expand(home(given)):
            found.setdefault(os.path.realpath(path), path)
    if search.unreadable and left_out is None:
        raise DataError(
            "some inputs cannot be read",
            got=_shortened(search.unreadable),
            do="give yourself the right to read them, take them away, or leave them out with --skip-unreadable",
        )
    for line in search.unreadable:
        logger.warning("left out, cannot be read: %s", line)
    if left_out is not None:
        left_out += [line for line in search.unreadable if line not in left_out]
    if inputs and not found:
        raise DataError("no input can be read", got=_shortened(search.unreadable))
    return list(found.values())


@dataclass
class _Search:
    """Collects what cannot be read, a line each."""

    unreadable: list[str] = field(default_factory=list)

    def expand(self, path: Path) -> list[Path]:
        """The files that one input stands for."""
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "an input is a symbolic link to nothing" if path.is_symlink() else "an input does not exist"
            raise DataError(what, got=readable(path), do="check the path") from error
        except OSError as error:
            self._cannot_read(path, error.strerror)
            return []
        if stat.S_ISDIR(mode):
            return self._below(path)
        if not is_text_file(path.name):
            raise DataError("an input file is of an unknown kind", got=readable(path), expected=", ".join(SUFFIXES))
        return [path] if self._can_read(path) else []

    def _below(self, folder: Path) -> list[Path]:
        before, passed_over = len(self.unreadable), Counter[str]()
        files = []
        for path in self._walk(folder):
            if not is_text_file(path.name):
                passed_over[path.suffix or "no suffix"] += 1
            elif self._can_read(path):
                files.append(path)
        if passed_over:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(passed_over.items()))
            logger.info("passed over in %s, files of other kinds: %s", readable(folder), readable(kinds))
        if not files and len(self.unreadable) == before:
            kinds = ", ".join(SUFFIXES)
            raise DataError(
                "an input folder has no readable files", got=readable(folder), expected=f"files in {kinds}, not hidden"
            )
        return sorted(files)

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Everything below a folder that is no folder, not hidden. Each folder is looked into once, whatever its names.

        Links to folders wait until the others are done: what can be reached without a link keeps the name without.
        """
        seen = set()
        waiting, linked = deque([folder]), deque[Path]()
        while waiting or linked:
            here = waiting.popleft() if waiting else linked.popleft()
            try:
                found = os.stat(here)
                if (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
                with os.scandir(here) as listing:
                    entries = [entry for entry in listing if not entry.name.startswith(".")]
            except OSError as error:
                self._cannot_read(here, error.strerror)
                continue
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = here / entry.name
                try:
                    if entry.is_dir():
                        (linked if entry.is_symlink() else waiting).append(path)
                    elif is_text_file(entry.name) or not self._leads_nowhere(entry):
                        yield path
                except OSError as error:
                    self._cannot_read(path, error.strerror)

    def _leads_nowhere(self, entry: os.DirEntry[str]) -> bool:
        """A link to nothing may have been one to a folder of texts, on a disk that is not there."""
        if not entry.is_symlink() or os.path.exists(entry.path):
            return False
        if not Path(entry.name).suffix:
            self._cannot_read(Path(entry.path), "symbolic link to nothing")
        return True

    def _can_read(self, path: Path) -> bool:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would be to wait for its writer
                self._cannot_read(path, "not a regular file")
                return False
            with open(path, "rb"):
                return True
        except FileNotFoundError:
            self._cannot_read(path, "symbolic link to nothing" if path.is_symlink() else "gone while it was looked at")
        except OSError as error:
            self._cannot_read(path, error.strerror)
        return False

    def _cannot_read(self, path: Path, why: str | None) -> None:
        self.unreadable.append(f"{readable(path)} ({why or 'input/output error'})")


def _shortened(lines: Sequence[str]) -> str:
    more = f", and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return ", ".join(lines[:_NAMED]) + more
