"""On an accelerator, what a read costs besides arithmetic: kernels that are started, and waits of the host for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.accelerator import read_as_on_an_accelerator
from tests.reference import Rules
from tests.unit.memory.worlds import DIM, HEADS, World

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::_unique2", "aten::unique_consecutive"}
START, TOKENS = 96, 16
MOST_OF_A_BLOCK, MOST_OF_A_READ = 200, 250  # seen: 188 and 211
# Operations that start nothing on a device.
VIEWS = {
    f"aten::{name}"
    for name in [
        "view",
        "reshape",
        "expand",
        "expand_as",
        "slice",
        "select",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
        "t",
        "flatten",
        "unflatten",
        "as_strided",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "detach",
        "resolve_conj",
        "resolve_neg",
        "lift_fresh",
        "alias",
        "_unsafe_view",
        "view_as",
        "split",
        "split_with_sizes",
        "unbind",
        "numpy_T",
        "narrow",
        "_reshape_alias",
        "resize_",
        "item",
        "to",
    ]
}


def counted(run: Callable[[], Any]) -> Counter[str]:
    """Operations that nothing smaller was made of."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    leaves = [event for event in found.events() if event.name.startswith("aten::")]
    return Counter(event.name for event in leaves if not any(c.name.startswith("aten::") for c in event.cpu_children))


def reading(
    monkeypatch: pytest.MonkeyPatch, *, tokens: int, block: int, position: str, **rules: Any
) -> tuple[Counter[str], Counter[str]]:
    """What one read and its backward pass start, on the road that an accelerator takes."""
    read_as_on_an_accelerator(monkeypatch)
    world = World(
        Rules(tokens=tokens, chunk_size=4, top_k_tokens=8, position=position, scope="lane", **rules), num_chunks=24
    )
    documents = torch.zeros(2, START, dtype=torch.int64)
    world.append(documents, start=0)
    reader = world.reader(documents[:, :TOKENS], start=START, block=block)
    query = world.randn(2, HEADS, TOKENS, DIM).requires_grad_(True)
    found: list[Any] = []
    forward = counted(lambda: found.append(reader.read(0, query)))
    total = found[0].values.sum() + (0 if found[0].window is None else found[0].window.values.sum())
    return forward, counted(total.backward)


SETTINGS: dict[str, dict[str, Any]] = {
    "head": {"position": "fixed:9"},
    "head, near": {"position": "clamp:14"},
    "kv_head": {"position": "fixed:9", "retrieve_for": "kv_head"},
    "kv_head, window": {"position": "fixed:9", "retrieve_for": "kv_head", "window_tokens": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_host_waits_once_a_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = reading(monkeypatch, tokens=80, block=4, **SETTINGS[name])
    assert sum(forward[wait] for wait in WAITS) == 1, "whether more chunks score alike than were looked at"
    assert sum(backward[wait] for wait in WAITS) == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_kernels_grow_with_blocks_and_with_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(**sizes: Any) -> tuple[int, int]:
        forward, backward = (
            sum(count for kernel, count in each.items() if kernel not in VIEWS)
            for each in reading(monkeypatch, **sizes, **SETTINGS[name])
        )
        return forward, backward

    one, two, three = (kernels(tokens=80, block=block) for block in (16, 8, 6))
    assert kernels(tokens=64, block=16) == one, "how much is remembered does not matter"
    for first, second, third in zip(one, two, three, strict=True):
        assert third - second == second - first  # of a block
        assert second - first < MOST_OF_A_BLOCK
        assert first < MOST_OF_A_READ
