"""One read of one memory layer, forward and backward: seconds and bytes, against the two obvious alternatives.

    ours   the library's own read, `memory.retrieve_for` head and kv_head, with and without a recent window
    plain  for each head: scores of all chunks, top-k, gather keys and values, attend; gradients by autograd
    dense  PyTorch's attention over everything that is remembered, its keys kept rotated

One rank, shapes of SmolLM2-135M. All ways read the same queries and the same bank, in turns; seconds are medians, of
forward and backward together where they are compared. What is retrieved is read at the far distance (`fixed:768`) and
so read alike by `plain`, whose results are compared with ours before anything is timed; `clamp:768` has near chunks as
well where there is no window. A reader is made for every read: what holds for a segment is paid for by one layer here.
`dense` also works out gradients of keys and values, which nobody needs; the way to leave them out is not PyTorch's.

MiB are of tensors that come to be and are held at once, at most: in both passes, with what one keeps for the other;
then, of ours, in the forward pass (with what it keeps) and in the backward pass beside that, each with what the plan's
formulas say. faiss's own buffers are not seen. Keys are random.

    python bench/read.py [--memory 4096 65536 1048576] [--rounds 3] [--threads 1] [--bf16] [--quick]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Threads wait for each other by turning round, not by sleeping: set before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from pipeline.config.schema import Config
from pipeline.memory.bank import MemoryBank
from pipeline.memory.layer import Geometry
from pipeline.memory.reader import BankReader, MemoryRead
from pipeline.memory.room import room_on
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.model.longmem import DTYPES
from pipeline.planning.read import read_parts
from pipeline.planning.shapes import shape_of
from pipeline.planning.sizes import bank_shape
from pipeline.positions import PositionEncoding, PositionRule

HEADS, KV_HEADS, DIM, SEGMENT, CHUNK, WINDOW, FAR = 9, 3, 64, 256, 4, 512, 768
TOP_K = {"head": 16, "kv_head": 32}  # chunks
ENCODING = PositionEncoding(inv_freq=1e5 ** (-torch.arange(0, DIM, 2) / DIM))
SCALE = DIM**-0.5
BACKBONE = LlamaConfig(
    hidden_size=HEADS * DIM,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    vocab_size=49152,
)
TOLERANCE = 1e-4  # of values near 1: sums of float32 in another order
DIFFERENT = 5e-3  # share of queries that may differ by more: two chunks score alike but for rounding
PIECE = 65536  # tokens written at once
MIB = 2**20


class Way(NamedTuple):
    """One way of reading; `-`: it means nothing there."""

    name: str
    retrieve_for: str
    window: int
    search: str
    position: str

    def reads_as(self, other: Way) -> bool:
        """Whether both read the same chunks and the same window; of what is near they may think differently."""
        return (self.retrieve_for, self.window) == (other.retrieve_for, other.window)


class Seconds(NamedTuple):
    """Of one read."""

    forward: float
    backward: float


class Space(NamedTuple):
    """Bytes that are held at once, at most: in both passes, in the forward pass, in the backward pass beside those."""

    most: int
    forward: int
    backward: int


Read = Callable[[Tensor], MemoryRead | Tensor]

DENSE = Way("dense", "-", 0, "-", "true")


def ways() -> list[Way]:
    """All that is measured; faiss finds chunks for single heads only."""
    found = []
    for retrieve_for in TOP_K:
        for window in (0, WINDOW):
            for search in ("torch", "faiss") if retrieve_for == "head" else ("torch",):
                found.append(Way("ours", retrieve_for, window, search, f"fixed:{FAR}"))
            if not window:
                found.append(Way("ours", retrieve_for, window, "torch", f"clamp:{FAR}"))
            found.append(Way("plain", retrieve_for, window, "flat", f"fixed:{FAR}"))
    return [*found, DENSE]


def config_of(way: Way, num_tokens: int, dtype: str) -> Config:
    """The run that reads so."""
    memory: dict[str, Any] = {"tokens": num_tokens, "chunk_size": CHUNK, "device": "host", "dtype": dtype}
    if way.name == "ours":
        memory |= {"retrieve_for": way.retrieve_for, "window_tokens": way.window, "search": way.search}
        memory |= {"top_k_tokens": TOP_K[way.retrieve_for] * CHUNK, "position": way.position}
    return Config.model_validate(
        {
            "run": {"output_dir": "unused"},
            "backbone": {"path": "unused"},
            "data": {"path": "unused", "lanes": 1},
            "memory": memory,
            "sidenet": {"fusion": "joint"},
            "train": {"steps": 1, "segment_tokens": SEGMENT, "segments_per_step": 1},
        }
    )


def filled_bank(num_tokens: int, dtype: torch.dtype) -> MemoryBank:
    """A bank that remembers so many tokens, full of random keys and values."""
    shape = bank_shape(config_of(DENSE, num_tokens, "fp32").model, shape_of(BACKBONE), num_layers=1, num_lanes=1)
    bank, generator = MemoryBank(shape, dtype=dtype, device=torch.device("cpu")), torch.Generator().manual_seed(0)
    for start in range(0, num_tokens, PIECE):
        length = min(PIECE, num_tokens - start)
        key, value = (torch.randn(1, KV_HEADS, length, DIM, generator=generator) for _ in range(2))
        bank.append([(key, value)], start=start, documents=torch.zeros(1, length, dtype=torch.int64))
    return bank


def read_ours(bank: MemoryBank, settings: ReadSettings, query: Tensor) -> MemoryRead:
    """The library's own read."""
    reading = Reading(settings.num_tokens, torch.zeros(1, SEGMENT, dtype=torch.int64))
    return BankReader(bank, settings, [Geometry(ENCODING, SCALE)], reading).read(0, query)


def read_plain(bank: MemoryBank, way: Way, num_tokens: int, query: Tensor) -> Tensor:
    """Searches, gathers and attends, head by head (or by key/value head), the window in the same softmax."""
    store, older = bank.layers[0], num_tokens - way.window
    far, near = ENCODING.rotate(query, torch.tensor(FAR)), ENCODING.rotate(query, torch.arange(SEGMENT))
    together = HEADS // KV_HEADS if way.retrieve_for == "kv_head" else 1
    outputs = []
    for first in range(0, HEADS, together):
        heads, kv_head = slice(first, first + together), first * KV_HEADS // HEADS
        keys, values, chunk_keys = (of[kv_head, 0] for of in (store.keys, store.values, store.chunk_keys))
        scores = (far[0, heads].detach() @ chunk_keys[: older // CHUNK].T).amax(dim=0)  # [T, C]
        chosen = scores.topk(TOP_K[way.retrieve_for], dim=-1).indices
        key, value = (of[chosen].flatten(1, 2).float() for of in (keys, values))  # [T, k c, D]
        recent = [of.flatten(0, 1)[older:num_tokens].float() for of in (keys, values)]  # [W, D]
        recent_key = ENCODING.rotate(recent[0], torch.arange(-way.window, 0))
        logits = torch.cat([torch.einsum("utd,tnd->utn", far[0, heads], key), near[0, heads] @ recent_key.T], dim=-1)
        weights = (logits * SCALE).softmax(dim=-1)
        retrieved = torch.einsum("utn,tnd->utd", weights[..., : key.shape[1]], value)
        outputs.append(retrieved + weights[..., key.shape[1] :] @ recent[1])
    return torch.cat(outputs)[None]


def read_dense(keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
    """Attention over everything, all of which lies before every query, so that nothing is masked."""
    rotated = ENCODING.rotate(query, torch.arange(SEGMENT))
    by_kv_head = rotated.view(1, KV_HEADS, -1, DIM)  # the queries of a key/value head are rows of one product
    return F.scaled_dot_product_attention(by_kv_head, keys, values, scale=SCALE).view_as(query)


def dense_over(bank: MemoryBank, num_tokens: int) -> Read:
    """The dense way; its keys are rotated to their places once, as an ordinary cache keeps them."""
    stored = [
        of[:, 0].flatten(1, 2)[None, :, :num_tokens].float() for of in (bank.layers[0].keys, bank.layers[0].values)
    ]
    return partial(read_dense, ENCODING.rotate(stored[0], torch.arange(-num_tokens, 0)), stored[1])


def reader_of(way: Way, bank: MemoryBank, num_tokens: int) -> Read:
    """How a way reads."""
    if way.name == "dense":
        return dense_over(bank, num_tokens)
    if way.name == "plain":
        return partial(read_plain, bank, way, num_tokens)
    settings = ReadSettings(
        num_tokens,
        TOP_K[way.retrieve_for],
        rule=PositionRule.parse(way.position),
        search=way.search,
        retrieve_for=way.retrieve_for,
        window_tokens=way.window,
    )
    return partial(read_ours, bank, settings)


def results(found: MemoryRead | Tensor) -> list[Tensor]:
    """What gradients come into."""
    if isinstance(found, Tensor):
        return [found]
    return [found.values] if found.window is None else [found.values, found.window.values]


def joined(found: MemoryRead | Tensor) -> Tensor:
    """The attention over all that was read: one softmax over what was retrieved and the window."""
    if isinstance(found, Tensor) or found.window is None:
        return results(found)[0]
    weights = torch.stack([found.log_sum_exp, found.window.log_sum_exp]).softmax(dim=0)[..., None]
    return (weights * torch.stack(results(found))).sum(dim=0)


def values_and_gradient(read: Read, query: Tensor) -> list[Tensor]:
    """What a way reads, and a gradient that comes back, `[B, H, T, D]`."""
    query.grad = None
    values = joined(read(query))
    values.backward(torch.linspace(-1, 1, values.numel()).view_as(values))
    assert query.grad is not None
    return [values.detach(), query.grad]


def check(readers: dict[Way, Read], query: Tensor) -> None:
    """Raises where ours and the plain way, which read the same, find something else."""
    for plain in [way for way in readers if way.name == "plain"]:
        expected = values_and_gradient(readers[plain], query)
        ours = [way for way in readers if way.name == "ours" and way.reads_as(plain) and way.position == plain.position]
        for way in ours:
            found = values_and_gradient(readers[way], query)
            for what, got, wanted in zip(("values", "gradients"), found, expected, strict=True):
                differs = ((got - wanted).abs() > TOLERANCE).any(dim=-1).double().mean()
                if differs > DIFFERENT:
                    raise SystemExit(f"{way}: {differs:.2%} of the queries have other {what} than the plain way's")


def timed(read: Read, query: Tensor) -> Seconds:
    """One read and its backward pass."""
    query.grad = None
    begin = time.perf_counter()
    found = results(read(query))
    middle = time.perf_counter()
    torch.autograd.backward(found, [torch.ones_like(query)] * len(found))
    return Seconds(middle - begin, time.perf_counter() - middle)


def held_bytes(work: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes of tensors that came to be while something ran: at most at once, and at its end; and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = profiler.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = torch.tensor([size for _, size in sorted(sizes)]).cumsum(0)
    return int(held.max()), int(held[-1]), result


def space(read: Read, query: Tensor) -> Space:
    """Bytes of a read and of its backward pass."""
    query.grad, gradient = None, torch.ones_like(query)
    forward, kept, found = held_bytes(lambda: results(read(query)))
    backward, *_ = held_bytes(lambda: torch.autograd.backward(found, [gradient] * len(found)))
    return Space(max(forward, kept + backward), forward, backward)


def planned(way: Way, num_tokens: int, dtype: str) -> tuple[int, int]:
    """The same by the plan's formulas."""
    model, shape = config_of(way, num_tokens, dtype).model, shape_of(BACKBONE)
    bank = bank_shape(model, shape, num_layers=1, num_lanes=1)
    parts = {part.name: part.num_bytes for part in read_parts(model, shape, bank, place="host")}
    result = HEADS * SEGMENT * (DIM + 1) * 4 * (2 if way.window else 1)  # values and log-sum-exp
    return parts["one read of memory"] + parts["what reads keep"] + result, parts["backward of one read"]


def why_without_dense(num_tokens: int, before: float | None, limit: float) -> str | None:
    """Why dense attention is left out; None: it is not. `before`: seconds per token of a smaller memory."""
    room, needed = room_on(torch.device("cpu")), 6 * KV_HEADS * num_tokens * DIM * 4  # keys, values, gradients, copies
    if room is not None and needed > room.free:
        return f"{needed / MIB:,.0f} MiB are more than are free"
    if before is not None and before * num_tokens > limit:
        return f"one read would take about {before * num_tokens:,.0f} s"
    return None


def ratio(medians: dict[Way, Seconds], way: Way, name: str) -> str:
    """Seconds of a way in those of another that reads the same."""
    rivals = [rival for rival in medians if rival.name == name != way.name]
    same = [rival for rival in rivals if rival == DENSE or rival.reads_as(way)]
    return f"{sum(medians[way]) / sum(medians[same[0]]):.2f}" if same else "-"


def show(seconds: dict[Way, list[Seconds]], spaces: dict[Way, Space], formulas: dict[Way, tuple[int, int]]) -> None:
    """Prints the rows of one memory size."""
    medians = {
        way: Seconds(*(statistics.median(part) for part in zip(*each, strict=True))) for way, each in seconds.items()
    }
    titles = [*Way._fields, "forward s", "backward s", "/ plain", "/ dense", "MiB", "forward / plan", "backward / plan"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for way, (forward, backward) in medians.items():
        cells = [*map(str, way), f"{forward:.3f}", f"{backward:.3f}"]
        cells += [ratio(medians, way, "plain"), ratio(medians, way, "dense"), f"{spaces[way].most / MIB:,.1f}"]
        for used, planned_bytes in zip(spaces[way][1:], formulas.get(way, ()), strict=False):
            cells.append(f"{used / MIB:.1f} / {planned_bytes / MIB:.1f}")
        print(f"| {' | '.join(cells + ['-'] * (len(titles) - len(cells)))} |", flush=True)


def measure(num_tokens: int, arguments: argparse.Namespace, dense_before: float | None) -> float | None:
    """Measures one memory size; returns seconds that dense attention takes per token, if that is known."""
    dtype = "bf16" if arguments.bf16 else "fp32"
    bank = filled_bank(num_tokens, DTYPES[dtype])
    query = torch.randn(1, HEADS, SEGMENT, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    without_dense = why_without_dense(num_tokens, dense_before, arguments.dense_seconds)
    readers = {way: reader_of(way, bank, num_tokens) for way in ways() if not (way == DENSE and without_dense)}
    check(readers, query)
    spaces = {way: space(read, query) for way, read in readers.items()}
    seconds: dict[Way, list[Seconds]] = {way: [] for way in readers}
    rounds = arguments.rounds if arguments.quick else arguments.rounds * min(8, max(1, 65536 // num_tokens))
    for _ in range(rounds):
        for way, read in readers.items():  # in turns, so that a machine that drifts slows all alike
            seconds[way].append(timed(read, query))
    print(f"\n{num_tokens:,} tokens of memory, {dtype}, medians of {rounds}\n")
    show(seconds, spaces, {way: planned(way, num_tokens, dtype) for way in readers if way.name == "ours"})
    if without_dense:
        print(f"\ndense is left out: {without_dense}")
        return dense_before
    return statistics.median(sum(each) for each in seconds[DENSE]) / num_tokens


def machine(threads: int) -> str:
    """What this ran on."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {threads} thread(s), torch {torch.__version__}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, nargs="+", default=[4096, 65536, 1048576])
    parser.add_argument(
        "--rounds", type=int, default=3, help="reads of each way; up to 8 times as many below 65,536 tokens"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="keys and values in bf16")
    parser.add_argument("--dense-seconds", type=float, default=120, help="leave dense out where one read takes longer")
    parser.add_argument("--quick", action="store_true", help="4,096 and 16,384 tokens, one round: whether it runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.memory, arguments.rounds = [4096, 16384], 1
    import faiss

    faiss.omp_set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    # The C library keeps freed memory for the next buffer once a piece of up to 32 MiB was freed, as happens at once in
    # training; before, it gives back and clears every page again, which costs more than reading does.
    torch.ones(2**23 - 2**18)
    print(machine(arguments.threads))
    dense: float | None = None
    for num_tokens in sorted(arguments.memory):
        dense = measure(num_tokens, arguments, dense)


if __name__ == "__main__":
    main()
