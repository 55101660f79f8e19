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

import shutil
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.errors import TrainingError
from pipeline.metrics.atomic import PARTIAL, write_text
from pipeline.metrics.folder import write_versions
from pipeline.metrics.status import STATUS_NAME
from pipeline.training.run_lock import LOCK_NAME

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
    "data": {"path", "verify"},  # likewise
}


def is_claimed(folder: Path) -> bool:
    """Whether a run has written into a folder.

    Args:
        folder: The run folder; may be missing.

    Returns:
        The answer.
    """
    return (folder / _CONFIG_NAME).is_file()


def check_folder(folder: Path, config: Config) -> None:
    """Checks that the run may use its folder; writes nothing.

    Args:
        folder: The run folder; may be missing.
        config: The run's settings.

    Raises:
        TrainingError: It holds a run of another configuration, a run that is not to be resumed, or something else.
    """
    path = folder / _CONFIG_NAME
    # What a job leaves that was stopped while its weights were loaded.
    nothing = {STATUS_NAME, LOCK_NAME, SCRATCH}
    if path.is_file():
        _check_same(path, config)
        if config.run.resume == "none":
            raise TrainingError(
                "the run folder already holds this run, and run.resume is 'none'",
                got=str(folder),
                do="set run.resume to 'auto' to go on with it, or choose another run.output_dir",
            )
    elif folder.is_dir() and any(
        found.name not in nothing and not found.name.endswith(PARTIAL) for found in folder.iterdir()
    ):
        raise TrainingError(
            "the run folder holds something that is not a run; nothing was written",
            got=f"{folder} without config.yaml",
            do="choose an empty or new run.output_dir",
        )
    elif folder.exists() and not folder.is_dir():
        raise TrainingError("run.output_dir is not a folder", got=str(folder), do="choose another run.output_dir")


def claim(folder: Path, config: Config) -> None:
    """Writes configuration and versions into the run folder; called when nothing but training is left to do.

    Args:
        folder: The run folder; made if missing.
        config: The run's settings.

    Raises:
        TrainingError: As `check_folder`.
    """
    check_folder(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # left if a start was killed while it loaded
    write_text(folder / _CONFIG_NAME, dump_config(config))
    write_versions(folder)


def _check_same(path: Path, config: Config) -> None:
    found, wanted = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(config.model_dump(mode="json"))
    other = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if other:
        raise TrainingError(
            "the run folder holds a run of another configuration; nothing was written",
            got=", ".join(f"{name} {wanted.get(name)!r}" for name in other),
            expected=", ".join(f"{name} {found.get(name)!r}" for name in other) + f" ({path})",
            do="choose another run.output_dir, or give the settings of that run to go on with it",
        )


def _flat(sections: Any) -> dict[str, Any]:
    """`section.key` -> value, without what may change."""
    if not isinstance(sections, dict):
        return {}
    return {
        f"{section}.{key}": tuple(value) if isinstance(value, list) else value
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if key not in CHANGEABLE.get(section, ())
    }
