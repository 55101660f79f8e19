"""Texts that become memories, and rows that go on from them.

Shapes: `T` segment tokens, `N` tokens of left context.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.face.contents import Document, MemoryKind
from pipeline.face.memory import Memory
from pipeline.memory.bank import EMPTY, MemoryBank
from pipeline.memory.sources import Source
from pipeline.model.longmem import DTYPES, LongMem
from pipeline.model.owned import Row
from pipeline.model.remember import remember
from pipeline.model.rows import Rows


def kind_of(model: LongMem, backbone: str) -> MemoryKind:
    """What memories of a model are like.

    Args:
        model: Backbone and SideNet.
        backbone: Identity of the backbone.

    Returns:
        The kind.
    """
    return MemoryKind(
        backbone=backbone,
        layers=model.sidenet.layout.memory_sources,
        num_kv_heads=model.backbone.num_kv_heads,
        head_dim=model.backbone.head_dim,
        chunk_size=model.settings.memory.chunk_size,
    )


@torch.no_grad()
def memorize(model: LongMem, kind: MemoryKind, tokens: Tensor, *, name: str, progress: bool) -> Memory:
    """Reads a text into a memory of its own, in the space of what is remembered of it.

    Args:
        model: Backbone and SideNet.
        kind: What its memories are like.
        tokens: int64 `[any]`, not empty, on any device.
        name: What the document is called.
        progress: Whether a bar is shown.

    Returns:
        The memory: of a text longer than `memory.tokens` what its last segment reads, and that segment.
    """
    size, count = kind.chunk_size, len(tokens)
    whole = count // size * size
    bank = model.bank(1, num_tokens=min(model.settings.memory.tokens, whole))
    with tqdm(total=count, unit="token", desc=f"memorizing {name}", disable=not progress, leave=False) as bar:

        def tell(num_tokens: int) -> None:
            bar.update(num_tokens)

        remember(
            model,
            bank,
            tokens[:whole].to(model.device),
            start=0,
            before=tokens[:0].to(model.device),
            on_read=tell,
        )
    slots = bank.filled()
    # The ring has room for a segment more than the last segment, which is read again when a row begins, has behind it.
    farthest = count // model.settings.segment_tokens * model.settings.segment_tokens - model.settings.memory.tokens
    slots = slots[torch.from_numpy(bank.positions)[slots] >= farthest]
    positions = torch.from_numpy(bank.positions)[slots]
    there, keys, values = slots.to(bank.device), [], []
    while bank.layers:  # each is given up when it is copied: no two banks stand side by side
        store = bank.layers.pop(0)
        keys.append(store.keys[:, 0, there])
        values.append(store.values[:, 0, there])
        del store
    return Memory(
        kind=kind,
        sources=[Document(name, 0, count)],
        positions=positions,
        of_document=torch.zeros_like(positions),
        tokens=tokens.cpu()[positions[:, None] + torch.arange(size)],
        rest=tokens[whole:].cpu().clone(),
        keys=keys,
        values=values,
        end=count,
    )


@dataclass(frozen=True)
class Start:
    """Where rows begin that read the same memories.

    Attributes:
        row: Its place and what it remembers.
        tail: Tokens of the last document that fill no segment: the row reads them first, so that what follows goes on
            from that document as if it had been read in one.
    """

    row: Row
    tail: Tensor


def start_of(model: LongMem, memories: Sequence[Memory]) -> Start:
    """Where a row begins that has memories, one after another, before it.

    Args:
        model: Backbone and SideNet.
        memories: Each of the model's kind; the last one is gone on from.

    Returns:
        The start; banks of memories are shared by all who read them.
    """
    segment, most = model.settings.segment_tokens, model.settings.memory.tokens
    sources, place = [], 0
    for memory in memories[:-1]:
        sources.append(Source(_bank(model, memory), place))
        place += -(-memory.end // segment) * segment
    # Of one document the lane forgets what the model forgets; several are all there when the row begins.
    is_one = sum(len(memory.sources) for memory in memories) <= 1
    reach = most if is_one else max(most, place + memories[-1].end)
    recent: list[int] = []
    tail = torch.zeros(0, dtype=torch.int64)
    if memories and memories[-1].sources:
        last = memories[-1]
        document = last.sources[-1]
        whole = document.start + (last.end - document.start) // segment * segment
        sources.append(Source(_without(_bank(model, last), whole), place))
        own = last.of_document == len(last.sources) - 1
        text, is_before = last.tokens[own].flatten(), last.positions[own] < whole
        num_before = int(is_before.sum()) * last.kind.chunk_size
        recent = text[max(0, num_before - model.settings.context_tokens) : num_before].tolist()
        tail = torch.cat([text[num_before:], last.rest])
        place += whole
    return Start(Row(tuple(sources), place, reach, recent), tail)


def begun(model: LongMem, start: Start, *, reads_memory: bool) -> Rows:
    """A row that has begun."""
    row = Row(start.row.sources, start.row.place, start.row.num_tokens, list(start.row.recent))
    rows = Rows(model, [row], reads_memory=reads_memory)
    if len(start.tail):
        rows.read(start.tail[None].to(model.device), wanted=0)
    return rows


def _bank(model: LongMem, memory: Memory) -> MemoryBank:
    device = torch.device("cpu") if model.settings.memory.device == "host" else model.device
    return memory.bank(DTYPES[model.settings.memory_dtype], device)


def _without(bank: MemoryBank, place: int) -> MemoryBank:
    """The same bank as if what lies from a place on were not in it; nothing is copied."""
    shorter = copy.copy(bank)
    shorter.positions = np.where(bank.positions >= place, EMPTY, bank.positions)
    return shorter
