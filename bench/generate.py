"""What a generated token costs after so much past: LongMem, with it in memory, against its backbone's full attention.

    python bench/generate.py --model EXPORT [--past 1024 8192 65536] [--tokens 16] [--rounds 3] [--threads 2]
    python bench/generate.py --stream 100000     # a tiny random model writes on and on: time a token, and space
    python bench/generate.py --untrained BACKBONE    # whether a SideNet nobody trained writes what its backbone does

Of each past: seconds until the first token (reading it), tokens a second after it (both models in turns, medians), and
bytes that are kept. The past is random tokens. LongMem reads all of it. Full attention reads up to `--whole` tokens; of
a longer past it reads pieces at some places of it, behind keys and values drawn at random, and the time between is
interpolated (marked ~): a piece's time grows evenly with what lies before it. Its tokens are timed behind such keys.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

# Threads wait for each other by turning round, not by sleeping: set before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

from pipeline.config.model import ModelSettings
from pipeline.face import LongMemCache, LongMemConfig, LongMemForCausalLM

PIECE = 512  # tokens that full attention reads at once
PLACES = 5  # of a past that is not read whole
PROMPTS = ("It was the best of times, it was the worst of times,", "def fibonacci(n):\n", "The harbour lay quiet under")


class Read(NamedTuple):
    """What was read: seconds, whether they are interpolated, what is kept of it, and a step that makes one token."""

    seconds: float
    is_interpolated: bool
    num_bytes: int
    step: Callable[[], None]


def longmem(model: LongMemForCausalLM, tokens: Tensor) -> Read:
    cache, begin = LongMemCache(), time.perf_counter()
    model(tokens, past_key_values=cache, logits_to_keep=1)
    seconds = time.perf_counter() - begin

    def step() -> None:
        model(tokens[:, -1:], past_key_values=cache)

    return Read(seconds, False, cache.num_bytes, step)


def full_attention(model: LongMemForCausalLM, tokens: Tensor, *, whole: int) -> Read:
    backbone, length = model.backbone, tokens.shape[1]
    if length <= whole:
        cache, begin = DynamicCache(), time.perf_counter()
        for first in range(0, length, PIECE):
            backbone(tokens[:, first : first + PIECE], past_key_values=cache, logits_to_keep=1)
        seconds = time.perf_counter() - begin
    else:
        places = [round((length - PIECE) * number / (PLACES - 1)) for number in range(PLACES)]
        times = []
        for place in places:
            cache = drawn(model, place)
            begin = time.perf_counter()
            backbone(tokens[:, :PIECE], past_key_values=cache, logits_to_keep=1)
            times.append(time.perf_counter() - begin)
            del cache
        between = [(one + other) / 2 for one, other in itertools.pairwise(times)]
        seconds = statistics.mean(between) * length / PIECE
        cache = drawn(model, length)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def step() -> None:
        with torch.no_grad():
            backbone(tokens[:, -1:], past_key_values=cache)

    return Read(seconds, length > whole, num_bytes, step)


def drawn(model: LongMemForCausalLM, length: int) -> DynamicCache:
    """Keys and values of a past that was not read."""
    cache, own = DynamicCache(), model.longmem.backbone
    for layer in range(len(own.layers) if length else 0):
        size = (1, own.num_kv_heads, length, own.head_dim)
        cache.update(*(torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


def seconds_of(step: Callable[[], None], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


@torch.no_grad()
def compare(model: LongMemForCausalLM, past: int, *, num_tokens: int, rounds: int, whole: int) -> str:
    tokens = torch.randint(model.config.vocab_size, (1, past), generator=torch.Generator().manual_seed(past))
    tokens = tokens.to(model.device)
    with model.longmem.backbone.keeping_nothing():
        full = full_attention(model, tokens, whole=whole)
    ours = longmem(model, tokens)
    times: dict[str, list[float]] = {"ours": [], "full": []}
    for number in range(rounds + 1):
        for name, read in (("ours", ours), ("full", full)):
            with model.longmem.backbone.keeping_nothing() if name == "full" else torch.no_grad():
                seconds = seconds_of(read.step, num_tokens)
            if number:  # the first round warms up
                times[name].append(seconds)
    own, other = statistics.median(times["ours"]), statistics.median(times["full"])
    about = "~" if full.is_interpolated else ""
    cells = [
        f"{past:,}",
        f"{ours.seconds:.1f}",
        f"{about}{full.seconds:.1f}",
        f"{about}{ours.seconds / full.seconds:.2f}",
        f"{1 / own:.2f}",
        f"{1 / other:.2f}",
        f"{other / own:.2f}",
        f"{ours.num_bytes / 2**20:,.0f}",
        f"{full.num_bytes / 2**20:,.0f}",
    ]
    gc.collect()
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def stream(num_tokens: int, *, parts: int = 10) -> None:
    """A tiny model writes; what a token takes and what the process holds, in each part."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    memory = {"tokens": 4096, "window_tokens": 64, "sink": True, "position": "fixed:256"}
    side = {"layout": "top", "memory_layers": "all", "fusion": "joint"}
    settings = ModelSettings.model_validate(
        {"memory": memory, "sidenet": side, "segment_tokens": 128, "context_tokens": 32}
    )
    model = LongMemForCausalLM(LongMemConfig(config, settings.model_dump(mode="json"))).eval()
    cache, token = LongMemCache(), torch.zeros(1, 1, dtype=torch.int64)
    print("tiny random model, memory 4,096 tokens\n")
    print("| tokens written | ms a token | kept MiB | resident MiB |\n| --- | --- | --- | --- |")
    for part in range(parts):
        begin = time.perf_counter()
        for _ in range(num_tokens // parts):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        each = (time.perf_counter() - begin) / (num_tokens // parts)
        cells = [f"{(part + 1) * num_tokens // parts:,}", f"{each * 1e3:.2f}", f"{cache.num_bytes / 2**20:.1f}"]
        print("| " + " | ".join([*cells, f"{resident_mib():.0f}"]) + " |", flush=True)


@torch.no_grad()
def untrained(backbone: str, *, num_tokens: int = 40) -> None:
    """Tokens of the backbone and of a LongMem over it without memory: greedy and by beams, one row and three."""
    causal_lm = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(backbone, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = ModelSettings.model_validate({"sidenet": {"layout": "top"}, "segment_tokens": 256})
    config = LongMemConfig(causal_lm.config, settings.model_dump(mode="json"), backbone_name=backbone)
    model = LongMemForCausalLM(config, causal_lm).eval()
    for prompts in (PROMPTS[:1], PROMPTS):
        given = tokenizer(list(prompts), return_tensors="pt", padding=True)
        for beams in (1, 3):
            way = {"max_new_tokens": num_tokens, "num_beams": beams, "do_sample": False}
            own, other = (
                one.generate(**given, **way, pad_token_id=tokenizer.pad_token_id) for one in (causal_lm, model)
            )
            print(f"{len(prompts)} rows, {beams} beams: {'the same' if torch.equal(own, other) else 'other'} tokens")


def resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an export, or what save_pretrained wrote")
    parser.add_argument("--past", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--tokens", type=int, default=16, help="that are made in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", type=int, default=8192, help="the longest past that full attention reads whole")
    parser.add_argument("--memory-tokens", type=int, default=65536)
    parser.add_argument("--stream", type=int, help="tokens that a tiny random model writes; nothing else is measured")
    parser.add_argument("--untrained", metavar="BACKBONE", help="its tokens against an untrained LongMem's; no times")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stream:
        return stream(options.stream)
    if options.untrained:
        return untrained(options.untrained)
    if not options.model:
        parser.error("--model, --stream or --untrained is needed")
    settings = {"memory": {"tokens": options.memory_tokens}}
    model = LongMemForCausalLM.from_pretrained(options.model, settings=settings)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    machine = f"{os.cpu_count()} cores, {options.threads} threads, {versions}"
    print(f"{options.model}: {machine}; memory {options.memory_tokens:,} tokens\n")
    ways = [f"{way} {what}" for what in ("reads, s", "tokens/s", "MiB") for way in ("LongMem", "full attention")]
    print("| " + " | ".join(["past", *ways[:2], "ratio", *ways[2:4], "ratio", *ways[4:]]) + " |")
    print("| --- " * 9 + "|")
    for past in options.past:
        print(compare(model, past, num_tokens=options.tokens, rounds=options.rounds, whole=options.whole), flush=True)
    return None


if __name__ == "__main__":
    main()
