"""What a checkpoint says of itself: its files with size and SHA-256, and whether they are what it says.

A manifest vouches for itself too: its last entry is the SHA-256 of all others, so that a bit that flipped in it is
found before anything it says is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.config.untrusted import Typed, parse_json, read_small, shown, what_is_wrong
from pipeline.errors import CheckpointError
from pipeline.files import hash_file

FORMAT = 3
_READABLE = (2, FORMAT)  # 2 stores the memory in the order of its slots: the first version of `pipeline/memory/file.py`
MANIFEST = "manifest.json"
_OWN_HASH = "manifest_sha256"
_MANIFEST_BYTES = 256 << 20  # of a million files
_MOST_RANKS = 1_000_000
_NAMED = 10  # problems in one message
_NAMED_BY_STEP = re.compile(r"(?:step|aside)_([0-9]+)")


class DamageError(CheckpointError):
    """A checkpoint is not whole: an older one may be."""


class FileEntry(Typed):
    """What a manifest says of a file.

    Attributes:
        size: Bytes.
        sha256: Hash of its content.
    """

    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def _inside(name: str) -> str:
    """Checks the name of a file: a manifest must not have anything read outside its checkpoint."""
    path = PurePosixPath(name)
    is_plain = name.isascii() and name.isprintable() and str(path) == name
    if not is_plain or path.is_absolute() or ".." in path.parts or name in (".", MANIFEST):
        raise ValueError("not the name of a file below the checkpoint")
    return name


class Manifest(Typed):
    """What a checkpoint says of itself.

    Attributes:
        step: Optimizer steps done.
        world_size: Ranks that wrote it.
        group_size: Ranks of a memory group then.
        identity: What it must have in common with the run that loads it.
        files: Name below the checkpoint to size and hash.
    """

    step: int = Field(ge=0, lt=2**63)
    world_size: int = Field(ge=1, le=_MOST_RANKS)
    group_size: int = Field(ge=1, le=_MOST_RANKS)
    identity: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry]

    @model_validator(mode="after")
    def _check_groups(self) -> Manifest:
        if self.world_size % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {self.world_size} ranks")
        return self


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest: plain JSON, with the hash of the content added."""
    return json.dumps({**content, _OWN_HASH: _content_hash(content)}, indent=1)


def read_manifest(checkpoint: Path) -> Manifest:
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
        content = parse_json(read_small(path, limit=_MANIFEST_BYTES))
        is_first_format = isinstance(content, dict) and content.get("format") == 1  # it had no hash of its own
        if not is_first_format and content.pop(_OWN_HASH) != _content_hash(content):
            raise ValueError("it has another hash than it says")
        found = content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_whole(checkpoint, f"{type(error).__name__} at {path.name}") from error
    if found not in _READABLE:
        raise CheckpointError(
            f"{checkpoint} has another format",
            got=f"format {shown(found)}",
            expected=f"format {' or '.join(map(str, _READABLE))}",
            do="resume it with the version of LongMem that wrote it",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise _not_whole(checkpoint, f"{what_is_wrong(error)} in {path.name}") from error
    named = _NAMED_BY_STEP.fullmatch(os.path.basename(os.path.abspath(checkpoint)))
    if named is not None and int(named[1]) != manifest.step:
        raise _not_whole(checkpoint, f"{path.name} of step {manifest.step}")
    return manifest


def _not_whole(checkpoint: Path, got: str) -> DamageError:
    return DamageError(
        f"{checkpoint} is not a whole checkpoint",
        got=got,
        expected=f"a folder step_* with its {MANIFEST}",
        do="give the folder of a checkpoint to run.resume, or 'auto', or 'none' with another run.output_dir",
    )


def files_below(folder: Path) -> list[str]:
    """Names, relative and sorted, of all below a folder that is no folder itself; without the manifest."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in (*names, *links)]
    return sorted(name for name in found if name != MANIFEST)


def digest(path: Path, *, flush: bool = False) -> dict[str, Any]:
    """A file's entry in a manifest, `size` in bytes and `sha256`; `flush`: it is on the disk when this returns."""
    size, sha256 = hash_file(path, flush=flush)
    return {"size": size, "sha256": sha256}


def check_names_and_sizes(checkpoint: Path, files: Mapping[str, FileEntry]) -> None:
    """Checks without reading. Raises DamageError: a file is missing, unlisted, or has another size."""
    wrong = [_wrong_size(checkpoint, name, entry) for name, entry in files.items()]
    # What somebody put there DeepSpeed, which goes by the names in a folder, must not unpickle.
    foreign = [f"{name} is not in the manifest" for name in files_below(checkpoint) if name not in files]
    raise_damage(checkpoint, [*(problem for problem in wrong if problem is not None), *foreign])


def damaged(checkpoint: Path, files: Mapping[str, FileEntry], names: Sequence[str]) -> list[str]:
    """Reads the files `names` and says, in words, which are not what the manifest's `files` says."""
    problems = []
    for name in names:
        try:
            wrong = _wrong_size(checkpoint, name, files[name])
            if wrong is None and digest(checkpoint / name)["sha256"] != files[name].sha256:
                wrong = f"{name} has another hash"
        except OSError as error:  # a bad sector: damage like any other
            wrong = f"{name} cannot be read ({error.strerror})"
        if wrong is not None:
            problems.append(wrong)
    return problems


def raise_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    """Raises DamageError, which names the problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DamageError(
            f"the checkpoint {checkpoint} is corrupt",
            got="; ".join(sorted(problems)[:_NAMED]) + more,
            do="resume from another one with --run.resume DIR, or start anew in another --run.output_dir",
        )


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _wrong_size(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a file without reading it."""
    try:
        real, base = os.path.realpath(folder / name), os.path.realpath(folder)
        if not real.startswith(base + os.sep):
            return f"{name} leads outside the checkpoint"
        if not os.path.isfile(real):
            return f"{name} is missing"
        size = os.stat(real).st_size
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    return None if size == entry.size else f"{name} has {size} bytes instead of {entry.size}"
