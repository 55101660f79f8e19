"""Which backbone layers the SideNet stands beside, and which taps that needs.

Source: Wang et al. 2023, section 2.2 (the `uniform` layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Block boundaries of the SideNet.

    Attributes:
        boundaries: `b_0 < b_1 < ... < b_L`, numbers of backbone layers passed.
        memory_layers: SideNet layers that read memory, counted from 1, in order.
        residual: `interleaved`, `paper` or `paper_normed`.
    """

    boundaries: tuple[int, ...]
    memory_layers: tuple[int, ...]
    residual: str

    @classmethod
    def build(
        cls,
        num_backbone_layers: int,
        *,
        layout: str,
        num_layers: int | None,
        memory_layers: str | Sequence[int] | None,
        residual: str,
    ) -> Layout:
        """Lays the SideNet out.

        Args:
            num_backbone_layers: Layers of the backbone.
            layout: `uniform` (blocks evenly spread over the backbone) or `top` (the last layers, each a block).
            num_layers: Layers of the SideNet; None: half the backbone's for `uniform`, all of them for `top`.
            memory_layers: SideNet layers that read memory, counted from 1; `all`; None: one, three quarters up.
            residual: `interleaved`, `paper` or `paper_normed`.

        Returns:
            The layout.

        Raises:
            ConfigError: A number is out of range.
        """
        count = num_layers
        if count is None:
            count = max(1, num_backbone_layers // 2) if layout == "uniform" else num_backbone_layers
        problems = []
        if not 1 <= count <= num_backbone_layers:
            problems.append(f"sidenet.num_layers is {count}; the backbone allows 1 to {num_backbone_layers}")
        if memory_layers is None:
            memory_layers = [max(1, round(0.75 * count))]
        chosen = list(range(1, count + 1)) if memory_layers == "all" else [int(layer) for layer in memory_layers]
        outside = [layer for layer in chosen if not 1 <= layer <= count]
        if outside or len(set(chosen)) != len(chosen) or not chosen:
            problems.append(
                f"sidenet.memory_layers is {chosen}; expected different SideNet layers from 1 to {count} (the SideNet "
                f"has {count} layers, counted from 1), or 'all'"
            )
        if problems:
            raise ConfigError(problems)
        if layout == "top":
            boundaries = list(range(num_backbone_layers - count, num_backbone_layers + 1))
        else:
            boundaries = [round(block * num_backbone_layers / count) for block in range(count + 1)]
        return cls(tuple(boundaries), tuple(sorted(chosen)), residual)

    @property
    def num_layers(self) -> int:
        """`L`."""
        return len(self.boundaries) - 1

    @property
    def source_layers(self) -> tuple[int, ...]:
        """Backbone layer, counted from 1, that each SideNet layer is a copy of."""
        return self.boundaries[1:]

    @property
    def memory_sources(self) -> tuple[int, ...]:
        """Backbone layer, counted from 1, whose keys and values each memory layer reads."""
        return tuple(self.boundaries[layer] for layer in self.memory_layers)

    def difference(self, layer: int) -> tuple[int, int] | None:
        """The taps `(later, earlier)` whose difference a SideNet layer (counted from 1) adds; None if it is nothing.

        The tap after the last of the layers is that after the final norm.
        """
        earlier, later = self.boundaries[layer - 1], self.boundaries[layer]
        if self.residual == "interleaved":
            later -= 1
        elif self.residual == "paper_normed" and layer == self.num_layers:
            later += 1
        return None if later == earlier else (later, earlier)

    @property
    def taps(self) -> tuple[int, ...]:
        """All taps that the SideNet uses."""
        pairs = [self.difference(layer) or () for layer in range(1, self.num_layers + 1)]
        return tuple(sorted({self.boundaries[0], *(tap for pair in pairs for tap in pair)}))
