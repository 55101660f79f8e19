"""The form of a LongMem in a folder: the names of its files, its version, and what its config.json says.

Read here as plain JSON; `pipeline.face.configuration` reads the same as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.export import WEIGHTS
from pipeline.config.model import ModelSettings
from pipeline.config.untrusted import parse_json, read_small, short, shown
from pipeline.errors import CheckpointError, ConfigError, in_a_line

FORMAT, MODEL_TYPE = 1, "longmem"
CONFIG, GENERATION, BACKBONE = "config.json", "generation_config.json", "backbone"


@dataclass(frozen=True)
class Saved:
    """What a config.json says.

    Attributes:
        settings: What the model is.
        backbone: Folder or hub name of its backbone; empty: it is not known.
        backbone_hash: Its identity; empty: it is not known.
        step: Of the training; 0: it is not known.
    """

    settings: ModelSettings
    backbone: str
    backbone_hash: str
    step: int


def is_saved(folder: Path) -> bool:
    """Whether a LongMem lies in a folder in this form. Raises CheckpointError: its config.json cannot be read."""
    return (folder / CONFIG).is_file() and _content(folder).get("model_type") == MODEL_TYPE


def read_saved(folder: Path) -> Saved:
    """Reads what the config.json of a saved LongMem says.

    Args:
        folder: Where it lies.

    Returns:
        What it says; a backbone that lies beside it by its whole path.

    Raises:
        CheckpointError: It is of a newer version, or damaged.
        ConfigError: Its settings hold what this version does not know, or contradict each other.
    """
    content = _content(folder)
    check_format(content.get("longmem_format", FORMAT))
    texts = [content.get(name) or "" for name in ("backbone_name", "backbone_hash")]
    settings, trained = content.get("settings") or {}, content.get("trained") or {}
    if not all(isinstance(text, str) for text in texts) or not isinstance(trained, dict):
        raise no_model(folder, CONFIG, f"backbone_name and backbone_hash are {shown(texts)}, trained {shown(trained)}")
    name, step = texts[0], trained.get("step")
    return Saved(
        check_settings(settings),
        str(folder / BACKBONE) if name == BACKBONE else name,
        texts[1],
        step if type(step) is int and step > 0 else 0,
    )


def check_format(found: object) -> None:
    """Raises CheckpointError where a model was saved in a form that this version does not know."""
    if found != FORMAT:
        raise CheckpointError(
            "the model was saved by a newer version",
            got=f"longmem_format {shown(found)}",
            expected=FORMAT,
            do="load it with the version of LongMem that saved it",
        )


def check_settings(settings: Any) -> ModelSettings:
    """The settings of a saved model. Raises ConfigError: they hold what this version does not know."""
    try:
        return ModelSettings.model_validate(settings)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([" ".join(str(error).split())[:600]], source="settings of the saved model") from error


def no_model(folder: Path | str, part: str, why: str) -> CheckpointError:
    """That a folder holds no model that can be loaded, for a file that is missing or damaged."""
    return CheckpointError(
        "the folder holds no LongMem",
        got=f"{short(str(folder))!r}: {part}: {why}",
        expected=f"{CONFIG} and {WEIGHTS}",
        do="make one with launch/export.py or save_pretrained",
    )


def _content(folder: Path) -> Mapping[str, Any]:
    try:
        found = parse_json(read_small(folder / CONFIG))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise no_model(folder, CONFIG, in_a_line(error)) from error
    return found
