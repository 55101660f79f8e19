"""What an untrained SideNet makes of its memory: says whether context, sink, window, retrieval and positions are right.

Segments of 256 tokens, chunks of 4, fp32. Of each text the tokens from `--skip-tokens` on; memory of 4,096 tokens:
  novel    1,536 tokens scored after 4,096;
  again    four passages of the novel (from tokens 259, 559, 859 and 1,159), read again after 4,096 tokens of it: can it
           copy from far back?
  library  as novel, on source text;
  far      1,024 tokens of the novel scored after `--far-tokens`, by size of the memory.
The rival is the backbone alone with an ordinary window: each segment is scored with the tokens before it that make up
the window. At places where tokens end whose next one is not read nothing is scored.

    python bench/untrained.py --text NOVEL.txt [--library FILE.py] [--tasks novel,again,far] [--rows TEXT]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.encoding import Encoding, KeyValue
from pipeline.config.model import MemoryConfig, ModelSettings, SideNetConfig
from pipeline.model.longmem import LongMem, layout_of, sink_token
from pipeline.model.stream import Memory, Seen, Stream
from pipeline.positions import PositionRule
from pipeline.sidenet.sidenet import SideNet

SEGMENT = 256
PASSAGES = (259, 559, 859, 1159)
BEFORE, SCORED, FAR_SCORED = 4096, 1536, 1024


@dataclass(frozen=True)
class Row:
    """One setting of the table. `chunks` are those that each query retrieves; `memory` None: nothing is read."""

    name: str
    context: int = 0
    sink: bool = False
    window: int = 0
    chunks: int = 16
    retrieve_for: str = "head"
    position: str = "clamp:512"
    layers: int | None = None
    memory: int | None = BEFORE


BEST = Row("", 256, True, 512, 32, "kv_head", "fixed:768")
ROWS = [
    Row("nothing", memory=None),
    Row("16 chunks a head, clamp:512"),
    Row("window 512", window=512, chunks=0),
    Row("window 512 + 16 chunks a head", window=512),
    Row("sink, window 512, 32 shared, clamp:1024", 0, True, 512, 32, "kv_head", "clamp:1024"),
    Row("context 256, 16 chunks a head", 256),
    Row("context 256, window 512", 256, window=512, chunks=0),
    Row("context 256, sink, 16 chunks a head", 256, True),
    Row("context 256, sink, window 512", 256, True, 512, 0),
    Row("context 256, sink, window 512, 16 a head", 256, True, 512, 16),
    Row("context 256, sink, window 128, 32 shared", 256, True, 128, 32, "kv_head"),
    *(
        replace(BEST, name=f"context 256, sink, window 512, 32 shared, {position}", position=position)
        for position in ("clamp:512", "clamp:1024", "fixed:1024", "fixed:768")
    ),
    replace(BEST, name="fixed:768, window 256", window=256),
    replace(BEST, name="fixed:768, 16 chunks", chunks=16),
    replace(BEST, name="fixed:768, 128 chunks", chunks=128),
    replace(BEST, name="fixed:768, context 128", context=128),
    replace(BEST, name="fixed:768, context 512", context=512),
    *(replace(BEST, name=f"fixed:768, top {layers} layers", layers=layers) for layers in (24, 18, 12, 6)),
]
FAR_ROWS = [
    replace(BEST, name="top 18 layers, window only", layers=18, chunks=0),
    *(
        replace(BEST, name=f"top 18 layers, memory {size:,}", layers=18, memory=size)
        for size in (1024, 4096, 16_384, 65_536)
    ),
]
WINDOWS = (256, 512, 1024, 2048, 4096, 8192)


def targets_of(tokens: torch.Tensor, start: int, *, is_passage: bool) -> torch.Tensor:
    """What follows each token of a segment, `[1, T]`; a passage ends where the next begins."""
    targets = tokens[start + 1 : start + SEGMENT + 1].clone()
    if is_passage:
        targets[-1] = -100
    return targets[None]


class Reader:
    """One row of the table, reading on."""

    def __init__(self, row: Row, backbone: Backbone) -> None:
        self.row, num_layers = row, len(backbone.layers)
        memory = MemoryConfig(
            tokens=row.memory or BEFORE,
            top_k_tokens=4 * max(1, row.chunks),
            position=row.position,
            retrieve_for=row.retrieve_for,  # type: ignore[arg-type]
            window_tokens=row.window,
            sink=row.sink,
        )
        side = {"layout": "top", "num_layers": row.layers or num_layers, "memory_layers": "all", "fusion": "joint"}
        sidenet = SideNetConfig.model_validate(side)
        settings = ModelSettings(memory=memory, sidenet=sidenet, segment_tokens=SEGMENT)
        layout = layout_of(sidenet, num_layers)
        sink_rule = PositionRule.parse(row.position)
        model = LongMem(settings, backbone, SideNet(backbone, layout, fusion="joint", sink_rule=sink_rule))
        self.stream = Stream(model, model.bank(1))
        self.sources = [source - 1 for source in layout.memory_sources]
        self.total, self.count, self.seconds = 0.0, 0, 0.0

    def read(self, encoding: Encoding, sinks: Sequence[KeyValue], start: int, targets: torch.Tensor | None) -> None:
        """Remembers a segment, encoded with the keys and values of every layer, and scores it if it has targets."""
        begun, row = time.perf_counter(), self.row
        kept = encoding._replace(memory=[encoding.memory[source] for source in self.sources])
        if row.sink:
            kept = kept._replace(sinks=[sinks[source] for source in self.sources])
        seen = Seen(kept, torch.zeros(1, SEGMENT, dtype=torch.int64), start)
        self.stream.remember(seen)
        if targets is not None:
            memory: Memory = "none" if row.memory is None else "own"
            self.total += float(self.stream.losses(seen, targets, memory=memory, retrieves=row.chunks > 0).sum())
            self.count += int((targets != -100).sum())
        self.seconds += time.perf_counter() - begun


@torch.no_grad()
def perplexities(
    rows: Sequence[Row], backbone: Backbone, tokens: torch.Tensor, *, first: int, name: str
) -> list[Reader]:
    """Reads a text, of which the tokens from `first` on are scored, for all rows side by side."""
    sinks = backbone(torch.tensor([[sink_token(backbone.model.config)]])).memory
    readers = [Reader(row, backbone) for row in rows]
    for start in range(0, len(tokens) - SEGMENT + 1, SEGMENT):
        targets = targets_of(tokens, start, is_passage=name == "again") if start >= first else None
        for context in sorted({row.context for row in rows}):
            before = min(context, start)
            encoding = backbone(tokens[None, start - before : start + SEGMENT], None, before)
            for reader in readers:
                if reader.row.context == context:
                    reader.read(encoding, sinks, start, targets)
    return readers


@torch.no_grad()
def window_perplexity(window: int, backbone: Backbone, tokens: torch.Tensor, *, first: int, name: str) -> float:
    """Perplexity of the same tokens by the backbone alone, which sees its segment and what fits before it."""
    total, count = 0.0, 0
    for start in range(first, len(tokens) - SEGMENT + 1, SEGMENT):
        before = min(start, window - SEGMENT)
        logits = backbone.model(tokens[None, start - before : start + SEGMENT], logits_to_keep=SEGMENT).logits
        targets = targets_of(tokens, start, is_passage=name == "again")
        loss = torch.nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="sum")
        total, count = total + float(loss), count + int((targets != -100).sum())
    return math.exp(total / count)


def read_tokens(path: Path, backbone: str, skip: int) -> torch.Tensor:
    """Tokens of a file, without the first ones."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    text = path.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[skip:]


def show(title: str, rows: Sequence[Row], backbone: Backbone, texts: dict[str, torch.Tensor], first: int) -> None:
    """Prints a table, rows by texts; of each text the tokens from `first` on are scored."""
    read = [perplexities(rows, backbone, tokens, first=first, name=name) for name, tokens in texts.items()]
    print(f"{title:56} " + " ".join(f"{name:>8}" for name in texts) + f" {'seconds':>8}")
    for row, readers in zip(rows, zip(*read, strict=True), strict=True):
        found = " ".join(f"{math.exp(reader.total / reader.count):8.2f}" for reader in readers)
        print(f"{row.name:56} {found} {sum(reader.seconds for reader in readers):8.1f}", flush=True)
    for window in WINDOWS:
        if window <= first:
            begun = time.perf_counter()
            losses = [
                window_perplexity(window, backbone, tokens, first=first, name=name) for name, tokens in texts.items()
            ]
            found = " ".join(f"{loss:8.2f}" for loss in losses)
            print(f"{f'backbone, window {window:,}':56} {found} {time.perf_counter() - begun:8.1f}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=".cache/longmem/smollm2-135m")
    parser.add_argument("--text", required=True, type=Path, help="a novel")
    parser.add_argument("--library", type=Path, help="a source file, such as typing.py of the standard library")
    parser.add_argument("--skip-tokens", type=int, default=2000, help="tokens at the start of the novel left out")
    parser.add_argument("--tasks", default="novel,again,library,far")
    parser.add_argument("--far-tokens", type=int, default=16_384, help="tokens before what `far` scores")
    parser.add_argument("--rows", default="", help="only the rows whose name holds this text")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.backbone, dtype=torch.float32)
    num_layers = model.config.num_hidden_layers
    every = range(1, num_layers + 1)
    backbone = Backbone(model, taps=range(num_layers + 1), calls=every, memory_layers=every)
    ids = read_tokens(arguments.text, arguments.backbone, arguments.skip_tokens)
    texts = {
        "novel": ids[: BEFORE + SCORED + 1],
        "again": torch.cat([ids[:BEFORE], *[ids[at : at + SEGMENT] for at in PASSAGES], ids[:1]]),
    }
    if arguments.library is not None:
        texts["library"] = read_tokens(arguments.library, arguments.backbone, 0)[: BEFORE + SCORED + 1]
    tasks = arguments.tasks.split(",")
    rows = [row for row in ROWS if arguments.rows in row.name]
    if texts := {name: tokens for name, tokens in texts.items() if name in tasks}:
        show("untrained SideNet, all layers", rows, backbone, texts, BEFORE)
    if "far" in tasks:
        far = arguments.far_tokens
        rows = [row for row in FAR_ROWS if arguments.rows in row.name and (row.memory or 0) <= far]
        show(f"{far:,} tokens into the novel", rows, backbone, {"far": ids[: far + FAR_SCORED + 1]}, far)


if __name__ == "__main__":
    main()
