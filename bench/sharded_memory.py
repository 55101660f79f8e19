"""Reading a sharded memory: seconds and bytes, against the two obvious alternatives.

    ours       queries travel, partial results come back
    all        every rank gathers all keys and values of the layer, then reads alone
    retrieved  the scores travel as in ours, then the retrieved keys and values come to the query's owner

Both others keep what they fetched until the backward pass, and so send nothing then. The group reads the same query
tokens together whatever its size: with `G` ranks each has `tokens / G` of them; the last table has `tokens` for each
rank. One layer, forward and backward, one thread a rank, gloo on this machine. Bytes are those that one rank sends to
others. Keys are random, so that what a query reads lies in all shards alike, which is the worst case for ours.

    python bench/sharded_memory.py [--tokens 1024] [--heads 16] [--head-dim 64] [--memory 65536] [--ranks 1 2 4]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.exchange import Alone, Exchange, RankGroup
from pipeline.memory.layer import Geometry, LayerView
from pipeline.memory.reader import BankReader
from pipeline.memory.search import search
from pipeline.memory.segment import Reading, ReadSettings, SegmentView
from pipeline.memory.winners import Shared, share
from pipeline.positions import PositionEncoding

CHUNK, TOP_K = 4, 16


@dataclass(frozen=True)
class Sizes:
    """What is read: query tokens of the group, heads, head size, memory tokens of the group."""

    tokens: int
    heads: int
    head_dim: int
    memory: int
    dtype: torch.dtype = torch.float32


class Timing(NamedTuple):
    """Medians of one rank: seconds of the forward and backward pass, bytes sent."""

    forward: float
    backward: float
    sent: float


def shard(sizes: Sizes, exchange: Exchange, segment: int) -> MemoryBank:
    """This rank's full shard: every `G`-th segment of the past, keys and values random."""
    own = sizes.memory // exchange.size
    shape = BankShape(1, 1, sizes.heads, sizes.head_dim, own // CHUNK, CHUNK)
    bank = MemoryBank(shape, dtype=sizes.dtype, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(exchange.rank)
    for index in range(own // segment):
        kv = [torch.randn(1, sizes.heads, segment, sizes.head_dim, generator=generator) for _ in range(2)]
        start = (index * exchange.size + exchange.rank) * segment
        bank.append([(kv[0], kv[1])], start=start, documents=torch.zeros(1, segment, dtype=torch.int64))
    return bank


def attend_to(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scale: float) -> Tensor:
    """Plain attention of each query `[n, D]` to its own keys `[n, m, D]`."""
    logits = (key * query[:, None]).sum(-1) * scale
    return (logits.masked_fill(~valid, float("-inf")).softmax(-1)[:, None] @ value)[:, 0]


def read_ours(bank: MemoryBank, exchange: Exchange, settings: ReadSettings, query: Tensor, start: int) -> Tensor:
    """The library's own read."""
    documents = torch.zeros(1, query.shape[2], dtype=torch.int64)
    geometry = Geometry(PositionEncoding(), query.shape[-1] ** -0.5)
    reader = BankReader(bank, settings, [geometry], Reading(start, documents), exchange=exchange)
    return reader.read(0, query).values


def read_all(bank: MemoryBank, exchange: Exchange, settings: ReadSettings, query: Tensor, start: int) -> Tensor:
    """Gathers every shard, then reads alone."""
    store, shape = bank.layers[0], bank.shape
    whole = MemoryBank(
        replace(shape, num_chunks=shape.num_chunks * exchange.size), dtype=bank.dtype, device=bank.device
    )
    target = whole.layers[0]
    for to, part in ((target.keys, store.keys), (target.values, store.values)):
        gathered = exchange.all_gather(part, purpose="bank")()  # [G, Hkv, B, C, c, D]
        to.unflatten(2, (exchange.size, -1)).copy_(gathered.movedim(0, 2))
        del gathered
    target.chunk_keys.copy_(target.keys.float().mean(dim=-2))
    whole.positions[:] = range(0, len(whole.positions) * CHUNK, CHUNK)
    whole.documents.zero_()
    return read_ours(whole, Alone(), settings, query, start)


def read_retrieved(bank: MemoryBank, exchange: Exchange, settings: ReadSettings, query: Tensor, start: int) -> Tensor:
    """Brings each query's retrieved keys and values to its owner."""
    length, dim, scale = query.shape[2], query.shape[-1], query.shape[-1] ** -0.5
    documents = torch.zeros(1, length, dtype=torch.int64)
    first = start - exchange.rank * length
    geometry = Geometry(PositionEncoding(), scale)
    readings = [Reading(first + rank * length, documents) for rank in range(exchange.size)]
    segments = [SegmentView(bank, settings, reading, settings.rule) for reading in readings]
    views = [LayerView(segment, bank.layers[0], geometry) for segment in segments]
    outputs = []
    for at in range(0, length, settings.query_block_tokens):
        tokens = slice(at, min(at + settings.query_block_tokens, length))
        gathered = exchange.all_gather(query[:, :, tokens].detach(), purpose="queries")()
        found = [search(view, view.queries(block, tokens)) for view, block in zip(views, gathered, strict=True)]
        shared = share(found, exchange, k=TOP_K)()
        own = views[exchange.rank].segment.pools.by_pool(query[:, :, tokens]).flatten(0, 3)
        kv, valid = bring(views, shared, exchange, num_queries=len(own))
        outputs.append(attend_to(own, kv[..., :dim], kv[..., dim:], valid, scale))
    return torch.cat(outputs)


def bring(views: list[LayerView], shared: Shared, exchange: Exchange, *, num_queries: int) -> tuple[Tensor, Tensor]:
    """Brings the keys and values that this rank's queries read: `[n, k * c, 2 D]`, and which there are."""
    parts, counts = [], []
    for view, winners in zip(views, shared.winners, strict=True):
        heads = torch.div(winners.members, num_queries // view.segment.pools.num_kv_heads, rounding_mode="floor")[
            :, None
        ]
        slots = (heads * view.segment.num_slots + winners.slots)[winners.valid]
        parts.append(torch.cat([view.keys[slots], view.values[slots]], dim=-1).float())  # [chunks, c, 2 D]
        counts.append(winners.counts.to(torch.uint8))
    lengths = exchange.all_to_all(counts, rows=[len(held) for held in shared.holders], purpose="counts")()
    rows = [int(length.sum()) for length in lengths]
    received = torch.cat(exchange.all_to_all(parts, rows=rows, purpose="keys_and_values")())
    asking = torch.cat([held.repeat_interleave(n.long()) for held, n in zip(shared.holders, lengths, strict=True)])
    order = asking.argsort(stable=True)
    asking, first = asking[order], torch.searchsorted(asking[order], asking[order])
    place = torch.arange(len(asking)) - first
    kv = received.new_zeros(num_queries, TOP_K, *received.shape[1:])
    valid = torch.zeros(num_queries, TOP_K, received.shape[1], dtype=torch.bool)
    kv[asking, place], valid[asking, place] = received[order], True
    return kv.flatten(1, 2), valid.flatten(1)


def measure(read: Callable[..., Tensor], sizes: Sizes, exchange: Exchange, rounds: int) -> Timing:
    """Times one way of reading."""
    segment = sizes.tokens // exchange.size
    bank = shard(sizes, exchange, segment)
    settings = ReadSettings(num_tokens=sizes.memory, top_k_chunks=TOP_K)
    start = sizes.memory + exchange.rank * segment
    forward, backward = [], []
    for number in range(rounds + 1):
        exchange.traffic.clear()
        generator = torch.Generator().manual_seed(100 + exchange.rank)
        query = torch.randn(1, sizes.heads, segment, sizes.head_dim, generator=generator).requires_grad_()
        if exchange.size > 1:
            dist.barrier()
        times = [time.perf_counter()]
        out = read(bank, exchange, settings, query, start)
        times.append(time.perf_counter())
        out.sum().backward()
        times.append(time.perf_counter())
        if number:
            forward.append(times[1] - times[0])
            backward.append(times[2] - times[1])
    sent = sum(exchange.traffic.values())
    return Timing(statistics.median(forward), statistics.median(backward), sent)


def work(rank: int, size: int, port: int, jobs: list[tuple[str, Sizes]], rounds: int, queue: mp.Queue) -> None:
    """One rank: every job in turn."""
    torch.set_num_threads(1)
    # The C library keeps freed memory for the next buffer once a piece of up to 32 MiB was freed, as happens at once in
    # training; before, it gives back and clears every page again, which costs more than reading does.
    torch.ones(2**23 - 2**18)
    exchange: Exchange = Alone()
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
        assert dist.group.WORLD is not None
        exchange = RankGroup(dist.group.WORLD)
    ways = {"ours": read_ours, "all": read_all, "retrieved": read_retrieved}
    results = [measure(ways[name], sizes, exchange, rounds) for name, sizes in jobs]
    if rank == 0:
        queue.put(results)
    if size > 1:
        dist.destroy_process_group()


def run(size: int, jobs: list[tuple[str, Sizes]], rounds: int) -> list[Timing]:
    """Starts the ranks and returns rank 0's timings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(work, (size, port, jobs, rounds, queue), nprocs=size, join=False)
    while not context.join():  # raises if a rank failed
        pass
    results: list[Timing] = queue.get()
    return results


def formulas(sizes: Sizes, size: int) -> dict[str, int]:
    """Bytes that one rank sends, by the formulas of docs/memory.md; expected, where they depend on what is read."""
    n, d, others = sizes.heads * sizes.tokens // size, sizes.head_dim, size - 1
    asked = 1 - (1 - 1 / size) ** TOP_K  # some of `k` chunks that lie anywhere lie in a given shard
    search_bytes = n * (4 * d + 4 * TOP_K + 5)
    brought = TOP_K / size * CHUNK * 2 * d * 4 + asked
    return {
        "ours": round(others * (search_bytes + n * asked * (12 * d + 16))),
        "all": others * (sizes.memory // size) * sizes.heads * 2 * d * sizes.dtype.itemsize,
        "retrieved": round(others * (search_bytes + n * brought)),
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--memory", type=int, default=65536)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3, help="reads of a turn")
    parser.add_argument("--turns", type=int, default=3, help="times that each group size is measured")
    parser.add_argument("--bf16", action="store_true", help="keys and values in bf16")
    parser.add_argument("--ours-only", action="store_true", help="leave the alternatives out")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    sizes = Sizes(arguments.tokens, arguments.heads, arguments.head_dim, arguments.memory, dtype)
    titles = f"{'ranks':>5} {'memory':>9} {'way':>10} {'forward s':>10} {'backward s':>11} {'vs G=1':>7}"
    print(f"{titles} {'MB sent':>9} {'formula':>9}")
    jobs: dict[int, list[tuple[str, Sizes]]] = {size: [("ours", sizes)] for size in arguments.ranks}
    for size in arguments.ranks if not arguments.ours_only else ():
        if size > 1:
            jobs[size] += [("all", sizes), ("retrieved", sizes)]
        jobs[size].append(("ours", replace(sizes, memory=sizes.memory // 4 * size)))  # fixed memory per rank
    # Group sizes take turns, so that a machine that drifts slows all alike.
    turns = [
        {size: run(size, jobs[size], arguments.rounds) for size in arguments.ranks} for _ in range(arguments.turns)
    ]
    alone: float | None = None
    for size in arguments.ranks:
        for number, (way, job) in enumerate(jobs[size]):
            timing = Timing(*(statistics.median(turn[size][number][part] for turn in turns) for part in range(3)))
            total = timing.forward + timing.backward
            alone = alone or total
            ratio = f"{total / alone:7.2f}" if job.memory == sizes.memory else f"{'-':>7}"
            print(
                f"{size:>5} {job.memory:>9,} {way:>10} {timing.forward:10.3f} {timing.backward:11.3f} {ratio} "
                f"{timing.sent / 1e6:9.1f} {formulas(job, size)[way] / 1e6:9.1f}",
                flush=True,
            )
    if not arguments.ours_only:
        compare(sizes, 8)


def compare(sizes: Sizes, size: int) -> None:
    """Prints the bytes that one rank sends for `tokens` queries of its own, forward and backward: counted."""
    every = replace(sizes, tokens=sizes.tokens * size)
    ways = ("ours", "all", "retrieved")
    timings = dict(zip(ways, run(size, [(way, every) for way in ways], 1), strict=True))
    print(f"\nG = {size}, {sizes.tokens} query tokens a rank, forward and backward:")
    best = min(timings["all"].sent, timings["retrieved"].sent)
    for way, timing in timings.items():
        seconds = f"{timing.forward:7.2f} s + {timing.backward:5.2f} s"
        print(f"  {way:>10} {timing.sent / 1e6:8.1f} MB, formula {formulas(every, size)[way] / 1e6:8.1f} MB, {seconds}")
    print(f"  ours sends {best / timings['ours'].sent:.2f} times fewer bytes than the better of the others")


if __name__ == "__main__":
    main()
