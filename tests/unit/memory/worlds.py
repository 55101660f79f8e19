"""The same random past told to the fast bank and to the slow reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.layer import Geometry, LayerView
from pipeline.memory.reader import BankReader
from pipeline.memory.search import search
from pipeline.memory.segment import Reading, ReadSettings, SegmentView
from pipeline.positions import PositionEncoding, PositionRule
from tests.reference import Past, Read, Rules, read_memory
from tests.reference_lm import Attention

HEADS, KV_HEADS, DIM = 4, 2, 6

ATTENTIONS = {
    "rotary": Attention(0.6, frequencies=[1.0, 0.2], rotary_factor=1.2),  # four of six dimensions are turned
    "alibi": Attention(0.6, slopes=[0.4, 0.2, 0.1, 0.05]),
    "learned": Attention(0.6),
}


def geometry_of(attention: Attention) -> Geometry:
    """What the fast code is told of an attention."""
    frequencies, slopes = attention.frequencies, attention.slopes
    encoding = PositionEncoding(
        None if frequencies is None else torch.tensor(frequencies),
        attention.rotary_factor,
        None if slopes is None else torch.tensor(slopes),
    )
    return Geometry(encoding, attention.scale)


class World:
    """A bank of one memory layer, and the reference's memory of everything it was given.

    Args:
        rules: How memory is read.
        num_chunks: Chunks of a ring.
        lanes: `B`.
        attention: A name in ATTENTIONS.
        dtype: Of the bank.
        seed: Of keys, values and queries.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        num_chunks: int,
        lanes: int = 2,
        attention: str = "rotary",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.rules, self.lanes, self.attention = rules, lanes, ATTENTIONS[attention]
        shape = BankShape(1, lanes, KV_HEADS, DIM, num_chunks, rules.chunk_size)
        self.bank = MemoryBank(shape, dtype=dtype, device=torch.device("cpu"))
        self.past = Past()
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        """Random numbers of this world."""
        return torch.randn(shape, generator=self.generator)

    def append(self, documents: Tensor, *, start: int) -> None:
        """Appends a random segment of every lane to both."""
        key, value = (self.randn(self.lanes, KV_HEADS, documents.shape[1], DIM) for _ in range(2))
        self.bank.append([(key, value)], start=start, documents=documents)
        self.past.add(key.to(self.bank.dtype), value.to(self.bank.dtype), start=start, documents=documents)

    def settings(self, search: str = "torch", block: int = 3) -> ReadSettings:
        """The rules in the fast code's words."""
        rules = self.rules
        return ReadSettings(
            num_tokens=rules.tokens,
            top_k_chunks=rules.top_k_tokens // rules.chunk_size,
            scope=rules.scope,
            rule=PositionRule.parse(rules.position),
            search=search,
            query_block_tokens=block,
            retrieve_for=rules.retrieve_for,
            window_tokens=rules.window_tokens,
        )

    def reader(
        self, documents: Tensor, *, start: int, search: str = "torch", block: int = 3, **reading: Any
    ) -> BankReader:
        """The fast reader; further arguments are those of `Reading`."""
        geometry = geometry_of(self.attention)
        return BankReader(self.bank, self.settings(search, block), [geometry], Reading(start, documents, **reading))

    def expected(self, query: Tensor, documents: Tensor, *, start: int, **reading: Any) -> Read:
        """What the reference reads; further arguments are those of `read_memory`."""
        return read_memory(self.past, query, self.attention, self.rules, start=start, documents=documents, **reading)

    def retrieved(
        self, query: Tensor, documents: Tensor, *, start: int, search_by: str = "torch", **reading: Any
    ) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
        """Chunks that the fast search finds: (row, head, token) -> (lane, first position), best first."""
        settings, geometry = self.settings(search_by), geometry_of(self.attention)
        asked = Reading(start, documents, **reading)
        segment = SegmentView(self.bank, settings, asked, geometry.rule(settings.rule))
        view = LayerView(segment, self.bank.layers[0], geometry)
        chosen = asked.lane_of_row if asked.retrieve_from is None else asked.retrieve_from
        lanes = range(len(query)) if chosen is None else chosen.tolist()
        got = search(view, view.queries(query, slice(0, query.shape[2])))
        assert bool((got.scores[..., :-1] >= got.scores[..., 1:]).all()), "best first"
        everyone = torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist()
        if got.slots.shape[-1] == 0:
            return {(row, head, token): [] for row, head, token in everyone}
        sizes = {"num_heads": query.shape[1], "num_tokens": query.shape[2]}
        together = HEADS // KV_HEADS if segment.pools.is_shared else 1
        of_units = (x.flatten(0, 2)[:, None].expand(-1, together, -1) for x in (got.slots, got.valid))
        slots, valid = (segment.pools.by_row(x, **sizes) for x in of_units)
        chunks = self.bank.shape.num_chunks
        found = {}
        for row, head, token in everyone:
            kept = slots[row, head, token][valid[row, head, token]].tolist()
            found[row, head, token] = [
                (slot // chunks if self.rules.scope == "group" else lanes[row], int(self.bank.positions[slot % chunks]))
                for slot in kept
            ]
        return found
