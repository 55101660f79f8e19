"""What the backbone says of one segment: taps, the calls of its layers, memory keys and values.

Named tuples, not dataclasses: DeepSpeed's ZeRO-3 hooks walk through a module's output and know only containers that
Python has built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache

_MASK_AXES = (-2, -1)
_TOKEN_AXES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"attention_mask": _MASK_AXES, "position_embeddings": (-2,), "position_ids": (-1,), "alibi": (-1,)}
)
"""Where the arguments of a layer count tokens: queries, then keys in a mask `[B, 1, T, T]`, angles in `[B, T, D]`."""


def _after(argument: Any, count: int, *, axes: tuple[int, ...] | None) -> Any:
    """All but the first tokens of an argument of a layer."""
    if isinstance(argument, tuple):
        return tuple(_after(part, count, axes=axes) for part in argument)
    if not isinstance(argument, Tensor):
        return argument
    assert axes is not None, f"an argument of a layer, {tuple(argument.shape)}, of which is not known where tokens are"
    for axis in axes:
        argument = argument.narrow(axis, count, argument.shape[axis] - count)
    return argument


class LayerCall(NamedTuple):
    """How the backbone called one of its layers, but for the hidden states: masks, rotary tables, ALiBi, ...

    A SideNet layer is a copy of a backbone layer, so it can be called the same way, whatever the family.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def after(self, count: int) -> LayerCall:
        """How a layer is called for all but the first tokens."""
        args = tuple(_after(arg, count, axes=_MASK_AXES) for arg in self.args)
        return LayerCall(args, {name: _after(x, count, axes=_TOKEN_AXES.get(name)) for name, x in self.kwargs.items()})

    def with_mask(self, mask: Tensor | None) -> LayerCall:
        """The same call with another mask: by keyword, or (GPT-2) as the second argument after the hidden states."""
        if "attention_mask" in self.kwargs:
            return self._replace(kwargs={**self.kwargs, "attention_mask": mask})
        return self._replace(args=(self.args[0], mask, *self.args[2:]))

    def with_cache(self, cache: Cache, *, num_keys: int) -> LayerCall:
        """The same call with another cache, which will hold the last `num_keys` tokens of those in its own."""
        args = tuple(cache if isinstance(arg, Cache) else arg for arg in self.args)
        kwargs = {name: cache if isinstance(arg, Cache) else arg for name, arg in self.kwargs.items()}
        if isinstance(alibi := kwargs.get("alibi"), Tensor):
            kwargs["alibi"] = alibi[..., -num_keys:]
        return LayerCall(args, kwargs)


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
        taps: Number of layers passed -> residual stream `[B, T, E]`; one more than there are: after the final norm.
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

    def after(self, count: int) -> Encoding:
        """What is said of all but the first tokens."""
        if count == 0:
            return self
        return Encoding(
            {layers: tap[:, count:] for layers, tap in self.taps.items()},
            {layer: call.after(count) for layer, call in self.calls.items()},
            [KeyValue(memory.key[:, :, count:], memory.value[:, :, count:]) for memory in self.memory],
            None if self.documents is None else self.documents[:, count:],
        )
