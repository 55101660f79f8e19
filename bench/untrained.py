"""What an untrained SideNet makes of its memory: says whether context, sink, window, retrieval and positions are right.

Segments of 256 tokens, chunks of 4, fp32. Of each text the tokens from `--skip-tokens` on; memory of 4,096 tokens:
  novel    1,536 tokens scored after 4,096;
  again    four passages of the novel (from tokens 259, 559, 859 and 1,159), read again after 4,096 tokens of it: can it
           copy from far back?
  library  as novel, on source text;
  far      1,024 tokens of the novel scored after 16,384, by size of the memory.
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
from pipeline.backbone.encoding import Encoding
from pipeline.config.model import MemoryConfig, ModelSettings, SideNetConfig
from pipeline.model.longmem import LongMem, layout_of, sink_token
from pipeline.model.stream import Seen, Stream
from pipeline.positions import PositionRule
from pipeline.sidenet.sidenet import SideNet

SEGMENT = 256
PASSAGES = (259, 559, 859, 1159)
BEFORE, SCORED, FAR_BEFORE, FAR_SCORED = 4096, 1536, 16_384, 1024


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


BEST = Row("", 256, True, 512, 32, "kv_head", "clamp:1024")
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
    Row("context 256, sink, window 512, 32 shared", 256, True, 512, 32, "kv_head"),
    replace(BEST, name="the same, clamp:1024"),
    replace(BEST, name="the same, context 128", context=128),
    *(replace(BEST, name=f"clamp:1024, top {layers} layers", layers=layers) for layers in (24, 18, 12, 6)),
]
FAR_ROWS = [
    replace(BEST, name="top 18 layers, window only", layers=18, chunks=0),
    *(replace(BEST, name=f"top 18 layers, memory {size:,}", layers=18, memory=size) for size in (1024, 4096, 16_384)),
]
WINDOWS = (256, 512, 1024, 2048, 4096, 8192)


class Texts:
    """Token sequences that are encoded once for every amount of left context, for all layers."""

    def __init__(self, backbone: Backbone, tokens: dict[str, torch.Tensor]) -> None:
        self.backbone, self.tokens = backbone, tokens
        self._encoded: dict[tuple[str, int], list[Encoding]] = {}
        token = sink_token(backbone.model.config)
        self.sink = backbone(torch.tensor([[token]])).memory

    def encodings(self, name: str, context: int) -> list[Encoding]:
        """Every segment of a text; only the last context asked for is kept."""
        if (name, context) not in self._encoded:
            self._encoded = {key: value for key, value in self._encoded.items() if key[1] == context}
            tokens = self.tokens[name][None]
            starts = range(0, tokens.shape[1] - SEGMENT + 1, SEGMENT)
            before = [min(context, start) for start in starts]
            self._encoded[name, context] = [
                self.backbone(tokens[:, start - n : start + SEGMENT], None, n)
                for start, n in zip(starts, before, strict=True)
            ]
        return self._encoded[name, context]


def targets_of(tokens: torch.Tensor, start: int, *, is_passage: bool) -> torch.Tensor:
    """What follows each token of a segment, `[1, T]`; a passage ends where the next begins."""
    targets = tokens[start + 1 : start + SEGMENT + 1].clone()
    if is_passage:
        targets[-1] = -100
    return targets[None]


@torch.no_grad()
def perplexity(row: Row, texts: Texts, name: str, *, first: int) -> float:
    """Perplexity of the tokens from `first` on; every segment is remembered as it goes by."""
    backbone, tokens, num_layers = texts.backbone, texts.tokens[name], len(texts.backbone.layers)
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
    stream, documents = Stream(model, model.bank(1)), torch.zeros(1, SEGMENT, dtype=torch.int64)
    reads = "none" if row.memory is None else "own" if row.chunks else "window"
    sources = [source - 1 for source in layout.memory_sources]
    total, count = 0.0, 0
    for index, encoding in enumerate(texts.encodings(name, row.context)):
        start = index * SEGMENT
        # Encoded once for all rows, with the keys and values of every layer: a row remembers some.
        kept = encoding._replace(memory=[encoding.memory[source] for source in sources])
        if row.sink:
            kept = kept._replace(sinks=[texts.sink[source] for source in sources])
        seen = Seen(kept, documents, start)
        stream.remember(seen)
        if start >= first:
            targets = targets_of(tokens, start, is_passage=name == "again")
            total += float(stream.losses(seen, targets, memory=reads).sum())
            count += int((targets != -100).sum())
    return math.exp(total / count)


@torch.no_grad()
def window_perplexity(window: int, texts: Texts, name: str, *, first: int) -> float:
    """Perplexity of the same tokens by the backbone alone, which sees its segment and what fits before it."""
    tokens, total, count = texts.tokens[name], 0.0, 0
    for start in range(first, len(tokens) - SEGMENT + 1, SEGMENT):
        before = min(start, window - SEGMENT)
        logits = texts.backbone.model(tokens[None, start - before : start + SEGMENT], logits_to_keep=SEGMENT).logits
        targets = targets_of(tokens, start, is_passage=name == "again")
        loss = torch.nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="sum")
        total, count = total + float(loss), count + int((targets != -100).sum())
    return math.exp(total / count)


def read_tokens(path: Path, backbone: str, skip: int) -> torch.Tensor:
    """Tokens of a file, without the first ones."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    text = path.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[skip:]


def show(title: str, rows: Sequence[Row], texts: Texts, tasks: dict[str, int], wanted: str) -> None:
    """Prints a table: rows by tasks; `tasks` says from which token on each is scored."""
    print(f"{title:44} " + " ".join(f"{name:>8}" for name in tasks) + f" {'seconds':>8}")
    order = sorted(range(len(rows)), key=lambda number: rows[number].context)  # what is encoded is used up
    for row in (rows[number] for number in order):
        if wanted in row.name:
            begun = time.perf_counter()
            found = [perplexity(row, texts, name, first=first) for name, first in tasks.items()]
            seconds = time.perf_counter() - begun
            print(f"{row.name:44} " + " ".join(f"{value:8.2f}" for value in found) + f" {seconds:8.1f}", flush=True)
    for window in WINDOWS:
        name = f"backbone, window {window:,}"
        if wanted in name and (window <= BEFORE or "far" in tasks):
            begun = time.perf_counter()
            found = [window_perplexity(window, texts, task, first=first) for task, first in tasks.items()]
            seconds = time.perf_counter() - begun
            print(f"{name:44} " + " ".join(f"{value:8.2f}" for value in found) + f" {seconds:8.1f}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=".cache/longmem/smollm2-135m")
    parser.add_argument("--text", required=True, type=Path, help="a novel")
    parser.add_argument("--library", type=Path, help="a source file, such as typing.py of the standard library")
    parser.add_argument("--skip-tokens", type=int, default=2000, help="tokens at the start of the novel left out")
    parser.add_argument("--tasks", default="novel,again,library,far")
    parser.add_argument("--rows", default="", help="only the rows whose name holds this text")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.backbone, dtype=torch.float32)
    num_layers = model.config.num_hidden_layers
    every = range(1, num_layers + 1)
    backbone = Backbone(model, taps=range(num_layers + 1), calls=every, memory_layers=every)
    ids = read_tokens(arguments.text, arguments.backbone, arguments.skip_tokens)
    tokens = {
        "novel": ids[: BEFORE + SCORED + 1],
        "again": torch.cat([ids[:BEFORE], *[ids[at : at + SEGMENT] for at in PASSAGES], ids[:1]]),
        "far": ids[: FAR_BEFORE + FAR_SCORED + 1],
    }
    if arguments.library is not None:
        tokens["library"] = read_tokens(arguments.library, arguments.backbone, 0)[: BEFORE + SCORED + 1]
    first = {"novel": BEFORE, "again": BEFORE, "library": BEFORE, "far": FAR_BEFORE}
    tasks = {name: first[name] for name in arguments.tasks.split(",") if name in tokens}
    texts = Texts(backbone, tokens)
    near = {name: at for name, at in tasks.items() if name != "far"}
    if near:
        show("untrained SideNet, all layers", ROWS, texts, near, arguments.rows)
    if "far" in tasks:
        show("far into the novel", FAR_ROWS, texts, {"far": tasks["far"]}, arguments.rows)


if __name__ == "__main__":
    main()
