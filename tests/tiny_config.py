"""A small valid configuration of a run, for tests of what it configures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Config

_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "run": {"output_dir": "unused"},
    "backbone": {"path": "unused"},
    "data": {"path": "unused", "lanes": 2},
    "memory": {"tokens": 32, "chunk_size": 4, "top_k_tokens": 8, "query_block_tokens": 5},
    "sidenet": {},
    "train": {"steps": 2, "segment_tokens": 16, "loss_piece_tokens": 7},
    "checkpoint": {},
    "evaluation": {"documents": 1, "context_tokens": 16, "scored_tokens": 16},
}


def tiny_config(**overrides: Mapping[str, Any]) -> Config:
    """A configuration with small numbers.

    Args:
        **overrides: Section name to its keys that differ, such as `memory={"chunk_size": 2}`.
    """
    unknown = set(overrides) - set(_SECTIONS)
    if unknown:
        raise KeyError(f"no such sections: {sorted(unknown)}")
    return Config.model_validate({name: {**keys, **overrides.get(name, {})} for name, keys in _SECTIONS.items()})
