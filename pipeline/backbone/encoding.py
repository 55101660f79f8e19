"""What the backbone says of one segment: taps, the calls of its layers, memory keys and values.

Named tuples, not dataclasses: DeepSpeed's ZeRO-3 hooks walk through a module's output and know only containers that
Python has built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class LayerCall(NamedTuple):
    """How the backbone called one of its layers, but for the hidden states: masks, rotary tables, ALiBi, ...

    A SideNet layer is a copy of a backbone layer, so it can be called the same way, whatever the family.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, before any rotary embedding.

    Attributes:
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, D]`.
    """

    key: Tensor
    value: Tensor


class Encoding(NamedTuple):
    """One encoded segment.

    Attributes:
        taps: Number of layers passed -> residual stream `[B, T, E]`.
        calls: Backbone layer, counted from 1 -> how it was called.
        memory: Keys and values of each memory layer, in the order the backbone was built with.
        documents: Document of each token, int64 `[B, T]`, where attention must not cross documents; else None.
        sinks: For each memory layer the key and value `[1, Hkv, 1, D]` of a token encoded alone, which every query can
            read; none: empty.
    """

    taps: Mapping[int, Tensor]
    calls: Mapping[int, LayerCall]
    memory: Sequence[KeyValue]
    documents: Tensor | None = None
    sinks: Sequence[KeyValue] = ()
