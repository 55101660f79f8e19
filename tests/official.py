"""What the authors' code computed with small random weights, and the same by this project.

`tests/data/official.safetensors` holds those weights under the authors' names, and of what was recorded the last tokens
of each segment and what was in the bank; `docs/official.md` says what was found.

Shapes: `B` rows, `T` tokens of a segment, `H` heads, `D` head size, `E` hidden size, `w` chunks of a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.backbone.encoding import KeyValue
from pipeline.config.model import ModelSettings
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import Alone, Exchange
from pipeline.memory.layer import LayerView
from pipeline.memory.search import search
from pipeline.memory.segment import Reading, SegmentView
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Stream
from pipeline.official.convert import build_model
from pipeline.official.layout import Sizes
from pipeline.official.pickles import Checkpoint

REDUCED = Path(__file__).parent / "data" / "official.safetensors"
SETTINGS: Mapping[str, Any] = {
    "memory_size": 256,
    "k": 16,
    "chunk_size": 4,
    "tokens_per_sample": 64,
    "retrieval_layer_index": 5,
    "activation_fn": "gelu",
}
"""Of the recorded model, as its checkpoint has them."""
FILLED: Mapping[str, tuple[int, ...]] = {"b1": (0, 16, 32, 48, 32, 48, 32), "b2": (0, 16, 32, 48, 32, 48)}
"""Chunks in the authors' bank when each segment looks something up: they evict by blocks, before they append."""
WRITTEN = 16
"""Chunks that a segment of all rows writes."""
EXACT = 2e-5
"""Largest difference of what is computed in float32 from the same numbers."""
LOGITS, READ = 3e-4, 2**-8
"""Those of logits, and of what else comes after a memory of one's own: last bits decide whether a number is stored
as one or the next of fp16, which lie up to 2^-8 apart here (|v| < 8), and what is read is a mean of such numbers."""
BEFORE_MEMORY = {"side_layer0_out", "side_layer1_out", "mem_ln1_out", "mem_local_out", "backbone_k5", "backbone_v5"}
"""What does not depend on memory."""
NESTED = "decoder.pretrained_model."


@dataclass
class Record:
    """The authors' weights and what they gave."""

    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path = REDUCED) -> Record:
        """Reads it from a file."""
        return cls(load_file(path))

    def longmem(self) -> Checkpoint:
        """The weights, as the checkpoint of LongMem has them."""
        weights = {name: tensor for name, tensor in self.tensors.items() if name.startswith("decoder.")}
        model = f"{NESTED}decoder.model."
        weights["decoder.embed_tokens.weight"] = weights[f"{model}transformer.wte.weight"]
        weights["decoder.output_projection.weight"] = weights[f"{model}lm_head.weight"]
        return Checkpoint(Path("longmem.pt"), weights, SETTINGS)

    def backbone(self) -> Checkpoint:
        """The weights of the backbone alone."""
        whole = self.longmem().model
        weights = {name[len(NESTED) :]: tensor for name, tensor in whole.items() if name.startswith(NESTED)}
        return Checkpoint(Path("backbone.pt"), weights, {"newgpt_mode": "alibi"})

    def model(self, *, scope: str = "group") -> LongMem:
        """The same model here."""
        longmem = self.longmem()
        built = build_model(Sizes.of(self.backbone(), longmem), longmem).longmem
        settings = built.settings.model_dump()
        settings["memory"]["scope"] = scope
        return LongMem(ModelSettings.model_validate(settings), built.backbone, built.sidenet)

    def tokens(self, case: str, segment: int) -> Tensor:
        """int64 `[B, T]`."""
        return self.tensors[f"{case}.seg{segment}.tokens"].long()

    def segments(self, case: str) -> range:
        """The segments of a case."""
        return range(len(FILLED[case]))

    def is_read_only(self, case: str, segment: int) -> bool:
        """Whether a segment is read for and not remembered: the last of `b1`, shorter than the others."""
        return self.tokens(case, segment).shape != self.tokens(case, 0).shape

    def given(self, case: str, segment: int, name: str) -> Tensor | None:
        """What was recorded of a segment, for its last tokens; None: nothing."""
        return self.tensors.get(f"{case}.seg{segment}.{name}")

    def nudged(self, case: str, segment: int, own: KeyValue) -> KeyValue:
        """Keys and values of a segment, those that would be stored as another number of fp16 moved past the middle."""

        def nudge(own: Tensor, name: str) -> Tensor:
            recorded = self.given(case, segment, f"stored_{name}5")
            if recorded is None:
                recorded = self.tensors[f"{case}.seg{segment}.backbone_{name}5"].half()
            stored = recorded.unflatten(-1, (4, -1)).transpose(1, 2)
            moved = torch.where(own.half() == stored, own, stored + 0.99 * (own - stored))
            return torch.where(moved.half() == stored, moved, stored.float())

        return KeyValue(nudge(own.key, "k"), nudge(own.value, "v"))


def visible(case: str, segment: int, num_rows: int, *, num_chunks: int) -> Tensor:
    """The chunks that the authors' bank still holds when a segment looks something up, bool `[B, num_chunks]`."""
    of_lane = FILLED[case][segment] // num_rows
    return (torch.arange(num_chunks) >= num_chunks - of_lane).expand(num_rows, -1)


@dataclass
class Seeing:
    """What a memory layer and its SideNet gave for one segment, by the names of the record."""

    longmem: LongMem
    found: dict[str, Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Seeing:
        side = self.longmem.sidenet
        for number, following in enumerate([*side.layers[1:], side.norm]):  # which gets the difference, too
            self.handles.append(following.register_forward_pre_hook(self._input_keeper(f"side_layer{number}_out")))
        self.handles.append(side.norm.register_forward_hook(self._keeper("final_norm_out")))
        ((number, fusion),) = side.fusions.items()
        norm: Any = side.layers[number - 1].ln_1
        self.handles.append(norm.register_forward_hook(self._keeper("mem_ln1_out")))
        fuse = fusion.fuse

        def spied(local: Tensor, query: Tensor, key: Tensor, reader: Any) -> Tensor:
            fused = fuse(local, query, key, reader)
            self.found |= {"mem_local_out": joined(local), "mem_fused": joined(fused), "query": query}
            if reader is not None:
                self.found["mem_memory_out"] = joined(reader.read(0, query).values)
            return fused

        fusion.fuse = spied  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        (fusion,) = self.longmem.sidenet.fusions.values()
        del fusion.fuse

    def _input_keeper(self, name: str) -> Any:
        def keep(module: Any, args: Any) -> None:
            self.found[name] = args[0]

        return keep

    def _keeper(self, name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            self.found[name] = output[0] if isinstance(output, tuple) else output

        return keep


def joined(x: Tensor) -> Tensor:
    """`[B, H, T, D]` to `[B, T, H * D]`, as it was recorded."""
    return x.transpose(1, 2).flatten(2)


def slots(longmem: LongMem, bank: MemoryBank, query: Tensor, reading: Reading, case: str, segment: int) -> Tensor:
    """The chunks that queries find, numbered as in the authors' bank, best first, int64 `[B, H, T, w]`."""
    settings, geometry = longmem.read_settings, longmem.geometries[0]
    view = LayerView(SegmentView(bank, settings, reading, settings.rule), bank.layers[0], geometry)
    num_rows, num_heads, num_tokens, _ = query.shape
    found = search(view, view.queries(query.float(), slice(0, num_tokens))).slots
    by_row = view.segment.pools.by_row(found.flatten(0, 2)[:, None], num_heads=num_heads, num_tokens=num_tokens)
    lane, slot = by_row // bank.shape.num_chunks, by_row % bank.shape.num_chunks
    chunk = torch.from_numpy(bank.positions)[slot] // bank.shape.chunk_size  # in its lane
    of_lane = WRITTEN // num_rows
    number = chunk // of_lane * WRITTEN + lane * of_lane + chunk % of_lane
    return number - (segment * WRITTEN - FILLED[case][segment])


def bound_of(name: str, segment: int, *, writes_recorded: bool = False) -> float:
    """The largest difference of a quantity: of slots none."""
    if name == "knn_slots":
        return 0
    if segment == 0 or writes_recorded or name in BEFORE_MEMORY:
        return EXACT
    return LOGITS if name == "logits" else READ


def replay(
    record: Record, longmem: LongMem, case: str, *, exchange: Exchange | None = None, writes_recorded: bool = False
) -> dict[int, dict[str, float]]:
    """Reads a case as the authors' code read it, and compares.

    Args:
        record: What that gave.
        longmem: The model.
        case: `b1` or `b2`.
        exchange: A memory group, whose ranks take segments in turn; None: this rank alone.
        writes_recorded: Whether what is stored is what was recorded, to the last bit of fp16.

    Returns:
        Largest difference of each quantity of each segment that this rank read; of `knn_slots`, how many differ.
    """
    num_rows = len(record.tokens(case, 0))
    group = exchange or Alone()
    stream = Stream(longmem, longmem.bank(num_rows, group_size=group.size), exchange=group)
    found, segments = {}, record.segments(case)
    turns = [[min(first + rank, segments[-1]) for rank in range(group.size)] for first in segments[:: group.size]]
    for turn in turns:
        segment = turn[group.rank]
        is_read_only = record.is_read_only(case, segment)
        with torch.no_grad():
            found[segment] = _compare(record, stream, case, segment, is_read_only, writes_recorded)
    return found


def _compare(
    record: Record, stream: Stream, case: str, segment: int, is_read_only: bool, writes_recorded: bool
) -> dict[str, float]:
    longmem, tokens = stream.model, record.tokens(case, segment)
    documents = torch.zeros_like(tokens)
    seen = stream.look(tokens, documents, start=stream.place if is_read_only else None)
    written = seen.encoding.memory[0]
    sees = visible(case, segment, len(tokens), num_chunks=longmem.settings.memory.num_chunks)
    if not is_read_only:
        remembered = record.nudged(case, segment, written) if writes_recorded else written
        stream.remember(replace(seen, encoding=seen.encoding._replace(memory=[remembered])))
    with Seeing(longmem) as seeing:
        hidden = stream.hidden(seen, visible=sees, at_one_place=is_read_only)
    gave = seeing.found
    gave |= {"logits": longmem.logits(hidden), "backbone_k5": joined(written.key), "backbone_v5": joined(written.value)}
    wanted = {name: record.given(case, segment, name) for name in gave}
    found = {
        name: float((gave[name][:, -expected.shape[1] :] - expected).abs().max())
        for name, expected in wanted.items()
        if expected is not None
    }
    expected = record.given(case, segment, "knn_slots")
    if expected is not None and stream.exchange.size == 1:
        assert stream.bank is not None
        reading = Reading(seen.start, documents, visible=sees)
        got = slots(longmem, stream.bank, gave["query"], reading, case, segment)
        found["knn_slots"] = float((got != expected).sum())
    return found
