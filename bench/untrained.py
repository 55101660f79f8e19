"""What memory does to an untrained SideNet: says whether retrieval, positions and fusion are right.

Two tasks, segments of 256 tokens, chunks of 4, top 16 chunks, fp32:
  novel   2,048 tokens of a text scored, with the 2,048 to 4,096 tokens before each segment in memory;
  again   2,048 tokens of a text, then four passages of it (from tokens 259, 559, 859 and 1,159) read a second time as
          the next four segments, with a memory of 2,048 tokens: can it copy from far back?

    python bench/untrained.py --text FILE.txt [--backbone DIR] [--skip-tokens N] [--rows TEXT]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.backbone.backbone import Backbone
from pipeline.backbone.encoding import Encoding
from pipeline.config.model import MemoryConfig, ModelSettings, SideNetConfig
from pipeline.model.longmem import LongMem, layout_of
from pipeline.model.stream import Seen, Stream
from pipeline.sidenet.sidenet import SideNet

SEGMENT = 256
PASSAGES = (259, 559, 859, 1159)


@dataclass(frozen=True)
class Row:
    """One setting of the table; `memory_layers` None: no memory."""

    name: str
    layers: int
    memory_layers: str | list[int] | None
    fusion: str = "joint"
    position: str = "true"
    bias: float = 0.0
    chunk_size: int = 4
    top_k_tokens: int = 64


def rows_for(num_layers: int) -> list[Row]:
    """The settings, for a backbone of so many layers (the design's figures are for 30)."""
    most, some = round(0.6 * num_layers), round(0.8 * num_layers)
    one = round(0.73 * num_layers)
    return [
        Row("no memory", num_layers, None),
        Row(f"one memory layer ({one}), none, gate 0.5", num_layers, [one], "gate", "none"),
        Row(f"top {most}, joint, true", most, "all"),
        Row(f"top {some}, joint, true", some, "all"),
        Row("all, joint, true", num_layers, "all"),
        Row("all, joint, fixed:300", num_layers, "all", position="fixed:300"),
        Row("all, joint, fixed:300, bias -1", num_layers, "all", position="fixed:300", bias=-1.0),
        Row(f"top {most}, joint, fixed:300", most, "all", position="fixed:300"),
        Row(f"top {most}, joint, fixed:300, chunk 1", most, "all", position="fixed:300", chunk_size=1),
        Row("all, joint, clamp:256", num_layers, "all", position="clamp:256"),
        Row("all, joint, clamp:512", num_layers, "all", position="clamp:512"),
        Row("all, joint, clamp:1024", num_layers, "all", position="clamp:1024"),
        Row(f"top {most}, joint, clamp:512", most, "all", position="clamp:512"),
    ]


def settings_for(row: Row, memory_tokens: int) -> ModelSettings:
    """The settings of one row."""
    memory = MemoryConfig(
        tokens=memory_tokens,
        chunk_size=row.chunk_size,
        top_k_tokens=row.top_k_tokens,
        position=row.position,
        query_block_tokens=64,
    )
    layers = row.memory_layers or [1]
    side = {"layout": "top", "num_layers": row.layers, "memory_layers": layers, "fusion": row.fusion}
    sidenet = SideNetConfig.model_validate({**side, "gate_init": row.bias})
    return ModelSettings(memory=memory, sidenet=sidenet, segment_tokens=SEGMENT)


@torch.no_grad()
def perplexity(
    row: Row,
    backbone: Backbone,
    encodings: Sequence[Encoding],
    tokens: torch.Tensor,
    first: int,
    memory: int,
) -> float:
    """Perplexity of the segments from `first` on; every segment is remembered as it goes by."""
    settings = settings_for(row, memory)
    layout = layout_of(settings.sidenet, len(backbone.layers))
    model = LongMem(settings, backbone, SideNet(backbone, layout, fusion=row.fusion, gate_init=row.bias))
    stream, documents = Stream(model, model.bank(1)), torch.zeros(1, SEGMENT, dtype=torch.int64)
    total, count = 0.0, 0
    for index, encoding in enumerate(encodings):
        start = index * SEGMENT
        # Encoded once for all rows, with the keys and values of every layer: a row remembers some.
        seen = Seen(encoding._replace(memory=[encoding.memory[s - 1] for s in layout.memory_sources]), documents, start)
        stream.remember(seen)
        if index < first:
            continue
        inputs = tokens[start : start + SEGMENT + 1]
        targets = inputs[None, 1:].clone()
        if len(inputs) <= SEGMENT or (first == 8 and len(encodings) == 12):  # a passage ends where the next begins
            targets = torch.cat([inputs[None, 1:SEGMENT], torch.tensor([[-100]])], dim=1)
        losses = stream.losses(seen, targets, memory="own" if row.memory_layers else "none")
        total += float(losses.sum())
        count += int((targets != -100).sum())
    return math.exp(total / count)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=".cache/longmem/smollm2-135m")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--skip-tokens", type=int, default=2000, help="tokens at the start of the text left out")
    parser.add_argument("--rows", default="", help="only the rows whose name holds this text")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.backbone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.backbone)
    text = arguments.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[arguments.skip_tokens :]
    num_layers = model.config.num_hidden_layers
    every = range(1, num_layers + 1)
    backbone = Backbone(model, taps=range(num_layers + 1), calls=every, memory_layers=every)
    novel = ids[: 4096 + 1]
    again = torch.cat([ids[:2048], *[ids[at : at + SEGMENT] for at in PASSAGES]])
    encoded = {}
    for name, tokens in (("novel", novel), ("again", again)):
        encoded[name] = [
            backbone(tokens[None, at : at + SEGMENT]) for at in range(0, len(tokens) - SEGMENT + 1, SEGMENT)
        ]
    print(f"{'untrained SideNet':44} {'novel':>8} {'again':>8} {'seconds':>8}")
    for row in rows_for(num_layers):
        if arguments.rows not in row.name:
            continue
        begun = time.perf_counter()
        # Each segment of the novel sees the 2,048 to 4,096 tokens before it: a memory of 4,096, scored from 2,048 on.
        left = perplexity(row, backbone, encoded["novel"], novel, 8, 4096)
        right = perplexity(row, backbone, encoded["again"], again, 8, 2048)
        print(f"{row.name:44} {left:8.2f} {right:8.2f} {time.perf_counter() - begun:8.1f}", flush=True)


if __name__ == "__main__":
    main()
