"""What the backbone says of one segment: taps, the calls of its layers, memory keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerCall:
    """How the backbone called one of its layers, but for the hidden states: masks, rotary tables, ALiBi, ...

    A SideNet layer is a copy of a backbone layer, so it can be called the same way, whatever the family.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one attention layer, before any rotary embedding.

    Attributes:
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, D]`.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Encoding:
    """One encoded segment.

    Attributes:
        taps: Number of layers passed -> residual stream `[B, T, E]`.
        calls: Backbone layer, counted from 1 -> how it was called.
        memory: Keys and values of each memory layer, in the order the backbone was built with.
        documents: Document of each token, int64 `[B, T]`, where attention must not cross documents; else None.
    """

    taps: Mapping[int, Tensor]
    calls: Mapping[int, LayerCall] = field(repr=False)
    memory: Sequence[KeyValue] = field(repr=False)
    documents: Tensor | None = None
