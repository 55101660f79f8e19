"""What a checkpoint says of itself: its files with size and SHA-256, and whether they are what it says.

A manifest vouches for itself too: its last entry is the SHA-256 of all others, so that a bit that flipped in it is
found before anything it says is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"


class DamageError(CheckpointError):
    """A checkpoint is not whole: an older one may be."""


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest.

    Args:
        content: What it is to say, as plain JSON.

    Returns:
        JSON with the hash of the content added.
    """
    return json.dumps({**content, _OWN_HASH: _content_hash(content)}, indent=1)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads what a checkpoint says of itself.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        The manifest.

    Raises:
        DamageError: The folder is no checkpoint, or its manifest is damaged.
        CheckpointError: It has another format.
    """
    path = checkpoint / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_first_format = isinstance(manifest, dict) and manifest.get("format") == 1  # it had no hash of its own
        if not is_first_format and manifest.pop(_OWN_HASH) != _content_hash(manifest):
            raise ValueError("it has another hash than it says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(
            f"{checkpoint} is not a whole checkpoint",
            got=f"{type(error).__name__} at {path.name}",
            expected=f"a folder step_* with {MANIFEST}",
            do="give the folder of a checkpoint to run.resume, or 'auto', or 'none' with another run.output_dir",
        ) from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has another format",
            got=f"format {manifest['format']!r}",
            expected=f"format {FORMAT}",
            do="resume it with the version of LongMem that wrote it",
        )
    return manifest


def files_below(folder: Path) -> list[str]:
    """Names of everything below a folder that is not a folder itself.

    Args:
        folder: The folder.

    Returns:
        Paths relative to it, sorted; without the manifest.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(name for name in found if name != MANIFEST)


def digest(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """Size and hash of a file.

    Args:
        path: The file.
        flush: Whether it must be on the disk, not in a cache, when this returns.

    Returns:
        Its entry in a manifest: `size` in bytes and `sha256`.
    """
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
            size += len(block)
        if flush:
            os.fsync(file.fileno())
    return {"size": size, "sha256": found.hexdigest()}


def check_names_and_sizes(checkpoint: Path, files: Mapping[str, Any]) -> None:
    """Checks what can be seen without reading any file.

    Args:
        checkpoint: The checkpoint's folder.
        files: The files that its manifest lists.

    Raises:
        DamageError: A file is missing, has another size, or is not listed: whoever put it there, DeepSpeed, which goes
            by the names in a folder, must not unpickle it.
    """
    wrong = [_wrong_size(checkpoint, name, entry) for name, entry in files.items()]
    foreign = [f"{name} is not in the manifest" for name in files_below(checkpoint) if name not in files]
    raise_damage(checkpoint, [*(problem for problem in wrong if problem is not None), *foreign])


def damaged(checkpoint: Path, files: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Reads files and says which are not what the manifest says.

    Args:
        checkpoint: The checkpoint's folder.
        files: The files that its manifest lists.
        names: Which of them to read.

    Returns:
        What is wrong, in words.
    """
    problems = []
    for name in names:
        try:
            wrong = _wrong_size(checkpoint, name, files[name])
            if wrong is None and digest(checkpoint / name)["sha256"] != files[name]["sha256"]:
                wrong = f"{name} has another hash"
        except OSError as error:  # a bad sector: damage like any other
            wrong = f"{name} cannot be read ({error.strerror})"
        if wrong is not None:
            problems.append(wrong)
    return problems


def raise_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    """Fails if there are problems.

    Args:
        checkpoint: The checkpoint's folder.
        problems: What is wrong with its files.

    Raises:
        DamageError: Names them.
    """
    if problems:
        raise DamageError(
            f"the checkpoint {checkpoint} is corrupt",
            got="; ".join(sorted(problems)),
            do="resume from another one with --run.resume DIR, or start anew in another --run.output_dir",
        )


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _wrong_size(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a file without reading it."""
    if not (folder / name).is_file():
        return f"{name} is missing"
    size = (folder / name).stat().st_size
    return None if size == entry["size"] else f"{name} has {size} bytes instead of {entry['size']}"
