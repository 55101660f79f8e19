"""The run folder: who may write into it, and what it says of the run.

RUN/config.yaml        the resolved configuration
    versions.json      Python, packages, git commit
    metrics.jsonl      one object an optimizer step
    tensorboard/       the same, and histograms
    checkpoints/       see pipeline/checkpoint/folder.py
    evaluation.json    the held-out evaluation, and evaluation.txt, its table
    status.json        how it goes: running, finished, preempted or failed, and why
    lock               held by the job that writes here
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.fields import all_settings
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.config.untrusted import read_small, short, shown
from pipeline.config.yaml_text import read_yaml
from pipeline.errors import TrainingError
from pipeline.files import PARTIAL, write_text
from pipeline.metrics.folder import write_versions
from pipeline.training.job.run_lock import LOCK_NAME
from pipeline.training.job.status import STATUS_NAME

_CONFIG_NAME = "config.yaml"
SCRATCH = ".universal"  # made and removed while a checkpoint of another number of ranks is loaded
# Settings that may differ when a run goes on: they change how long or how visibly it runs, not what it computes.
CHANGEABLE = {
    "run": {"resume", "output_dir", "collective_timeout_s", "on_usr1"},
    "train": {"stop_after_steps", "histogram_every_steps", "loss_piece_tokens"},
    "memory": {"group_size"},  # a checkpoint is split anew over other ranks
    "checkpoint": {"every_steps", "every_minutes", "keep", "memory"},
    "evaluation": {"every_steps", "documents", "context_tokens", "scored_tokens"},
    "backbone": {"path"},  # its identity hash is compared instead
    "data": {"path", "sources", "verify"},  # likewise, and the shares of sources
}


def is_claimed(folder: Path) -> bool:
    """Whether a run has written into a folder, which may be missing."""
    return (folder / _CONFIG_NAME).is_file()


def check_folder(folder: Path, config: Config) -> None:
    """Checks that a run may use its folder; leaves it as it is. Raises TrainingError."""
    try:
        _check_holds(folder, config)
        _check_writable(folder)
    except OSError as error:
        raise unusable(folder, error) from error


def _check_holds(folder: Path, config: Config) -> None:
    path = folder / _CONFIG_NAME
    # What a job leaves that was stopped while its weights were loaded.
    nothing = {STATUS_NAME, LOCK_NAME, SCRATCH}
    if os.path.lexists(path):
        _check_same(path, config)
        if config.run.resume == "none":
            raise TrainingError(
                "the run folder already holds this run, and run.resume is 'none'",
                got=str(folder),
                do="set run.resume to 'auto' to go on with it, or choose another run.output_dir",
            )
    elif folder.is_dir():
        if any(found.name not in nothing and not found.name.endswith(PARTIAL) for found in folder.iterdir()):
            raise TrainingError(
                "the run folder holds something that is not a run; nothing was written",
                got=f"{folder} without config.yaml",
                do="choose an empty or new run.output_dir",
            )
    elif os.path.lexists(folder):
        raise TrainingError("run.output_dir is not a folder", got=str(folder), do="choose another run.output_dir")


def _check_writable(folder: Path) -> None:
    """Makes a folder where the run will write, and removes it: permissions and mounts are known only by trying."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(folder)  # tells names that are too long
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    Path(tempfile.mkdtemp(prefix=".longmem-", dir=place)).rmdir()


def unusable(folder: Path, error: OSError) -> TrainingError:
    """What is said when nothing can be written into a run folder."""
    return TrainingError(
        "run.output_dir cannot be used",
        got=f"{folder} ({error})",
        expected="a folder that can be made and written to",
        do="see to its disk (mounted, room, permissions), or choose another run.output_dir",
    )


def claim(folder: Path, config: Config) -> None:
    """Writes configuration and versions, once only training is left to do. Raises TrainingError as `check_folder`."""
    check_folder(folder, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # left if a start was killed while it loaded
        write_text(folder / _CONFIG_NAME, dump_config(config))
        write_versions(folder)
    except OSError as error:
        raise unusable(folder, error) from error


def is_gone(folder: Path) -> bool:
    """Whether a claimed run folder is there no more: removed, or emptied, while the run trains."""
    try:
        os.stat(folder / _CONFIG_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def gone(folder: Path) -> TrainingError:
    """What is said when the run folder is gone."""
    return TrainingError(
        "the run folder was removed while the run trained, or its settings were: the run ends",
        got=f"{folder} without {_CONFIG_NAME}",
        do="put the folder back with config.yaml and checkpoints and start again, or start anew",
    )


def _check_same(path: Path, config: Config) -> None:
    found, wanted = _flat(_read(path)), _flat(config.model_dump(mode="json"))
    # A setting that the version which wrote the file did not have does what it did by default.
    known = all_settings()
    found = {name: known[name].default for name in wanted if not known[name].required} | found
    other = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if other:
        raise TrainingError(
            "the run folder holds a run of another configuration; nothing was written",
            got=", ".join(f"{name} {shown(wanted.get(name))}" for name in other),
            expected=", ".join(f"{name} {shown(found.get(name))}" for name in other) + f" ({path})",
            do="choose another run.output_dir, or give the settings of that run to go on with it",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        sections = read_yaml(read_small(path))
        if not isinstance(sections, dict) or not all(isinstance(keys, dict) for keys in sections.values()):
            raise ValueError("it does not hold the sections of a configuration")
        return sections
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainingError(
            "the settings in the run folder are damaged; nothing was written",
            got=f"{path} ({short(' '.join(str(error).split()))})",
            expected="the settings that the run was started with",
            do=f"copy sidenet/config.yaml of one of its checkpoints to {path}, or choose another run.output_dir",
        ) from error


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value, without what may change."""
    return {
        f"{section}.{key}": tuple(value) if isinstance(value, list) else value
        for section, values in sections.items()
        for key, value in values.items()
        if key not in CHANGEABLE.get(section, ())
    }
