"""Which rows read which slots: queries are sorted by the pool that they search, and what they read is sorted back.

A pool holds the slots that are searched together: those of one lane, or under scope `group` those of all lanes. So six
suffixes, beams or many readers of one text are more queries of one pool, and nothing in the bank is copied.

A *unit* is the queries that read the same chunks: one query, or one of each query head of a key/value head.

Shapes: `B` rows that read, `H` query heads, `Hkv` key/value heads, `t` query tokens, `P` pools, `r` rows of a pool, `U`
units of a pool and key/value head, `u` queries of a unit (`U * u = r * H / Hkv * t`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pools:
    """Rows by pool. Pools that fewer rows read than others are filled up with rows whose answers are dropped.

    Attributes:
        num_pools: `P`.
        num_kv_heads: `Hkv`.
        is_shared: Whether the query heads of a key/value head read the same chunks.
        rows: Row at each place of each pool, int64 `[P, r]`; None: rows are there in order, equally many a pool.
        places: Where each row is in the flattened `[P, r]`, int64 `[B]`; None: as above.
    """

    num_pools: int
    num_kv_heads: int
    is_shared: bool = False
    rows: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, lane_of_row: Tensor, *, num_pools: int, num_kv_heads: int, is_shared: bool) -> Pools:
        """Pools of single lanes that rows choose.

        Args:
            lane_of_row: The lane that each row reads, int64 `[B]`, on the device of the queries.
            num_pools: Lanes of the bank.
            num_kv_heads: `Hkv`.
            is_shared: As above.

        Returns:
            The rows by pool.
        """
        assert bool(((lane_of_row >= 0) & (lane_of_row < num_pools)).all()), f"lanes are 0 to {num_pools - 1}"
        readers = torch.bincount(lane_of_row, minlength=num_pools)
        most = int(readers.max())
        order = lane_of_row.argsort(stable=True)
        # Place in its pool: how many rows before it read the same lane.
        within = torch.arange(len(order), device=order.device) - (readers.cumsum(0) - readers)[lane_of_row[order]]
        places = torch.empty_like(order)
        places[order] = lane_of_row[order] * most + within
        rows = order.new_zeros(num_pools * most)
        rows[places] = torch.arange(len(order), device=order.device)
        return cls(num_pools, num_kv_heads, is_shared, rows.view(num_pools, most), places)

    def num_units(self, num_rows: int, *, num_heads: int, num_tokens: int) -> int:
        """Units of all pools and key/value heads, `Hkv * P * U`."""
        places = num_rows if self.rows is None else self.rows.numel()
        return places * num_tokens * (self.num_kv_heads if self.is_shared else num_heads)

    def rows_by_pool(self, x: Tensor) -> Tensor:
        """Sorts what rows have, `[B, ...]`, by pool: `[P, r, ...]`."""
        chosen = x if self.rows is None else x[self.rows.flatten()]
        return chosen.unflatten(0, (self.num_pools, -1))

    def is_read(self, num_rows: int, device: torch.device) -> Tensor:
        """Which places of the pools a row asks from; the others only fill up: bool `[P, r]`."""
        asked = torch.ones(num_rows, dtype=torch.bool, device=device)
        if self.rows is None or self.places is None:
            return asked.unflatten(0, (self.num_pools, -1))
        return (
            torch.zeros_like(self.rows, dtype=torch.bool).flatten().index_fill(0, self.places, True).view_as(self.rows)
        )

    def by_pool(self, x: Tensor) -> Tensor:
        """Sorts queries, or what belongs to them, `[B, H, t, ...]`: `[Hkv, P, U, u, ...]`."""
        chosen = x if self.rows is None else x[self.rows.flatten()]  # [P * r, H, t, ...]
        by_head = chosen.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1)  # [Hkv, P * r, H / Hkv, t, ...]
        together = by_head.shape[2] if self.is_shared else 1
        if self.is_shared:
            by_head = by_head.transpose(2, 3)
        return by_head.reshape(self.num_kv_heads, self.num_pools, -1, together, *x.shape[3:])

    def by_row(self, x: Tensor, *, num_heads: int, num_tokens: int) -> Tensor:
        """Undoes `by_pool`: `[Hkv * P * U, u, ...]` to `[B, H, t, ...]`."""
        of_head, rest = num_heads // self.num_kv_heads, x.shape[2:]
        if self.is_shared:
            split = x.reshape(self.num_kv_heads, -1, num_tokens, of_head, *rest).transpose(2, 3)
        else:
            split = x.reshape(self.num_kv_heads, -1, of_head, num_tokens, *rest)
        rows = split.transpose(0, 1).flatten(1, 2)  # [P * r, H, t, ...]
        return rows if self.places is None else rows[self.places]
