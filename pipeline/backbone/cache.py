"""A cache with room: what one more token adds is written behind the others, and nothing is copied to make room for it.

Shapes: `B` rows, `Hkv` key/value heads, `n` tokens, `D` head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # tokens


class Roomy:
    """A tensor `[B, Hkv, n, D]` that grows by tokens; its room doubles when it is full. Without gradients."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._length = 0

    @classmethod
    def of(cls, first: Tensor) -> Roomy:
        """One that begins with some tokens."""
        made = cls()
        made.add(first)
        return made

    @property
    def whole(self) -> Tensor:
        """All tokens, a view; there is at least one."""
        assert self._room is not None
        return self._room[:, :, : self._length]

    def add(self, new: Tensor) -> Tensor:
        """Adds tokens `[B, Hkv, q, D]`; all that are there now."""
        before, length = self._length, self._length + new.shape[2]
        if self._room is None or length > self._room.shape[2]:
            room = new.new_empty(*new.shape[:2], max(length, 2 * before, _LEAST_ROOM), new.shape[3])
            if self._room is not None:
                room[:, :, :before] = self._room[:, :, :before]
            self._room = room
        self._room[:, :, before:length] = new
        self._length = length
        return self._room[:, :, :length]


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rooms = Roomy(), Roomy()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values `[B, Hkv, q, D]`; all that are there now."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self._rooms
        self.keys, self.values = keys.add(key_states), values.add(value_states)
        return self.keys, self.values


class SegmentCache(DynamicCache):
    """Keys and values of a model's own attention while a segment is read in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = _RoomyLayer
