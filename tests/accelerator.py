"""What depends on the accelerator, decided by a test: which precisions it has, by which road memory is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from pipeline.memory import attend, layer, search
from pipeline.memory.read import GroupRead


def read_as_on_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Everything at once, padded, products of rows with a vector as batches of matrix products, and no host waits."""
    patch.setattr(GroupRead, "is_waited_for", property(lambda group: group.exchange.size == 1))
    patch.setattr(attend, "_pieces", lambda _, one: [(slice(None), one)] * bool(len(one.members)))
    for user in (attend, layer):
        patch.setattr(user, "row_products", lambda q, k, scale: torch.bmm(q, k.transpose(1, 2)).mul_(scale))
    patch.setattr(search, "at_once", lambda count, *_, **__: count)


@contextmanager
def accelerator_with(*, fp16: bool) -> Iterator[None]:
    """Decides whether the accelerator says that it computes in fp16. Every CPU can, but only some by themselves."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: fp16)
        yield
