"""The place of a store: what is there is agreed on at the start, and nothing else is replaced at the end.

Where nothing is yet, the store is made beside the place and renamed to it when it is whole. An empty folder may be a
mount point, which cannot be renamed to, or stand in a folder of somebody else: it is filled in place, store.json last.
A store is exchanged for the new one by two renames, if it is still the same and has nothing foreign in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.claim import Claim, remove
from pipeline.data.ending import StopSignals
from pipeline.data.info import INFO_FILE, is_store
from pipeline.data.replaced import Inventory, inventory, no_store, replaceable
from pipeline.data.text import readable
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

_OF_FILE_SYSTEMS = {"lost+found"}
_REPLACED = "replaced"
_INSIDE = ".preparing"
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


@dataclass(frozen=True)
class Place:
    """Where a store goes, as it is at the start.

    Attributes:
        output: The folder, without symbolic links.
        in_place: Whether an empty folder is there, which is filled.
        replaced: The files of the store that is there: by name inode, bytes, and time of change in ns.
    """

    output: Path
    in_place: bool = False
    replaced: Inventory = field(default_factory=dict)

    def claim(self) -> Claim:
        """Lock and work folder of this place: inside a folder that is filled, else beside."""
        return Claim(self.output, _INSIDE) if self.in_place else self.claim_beside()

    def claim_beside(self) -> Claim:
        """What claims it where nothing, or a store, is there."""
        return Claim(self.output.parent, f".{self.output.name}{_INSIDE}")


def agree(output: Path, *, overwrite: bool) -> Place:
    """Look at the place of a store before anything is done.

    Args:
        output: The folder that was asked for.
        overwrite: Whether a store that is there may be replaced.

    Returns:
        The place.

    Raises:
        DataError: There is something that cannot or must not be replaced.
    """
    try:
        output = Path(os.path.realpath(output))
        str(output).encode("utf-8")  # Arrow opens no other files
        entries = _entries(output) if os.path.lexists(output) else None
    except UnicodeEncodeError as error:
        raise DataError("the name of the output is not UTF-8", got=readable(output), do="choose another") from error
    except NotADirectoryError as error:
        raise no_store(output, "a file") from error
    except OSError as error:
        raise cannot_write(output, error) from error
    if entries is None:
        return Place(output)
    if not entries:
        return Place(output, in_place=True)
    if not is_store(output):
        raise no_store(output, f"a folder with {', '.join(sorted(entries)[:5])}")
    if not overwrite:
        raise DataError(
            "the output exists already",
            got=readable(output),
            do="choose another --output, or give --overwrite to replace it",
        )
    try:
        return Place(output, replaced=replaceable(output))
    except OSError as error:
        raise cannot_write(output, error) from error


@contextlib.contextmanager
def work_folder(place: Place, *, overwrite: bool, stop: StopSignals) -> Iterator[tuple[Place, Path]]:
    """Holds the place, and has a folder for what is not finished; gone at the end, however it comes.

    Args:
        place: What was agreed on.
        overwrite: As it was given to ``agree``.
        stop: Undoes all of it when a signal ends the process.

    Yields:
        The place as it is now that nobody else prepares it, and the work folder.

    Raises:
        DataError: Another preparation is making this store, or nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            if place.in_place and place.claim_beside().lock.exists():
                # The folder is empty because another has just put the store aside: it refuses us, or has left it so.
                with place.claim_beside().held(rescue=lambda left: _rescue(left, place.output), stop=stop):
                    place = agree(place.output, overwrite=overwrite)
            claim = place.claim()
            stack.enter_context(_parents(claim.lock.parent, stop))
            stack.enter_context(claim.held(rescue=lambda left: _rescue(left, place.output), stop=stop))
            now = agree(place.output, overwrite=overwrite)
            if now.in_place != place.in_place:
                raise _taken(place.output)
            _warn_of_others(claim)
            stack.enter_context(stop.undoing(lambda: remove(claim.work)))
            claim.work.mkdir(mode=0o700)
        except OSError as error:
            raise cannot_write(place.output, error) from error
        yield now, claim.work


def publish(place: Place, work: Path, store: Path) -> None:
    """Put the finished store in its place; one that it replaces goes away with the work folder.

    Args:
        place: What was agreed on.
        work: The work folder.
        store: The finished store in it.

    Raises:
        DataError: Something else is at the place now. It is left as it is.
    """
    try:
        if place.in_place:
            _fill(store, place.output)
        elif place.replaced:
            _exchange(place, work, store)
        else:
            _put(store, place.output)
    except OSError as error:
        raise cannot_write(place.output, error) from error


def _put(store: Path, output: Path) -> None:
    """Renames a folder to where nothing is. Rename alone would replace an empty folder."""
    try:
        os.mkdir(output)
        try:
            os.rename(store, output)  # refused if somebody has put something in meanwhile
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(output)
            raise
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(output) from error
        raise


def _fill(store: Path, output: Path) -> None:
    if _entries(output):
        raise _taken(output)
    names = sorted((path.name for path in store.iterdir()), key=lambda name: (name == INFO_FILE, name))
    moved = []
    try:
        for name in names:
            os.rename(store / name, output / name)
            moved.append(name)
    except BaseException:
        for name in reversed(moved):
            os.rename(output / name, store / name)
        raise


def _exchange(place: Place, work: Path, store: Path) -> None:
    aside = work / _REPLACED
    try:
        os.rename(place.output, aside)
    except FileNotFoundError as error:
        raise _taken(place.output) from error
    try:
        # Looked at here, where nobody else looks for it: nothing can be put in after this.
        if aside.is_symlink() or not aside.is_dir() or inventory(aside) != place.replaced:
            raise _taken(place.output)
        _put(store, place.output)
    except BaseException:
        _put_back(aside, place.output)
        raise


def _put_back(aside: Path, output: Path) -> None:
    try:
        if os.path.lexists(output):
            os.rmdir(output)  # only an empty one, such as `_put` makes
        os.rename(aside, output)
    except OSError:
        kept = output.with_name(f"{output.name}.before-{aside.parent.name[-8:]}")
        os.rename(aside, kept)
        logger.error("what was at %s is now at %s", output, kept)


def _rescue(left: Path, output: Path) -> None:
    """Puts back what a preparation that was killed between two renames had put aside."""
    aside = left / _REPLACED
    if os.path.lexists(aside) and not is_store(output):
        logger.warning("%s was put aside by a preparation that was killed; it goes back to its place", aside)
        _put_back(aside, output)


def _warn_of_others(claim: Claim) -> None:
    prefix = claim.work.name[: -len("-00000000")] + "-"
    for path in sorted(claim.work.parent.iterdir()):
        if path.name.startswith(prefix):
            logger.warning("%s was left by a preparation that was killed; it can be deleted", readable(path))


@contextlib.contextmanager
def _parents(folder: Path, stop: StopSignals) -> Iterator[None]:
    """Makes the folders above; those that it made and that are empty at the end go away again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]

    def unmake() -> None:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()

    with stop.undoing(unmake):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
        yield


def _entries(folder: Path) -> set[str]:
    """What is in a folder besides what file systems and preparations put there."""
    ours = (f"{_INSIDE}-", f"{_INSIDE}.lock")
    return {name for name in os.listdir(folder) if name not in _OF_FILE_SYSTEMS and not name.startswith(ours)}


def cannot_write(output: Path, error: OSError) -> DataError:
    """The words for an output where nothing can be written."""
    where = f": {readable(error.filename)}" if error.filename else ""
    return DataError(
        "the output cannot be written",
        got=f"{readable(output)} ({error.strerror or error}{where})",
        expected="a folder in which you may make files, or a place for one",
        do="choose another --output",
    )


def _taken(output: Path) -> DataError:
    return DataError(
        "something else is at the output than when the store was begun",
        got=f"{readable(output)}, which is left as it is; the new store is taken away",
        do="see what is there, and choose another --output",
    )
