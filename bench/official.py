"""The authors' checkpoints at their size, with random weights: seconds and memory of importing them and of a forward.

Makes `backbone.pt` (407,072,768 parameters), `longmem.pt` (558,155,792) and `dict.txt` in the layout that the authors'
code saves, in fp16, in `--folder`; imports them by `launch/import_official.py` in a process of its own; then loads the
result and reads 1,024 tokens with 65,536 in memory. What is remembered is drawn at random, as large as the model's own
keys and values: reading so many tokens takes two cores a quarter of an hour, and time and memory are the same.

    python bench/official.py --folder /tmp/official [--bpe NAME] [--memory 65536] [--quick]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.model import ModelSettings
from pipeline.metrics.peak import forget_peak, peak_bytes
from pipeline.model.load import load_longmem
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Stream
from pipeline.official.layout import Sizes, longmem_shapes

PUBLISHED = Sizes(51_200, 1024, 4096, 24, 16, 12, 9)
QUICK = Sizes(51_200, 128, 512, 4, 4, 2, 1)
NESTED, MODEL = "decoder.pretrained_model.", "decoder.model."
SETTINGS = {"memory_size": 65_536, "k": 64, "chunk_size": 4, "tokens_per_sample": 1024, "activation_fn": "gelu"}
GIB = 2**30


def weights(sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Random weights by the names of LongMem's checkpoint, in fp16."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in longmem_shapes(sizes).items():
        if name == "decoder.version":
            yield name, torch.tensor([3.0])
        elif "ln_" in name or "layer_norm" in name:
            yield name, torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
        else:
            yield name, (0.02 * torch.randn(shape, generator=generator)).half()


def make(folder: Path, sizes: Sizes) -> list[Path]:
    """Writes both checkpoints and the dictionary."""
    model = dict(weights(sizes))
    model["decoder.embed_tokens.weight"] = model[f"{NESTED}{MODEL}transformer.wte.weight"]
    model["decoder.output_projection.weight"] = model[f"{NESTED}{MODEL}lm_head.weight"]
    alone = {name[len(NESTED) :]: weight for name, weight in model.items() if name.startswith(NESTED)}
    settings = {**SETTINGS, "retrieval_layer_index": sizes.source_layer - 1}
    paths = [folder / "backbone.pt", folder / "longmem.pt", folder / "dict.txt"]
    namespace = argparse.Namespace(newgpt_mode="alibi", num_attention_heads=sizes.num_heads)
    torch.save({"args": None, "cfg": {"model": namespace}, "model": alone}, paths[0])
    torch.save({"args": None, "cfg": {"model": settings}, "model": model}, paths[1])
    # The GPT-2 ids that there are, in another order, and words that fill up.
    symbols = [str(7919 * number % 50_257) for number in range(50_257)]
    symbols += [f"madeupword{number:04d}" for number in range(sizes.vocab_size - 4 - len(symbols))]
    paths[2].write_text("".join(f"{symbol} {len(symbols) - n}\n" for n, symbol in enumerate(symbols)), encoding="utf-8")
    return paths


def imported(paths: list[Path], output: Path, bpe: str | None) -> str:
    """Imports them in another process, and says what that took."""
    tokenizer = ["--no-tokenizer"] if bpe is None else ["--bpe", bpe]
    command = [sys.executable, "launch/import_official.py", *map(str, paths[:2]), "--dict", str(paths[2])]
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(output), *tokenizer], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return f"| import | {seconds:.1f} s | {peak / GIB:.2f} GiB |"


def read(model: LongMem, num_tokens: int) -> str:
    """One forward of a segment over a full memory: the second of two, for the first takes room for itself."""
    generator = torch.Generator().manual_seed(0)
    length = model.settings.segment_tokens
    tokens = torch.randint(4, 50_000, (1, length), generator=generator)
    documents = torch.zeros_like(tokens)
    bank = model.bank(1)
    stream = Stream(model, bank)
    with torch.no_grad():
        seen = stream.look(tokens, documents)
        like = seen.encoding.memory[0]
        for start in range(0, num_tokens, length):
            pair = [part.std() * torch.randn(part.shape, generator=generator) for part in like]
            bank.append([(pair[0], pair[1])], start=start, documents=documents)
        stream.place = num_tokens
        lines = []
        for memory in ("none", "own", "none", "own"):
            forget_peak(model.device)
            start_s = time.perf_counter()
            seen = stream.look(tokens, documents)
            losses = model.losses(stream.hidden(seen, memory=memory), tokens)
            seconds = time.perf_counter() - start_s
            assert bool(losses.isfinite().all())
            words = "without memory" if memory == "none" else f"with {num_tokens:,} in memory"
            peak = peak_bytes(model.device)
            lines.append(f"| {length:,} tokens {words} | {seconds:.2f} s | {(peak or 0) / GIB:.2f} GiB |")
    return "\n".join(lines[2:])


def main() -> None:
    """Runs the bench and prints its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder, for some 5 GB")
    parser.add_argument("--bpe", help="as launch/import_official.py has it; by default no tokenizer is made")
    parser.add_argument("--memory", type=int, default=65_536, help="tokens in memory (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small model, to try this bench")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    paths = make(options.folder, QUICK if options.quick else PUBLISHED)
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e9:.2f} GB" for path in paths)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}; {sizes}")
    rows = [imported(paths, options.folder / "imported", options.bpe)]
    rows.append(read(_with(load_longmem(options.folder / "imported"), tokens=options.memory), options.memory))
    print("| what | time | peak memory |\n| --- | --- | --- |\n" + "\n".join(rows))


def _with(model: LongMem, **memory: Any) -> LongMem:
    settings = model.settings.model_dump()
    settings["memory"] |= memory
    return LongMem(ModelSettings.model_validate(settings), model.backbone, model.sidenet)


if __name__ == "__main__":
    main()
