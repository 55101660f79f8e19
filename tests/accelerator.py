"""Reads memory on the CPU by the road that an accelerator takes."""

from __future__ import annotations

import pytest
import torch

from pipeline.memory import attend, search


def read_as_on_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Everything at once, padded, and products of rows with a vector as batches of matrix products."""
    patch.setattr(attend, "_pieces", lambda _, one: [(slice(None), one)] * bool(len(one.members)))
    patch.setattr(attend, "_dot", lambda rows, vector: torch.bmm(rows, vector[..., None])[..., 0])
    patch.setattr(search, "at_once", lambda count, *_, **__: count)
