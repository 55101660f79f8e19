"""Files of which each rank writes one: their names, and what is damage of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from pipeline.checkpoint.manifest import DamageError
from pipeline.config.untrusted import what_is_wrong
from pipeline.errors import LongMemError


def rank_file(folder: Path, rank: int, suffix: str = "safetensors") -> Path:
    """Where a rank's part of a state is stored.

    Args:
        folder: The owner's folder in a checkpoint.
        rank: The rank in the job.
        suffix: Kind of file.

    Returns:
        The file.
    """
    return folder / f"rank_{rank:05d}.{suffix}"


@contextmanager
def damage_of(path: Path) -> Iterator[Path]:
    """Whatever a file makes fail that should hold plain numbers is damage of this file."""
    try:
        yield path
    except ValidationError as error:
        raise DamageError(f"{path.name} holds something else", got=what_is_wrong(error)) from error
    except (
        OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError,
        SafetensorError, LongMemError,
    ) as error:  # fmt: skip
        raise DamageError(f"{path.name} holds something else", got=f"{type(error).__name__}: {error}") from error
