"""What a memory loses that is stored in fewer bytes: fp32, bf16, fp16 and int8, on the same texts.

Of each text all but the last tokens are memorized once, in fp32, a whole number of segments. The memory is stored in
each way, written, opened again and read by two continuations, whose tokens are scored:

    on       the text goes on
    again    a passage from the middle of what is remembered comes once more, and can be looked up

`no memory` is `memory=False`. What is read now is remembered in the model's own dtype in every row, and left context is
read anew: only what was stored differs.

    python bench/memory_dtypes.py --model EXPORT [--data STORE | --text FILE ...] [--remembered 4096] [--scored 256]

*minus fp32* is the mean loss of a token minus that with fp32, paired by token, with its standard error over texts;
*largest* the largest change of a single token's loss, either way; *same chunks* the share of chunks looked up with fp32
(head by head, token by token, in all memory layers; those of its own stream included) that are looked up here, too.
*open* is from the file's name to a bank that can be read, in seconds, medians; the file is in the page cache, and of
fp32 nothing is read from it before it is used.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from eval.statistics import Float64Array, mean_and_exponential
from pipeline.data.held_out import held_out_documents
from pipeline.data.store import TokenStore
from pipeline.face import LongMemForCausalLM
from pipeline.face.contents import DTYPES
from pipeline.face.looking import watching
from pipeline.face.memory import Memory
from pipeline.face.remembering import begun, start_of
from pipeline.memory.sources import ChunksRead
from pipeline.model.longmem import DTYPES as MODEL_DTYPES

REFERENCE, NO_MEMORY = "fp32", "no memory"
NO_CHUNK = -1
MIB = 2**20


class Stored(NamedTuple):
    """A memory opened from its file, and what it takes."""

    memory: Memory
    file_mib: float
    open_seconds: float


@dataclass
class Found:
    """What was found of one way of storing, a number or an array a text."""

    losses: list[Float64Array] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    bytes_per_token: list[float] = field(default_factory=list)
    file_mib: list[float] = field(default_factory=list)
    open_seconds: list[float] = field(default_factory=list)


Continuations = Mapping[str, Tensor]
Results = dict[str, dict[str, Found]]
"""By continuation and way of storing."""


def stored(memory: Memory, dtype: str, path: Path, model: LongMemForCausalLM) -> Stored:
    """Stores a memory, and opens it until its bank can be read."""
    memory.to(dtype).save(path)
    begin = time.perf_counter()
    opened = Memory.load(path, kind=model.memory_kind)
    opened.bank(MODEL_DTYPES[model.longmem.settings.memory_dtype], model.device)
    return Stored(opened, path.stat().st_size / MIB, time.perf_counter() - begin)


@torch.no_grad()
def read(model: LongMemForCausalLM, memories: Sequence[Memory], tokens: Tensor) -> tuple[Float64Array, list[Tensor]]:
    """Loss of every token but the first, nats, and places of the chunks looked up, `[1, H, t, chunks]` a read."""
    longmem, places = model.longmem, []
    rows = begun(longmem, start_of(longmem, memories), reads_memory=bool(memories))

    def note(layer: int, read: ChunksRead, weight: Tensor) -> None:
        places.append(read.places.masked_fill(read.scores == float("-inf"), NO_CHUNK).int())

    sidenet = longmem.sidenet
    with watching(sidenet, tuple(sidenet.fusions), note) if memories else nullcontext():
        hidden = rows.read(tokens[None, :-1].to(model.device))
    losses = longmem.losses(hidden, tokens[None, 1:].to(model.device))[0]
    return losses.double().cpu().numpy(), places


def share_alike(places: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Share of the reference's chunks that were looked up by the same head for the same token."""
    alike = total = 0
    for here, wanted in zip(places, reference, strict=True):
        ordered, is_chunk = here.sort().values, wanted != NO_CHUNK
        nearest = torch.searchsorted(ordered, wanted).clamp_max(ordered.shape[-1] - 1)
        alike += int(((ordered.gather(-1, nearest) == wanted) & is_chunk).sum())
        total += int(is_chunk.sum())
    return alike / total


def compare(model: LongMemForCausalLM, text: Tensor, scored: int, results: Results) -> None:
    """Reads one text in all ways."""
    num_remembered = len(text) - scored - 1
    middle = num_remembered // 2
    continuations = {"on": text[num_remembered:], "again": text[middle : middle + scored + 1]}
    memory = model.memorize(text[:num_remembered], progress=False, dtype=REFERENCE)
    assert len(memory) == num_remembered, "some of it was forgotten: --memory-tokens is too small"
    reference: dict[str, list[Tensor]] = {}
    for dtype in sorted(DTYPES, key=lambda name: name != REFERENCE):
        with tempfile.TemporaryDirectory() as folder:
            held = stored(memory, dtype, Path(folder) / "memory.safetensors", model)
            for name, tokens in continuations.items():
                losses, places = read(model, [held.memory], tokens)
                found = results[name][dtype]
                found.losses.append(losses)
                found.same.append(share_alike(places, reference.setdefault(name, places)))
                found.bytes_per_token.append(held.memory.num_bytes / len(held.memory))
                found.file_mib.append(held.file_mib)
                found.open_seconds.append(held.open_seconds)
    for name, tokens in continuations.items():
        results[name][NO_MEMORY].losses.append(read(model, [], tokens)[0])


def show(name: str, results: Mapping[str, Found]) -> None:
    """Prints the table of one continuation."""
    print(f"\n**{name}**\n")
    columns = [
        "stored as",
        "perplexity",
        "minus fp32, nats",
        "largest",
        "same chunks",
        "bytes a token",
        "MiB",
        "open, s",
    ]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    reference = np.stack(results[REFERENCE].losses)
    everything = np.ones_like(reference)
    for way, found in results.items():
        losses = np.stack(found.losses)
        _, _, perplexity, _ = mean_and_exponential(losses, everything)
        cells = [way, f"{perplexity:.4f}", "-", "-"]
        if way != REFERENCE:
            mean, error, _, _ = mean_and_exponential(losses - reference, everything)
            spread = "" if error is None else f" +- {error:.5f}"
            cells[2:] = [f"{mean:+.5f}{spread}", f"{np.abs(losses - reference).max():.3f}"]
        if found.same:
            cells += ["-" if way == REFERENCE else f"{statistics.mean(found.same):.2%}"]
            cells += [f"{statistics.mean(found.bytes_per_token):,.0f}", f"{statistics.mean(found.file_mib):.0f}"]
            cells += [f"{statistics.median(found.open_seconds):.2f}"]
        print("| " + " | ".join(cells + ["-"] * (len(columns) - len(cells))) + " |")


def read_texts(options: argparse.Namespace, model: LongMemForCausalLM) -> list[Tensor]:
    """Texts, each cut behind what is scored of it and one token more, which is predicted last."""
    settings, texts = model.longmem.settings, []
    segment, window = settings.segment_tokens, settings.memory.window_tokens
    if options.text:
        tokenizer: Any = model.own_tokenizer()
        for path in options.text:
            own = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
            texts.append(torch.tensor(own))
    else:
        stores = [TokenStore.open(options.data, "validation")]
        least = options.remembered + options.scored + 1
        chosen = held_out_documents(stores, count=options.texts, min_tokens=least)
        texts = [torch.from_numpy(one.store.tokens(one.document, 0, least)) for one in chosen]
    found = []
    for text in texts:
        num_remembered = min(options.remembered, len(text) - options.scored - 1) // segment * segment
        if num_remembered < max(2 * (options.scored + 1), window + segment):  # or nothing would be looked up
            raise SystemExit(f"too little to look anything up: {num_remembered:,} of {len(text):,} tokens remembered")
        found.append(text[: num_remembered + options.scored + 1])
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an export, or what save_pretrained wrote")
    parser.add_argument("--data", default=".cache/longmem/quickstart-data", help="a token store; its held-out texts")
    parser.add_argument("--text", type=Path, nargs="+", help="text files, instead of those")
    parser.add_argument("--texts", type=int, default=6, help="of the token store, at most")
    parser.add_argument("--remembered", type=int, default=4096, help="tokens of each text, at most")
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=6.5, help="after which no other text is begun")
    parser.add_argument("--memory-tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"memory": {"tokens": options.memory_tokens}}
    model = LongMemForCausalLM.from_pretrained(options.model, settings=settings)
    texts = read_texts(options, model)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{os.cpu_count()} cores, {options.threads} threads, {versions}")
    lengths = ", ".join(f"{len(text) - options.scored - 1:,}" for text in texts)
    print(f"{len(texts)} texts; remembered: {lengths} tokens; {options.scored} scored of each", flush=True)
    results: Results = {name: defaultdict(Found) for name in ("on", "again")}
    begin = time.perf_counter()
    for number, text in enumerate(tqdm(texts, unit="text")):
        if time.perf_counter() - begin > 60 * options.minutes:
            print(f"the time was up after {number} texts; the others are left out")
            break
        compare(model, text, options.scored, results)
    for name, found in results.items():
        show(name, found)


if __name__ == "__main__":
    main()
