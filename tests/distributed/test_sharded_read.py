"""One read of a large sharded bank: 4 ranks x 16,384 tokens equal one rank with 65,536; traffic equals its formula."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from pipeline.memory.bank import BankShape, MemoryBank
from pipeline.memory.exchange import Alone, Exchange, RankGroup
from pipeline.memory.layer import Geometry
from pipeline.memory.reader import BankReader
from pipeline.memory.segment import Reading, ReadSettings
from pipeline.positions import PositionEncoding, PositionRule
from tests.ranks import run_ranks

HEADS, KV_HEADS, DIM, SEGMENT, CHUNK, TOP_K, BLOCK = 2, 1, 8, 256, 4, 16, 100
RULE = PositionRule("clamp", 300)
TOLERANCE = 1e-5  # float32; partial results are added in another order


@dataclass(frozen=True)
class Sharded:
    """What one rank saw of a read of the whole group's `ranks` segments.

    Attributes:
        values: Read by this rank's own queries, `[B, H, T, D]`.
        gradient: Of those queries, same shape.
        traffic: Bytes sent, by purpose.
        held: Tokens of keys in this rank's shard.
    """

    values: torch.Tensor
    gradient: torch.Tensor
    traffic: dict[str, int]
    held: int


def random(seed: int, heads: int) -> torch.Tensor:
    """Random `[1, heads, SEGMENT, DIM]`, the same on every rank."""
    return torch.randn(1, heads, SEGMENT, DIM, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int) -> torch.Tensor:
    """Values of a segment that this rank holds, 1 in the dimension of the rank: what is read tells whose it was."""
    return torch.zeros(1, KV_HEADS, SEGMENT, DIM).index_fill_(-1, torch.tensor(rank), 1.0)


def read(
    num_tokens: int,
    segments: int,
    dtype: torch.dtype = torch.float32,
    marked: bool = False,
    alike: bool = False,
    spoiled: bool = False,
) -> list[Sharded]:
    """Fills a bank and reads it for the next `segments` segments, with all ranks of the world.

    Args:
        num_tokens: Remembered by the group.
        segments: Read by the group.
        dtype: Of the bank.
        marked: Whether values tell which rank holds them.
        alike: Whether all segments have the same keys.
        spoiled: Whether the first segment's token 3 asks with what is not a number.
    """
    exchange: Exchange = Alone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        assert dist.group.WORLD is not None
        exchange = RankGroup(dist.group.WORLD)
    own = -(-num_tokens // (SEGMENT * exchange.size)) * SEGMENT + SEGMENT
    bank = MemoryBank(BankShape(1, 1, KV_HEADS, DIM, own // CHUNK, CHUNK), dtype=dtype, device=torch.device("cpu"))
    documents = torch.zeros(1, SEGMENT, dtype=torch.int64)

    def append(index: int) -> None:
        key = random(0 if alike else 2 * index, KV_HEADS)
        value = of_rank(index % exchange.size) if marked else random(2 * index + 1, KV_HEADS)
        bank.append([(key, value)], start=index * SEGMENT, documents=documents)

    first = num_tokens // SEGMENT
    for index in range(exchange.rank, first, exchange.size):
        append(index)
    encoding = PositionEncoding(inv_freq=100.0 ** -(torch.arange(0, DIM, 2) / DIM))
    settings = ReadSettings(num_tokens, TOP_K, rule=RULE, query_block_tokens=BLOCK)
    results = []
    for index in range(first + exchange.rank, first + segments, exchange.size):
        append(index)
        query = random(-index - 1, HEADS)
        if spoiled and index == first:
            query[:, :, 3] = torch.nan
        query.requires_grad_()
        reading = Reading(index * SEGMENT, documents)
        reader = BankReader(bank, settings, [Geometry(encoding, DIM**-0.5)], reading, exchange=exchange)
        exchange.traffic.clear()
        found = reader.read(0, query)
        (found.values.square().sum() + found.log_sum_exp.sum()).backward()
        assert query.grad is not None
        traffic = dict(exchange.traffic)
        results.append(Sharded(found.values.detach(), query.grad, traffic, own))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_shards_of_16384_equal_one_bank_of_65536(dtype: torch.dtype) -> None:
    alone = read(65536, 4, dtype)
    for rank, found in enumerate(run_ranks(read, 4, 65536, 4, dtype)):
        (sharded,) = found
        assert sharded.held == 16384 + SEGMENT
        torch.testing.assert_close(sharded.values, alone[rank].values, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(sharded.gradient, alone[rank].gradient, atol=TOLERANCE, rtol=0)
    assert float(alone[0].values.abs().max()) > 0.1


def formula(found: list[Sharded], rank: int) -> dict[str, int]:
    """Bytes that a rank sends for one read of marked values, forward and backward, by docs/memory.md."""
    others = [other for other in range(len(found)) if other != rank]
    everyone = len(others) * HEADS * SEGMENT
    is_held = [read.values > 0 for read in found]  # by queries of a rank, in the dimension of the rank that holds some
    asked = sum(int(is_held[rank][..., other].sum()) for other in others)
    answered = sum(int(is_held[other][..., rank].sum()) for other in others)
    return {
        "queries": everyone * 4 * DIM,
        "scores": everyone * 4 * TOP_K,
        "thresholds": everyone * 5,
        "partials": answered * 4 * (DIM + 2),
        "gradients": asked * 4 * (DIM + 2),
        "query_gradients": answered * 4 * DIM,
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_traffic_is_the_formula_whatever_is_remembered(ranks: int) -> None:
    for num_tokens in (1024, 4096):
        found = [own for (own,) in run_ranks(read, ranks, num_tokens, ranks, torch.float32, True)]
        for rank, own in enumerate(found):
            assert own.traffic == formula(found, rank)
        # Four ranks: some queries read nothing from some rank, and nothing goes there.
        bound = (ranks - 1) * HEADS * SEGMENT * 4 * (DIM + 2)
        assert (ranks == 4) == any(own.traffic["gradients"] < bound for own in found)


def test_many_equal_chunks_are_decided_alike_by_two_shards_and_one() -> None:
    # Every chunk is there 64 times, with other values: more than the candidates of a search have room for.
    alone = read(16384, 2, torch.float32, alike=True)
    for rank, (sharded,) in enumerate(run_ranks(read, 2, 16384, 2, torch.float32, False, True)):
        torch.testing.assert_close(sharded.values, alone[rank].values, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(sharded.gradient, alone[rank].gradient, atol=TOLERANCE, rtol=0)


def test_equal_scores_cost_one_more_exchange() -> None:
    # Every chunk is there 16 times: equal scores straddle the 16th place of many queries, not of all, as the nearest
    # are read at their real distance. A rank sends 4 k bytes for a tied query of the other and 4 for its own.
    sent = [found.traffic["ties"] for (found,) in run_ranks(read, 2, 4096, 2, torch.float32, False, True)]
    tied, rest = divmod(sum(sent), 4 * TOP_K + 4)
    assert rest == 0 and 0 < tied < 2 * HEADS * SEGMENT


def test_a_query_that_is_not_a_number_finds_nothing_and_stops_nobody() -> None:
    whole = [own for (own,) in run_ranks(read, 2, 1024, 2)]
    spoiled = [own for (own,) in run_ranks(read, 2, 1024, 2, torch.float32, False, False, True)]
    assert not spoiled[0].values[:, :, 3].any()
    whole[0].values[:, :, 3] = 0.0
    for expected, found in zip(whole, spoiled, strict=True):
        torch.testing.assert_close(found.values, expected.values, atol=TOLERANCE, rtol=0)


def test_a_group_of_one_sends_nothing() -> None:
    assert read(1024, 1)[0].traffic == {}
