"""How a model encodes positions, and which distance memory is read at.

Shapes: `H` query heads, `D` head size, `R` rotated dimensions (`R <= D`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionEncoding:
    """What one attention layer adds to its logits to know about distance; empty for learned positions.

    Attributes:
        inv_freq: Rotary frequencies in radians per token, float32 `[R / 2]`, or None.
        attention_scaling: Factor on the rotated query and on the rotated key (YaRN; 1.0 elsewhere).
        slopes: ALiBi slopes, float32 `[H]`, or None. The bias is `-slope * distance`.
    """

    inv_freq: Tensor | None = None
    attention_scaling: float = 1.0
    slopes: Tensor | None = None
    _known: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rotate(self, x: Tensor, positions: Tensor | int) -> Tensor:
        """Rotates queries or keys to their positions (RoPE, halves paired); the identity without rotary positions.

        Args:
            x: Queries or keys `[..., D]`, any floating dtype.
            positions: Positions in tokens, broadcastable to `x.shape[:-1]`; fractions and negatives are fine. A number
                is that of all, whose angles are worked out once.

        Returns:
            The rotated `x`, same shape and dtype.

        Source:
            Su et al. 2021, RoFormer, eq. 34, with dimension `i` paired with `i + R / 2`.
        """
        if self.inv_freq is None:
            return x
        if isinstance(positions, Tensor):
            return self._turned(x, *self._angles(positions, x))
        known = (positions, x.dtype, x.device)
        if known not in self._known:
            with torch.inference_mode(False):  # what is kept must serve learning, too
                self._known[known] = self._angles(torch.full((), positions, device=x.device), x)
        return self._turned(x, *self._known[known])

    def _angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.inv_freq is not None
        angle = positions[..., None].to(torch.float32) * self.inv_freq.to(x.device)  # [..., R / 2]
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@dataclass(frozen=True)
class PositionRule:
    """The distance at which a memory token is read (`memory.position`).

    Attributes:
        kind: `none` (no position at all), `true` (the real distance), `fixed` (always `distance`), `clamp` (the real
            distance up to `distance`, `distance` beyond).
        distance: Tokens, for `fixed` and `clamp`; 0 otherwise.
    """

    kind: str
    distance: int = 0

    @classmethod
    def parse(cls, text: str) -> PositionRule:
        """Reads `none`, `true`, `fixed:N` or `clamp:N`, as the configuration has checked it."""
        kind, _, distance = text.partition(":")
        return cls(kind, int(distance or 0))

    @property
    def near_limit(self) -> float:
        """Largest distance, in tokens, that is read as it really is; -1 when none is."""
        return {"none": -1, "fixed": -1, "true": float("inf"), "clamp": self.distance}[self.kind]

    def beyond(self, tokens: int) -> PositionRule:
        """The rule for what lies nowhere in particular: at the far distance, or so many tokens back under `true`."""
        return PositionRule("fixed", tokens) if self.kind == "true" else self

    def far_query(self, query: Tensor, encoding: PositionEncoding, *, backward: bool = False) -> Tensor:
        """Queries `[..., D]` for unrotated keys beyond `near_limit`; `backward` turns a gradient back instead."""
        if self.kind == "none":
            return query
        distance = -self.distance if backward else self.distance
        rotated = encoding.rotate(query, distance)
        if encoding.attention_scaling == 1.0:
            return rotated
        # A rotated key carries the scaling as well; these keys are not rotated, so the query carries it for them.
        return encoding.rotate(rotated, 0)


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head, float32 `[H]`. Source: Press et al. 2022, section 3; between powers of two, their code."""
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / lower) for head in range(num_heads - lower)]
    return torch.tensor(slopes, dtype=torch.float32)
