"""Plain training of a tiny LongMem on the ranks of memory groups, to compare with one rank: no DeepSpeed, no ZeRO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.data.lanes import Lanes
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import gather_objects, world_size
from pipeline.memory import read
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import exchange_of
from pipeline.memory.layer import LayerView, Queries
from pipeline.memory.reader import AgeObserver
from pipeline.memory.search import Retrieved, search
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Stream
from pipeline.training.step import feed_segment
from tests.tiny_longmem import TinyLongMem
from tests.tiny_models import tiny_model

SEGMENT = 16
SEGMENTS_PER_STEP = 4
# Sums in another order make queries differ by about 1e-6 of their length, on any processor, and so do weights once they
# have moved. A choice between two scores that are no further apart is a matter of luck: no case may hang on one.
CLEAR_CHOICE = 8e-6


@dataclass(frozen=True)
class Case:
    """A setting to train with.

    Attributes:
        family: Of the backbone.
        sections: Overrides of the configuration.
        lanes: Lanes of the job.
        steps: Optimizer steps; in the second one the memory of most cases is full.
        vocabulary: Different tokens in the text; few make many chunks alike, so that scores tie.
        token_seed: Of the text.
        segment: Tokens of a segment.
        learning_rate: Of plain gradient descent.
    """

    family: str = "llama"
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lanes: int = 2
    steps: int = 4
    vocabulary: int = 96
    token_seed: int = 0
    segment: int = SEGMENT
    learning_rate: float = 0.002


@dataclass(frozen=True)
class Outcome:
    """What training said.

    Attributes:
        losses: Of each step, nats a token.
        gradients: Of a step, name -> array, by step.
        ages: Ages of all retrieved chunks, by (step, memory layer), sorted.
        traffic: Bytes that this rank sent in the last step, by purpose.
        bank_tokens: Tokens of a lane that this rank has room for.
        narrowest: The smallest distance between the score of a query's last chunk and that of the best one that it does
            not read, equal ones aside, in units of |query| |key| scale; infinite if nothing was left out, or if it was
            not measured.
    """

    losses: list[float]
    gradients: list[dict[str, np.ndarray]]
    ages: dict[tuple[int, int], np.ndarray]
    traffic: dict[str, int]
    bank_tokens: int
    narrowest: float


class RandomText:
    """Documents of random tokens, of lengths that are no multiple of anything."""

    def __init__(self, case: Case) -> None:
        generator = np.random.default_rng(case.token_seed)
        self.lengths = generator.integers(21, 75, size=4 * case.lanes).astype(np.int64)
        self._documents = [generator.integers(case.vocabulary, size=length) for length in self.lengths]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a document."""
        return self._documents[document][start:stop]


@contextmanager
def measured_choices() -> Iterator[list[float]]:
    """Collects how narrowly each search decided; `Outcome.narrowest` says in which units."""
    found = [float("inf")]

    def measuring(view: LayerView, queries: Queries, *, unsure: list[torch.Tensor] | None = None) -> Retrieved:
        k, wider, segment = view.segment.settings.top_k_chunks, copy(view), copy(view.segment)
        segment.settings = replace(segment.settings, top_k_chunks=k + 1)
        wider.segment = segment
        scores = search(wider, queries).scores
        if scores.shape[-1] > k:
            lengths = queries.far.norm(dim=-1).amax(dim=-1)
            unit = lengths * view.largest_key[..., None] * view.geometry.scale
            gaps = (scores[..., k - 1] - scores[..., k]) / unit
            found.extend(gaps[gaps > 0].tolist())
        return search(view, queries, unsure=unsure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "search", measuring)
        yield found


def bank_bytes(bank: MemoryBank) -> int:
    """Bytes of its keys, values and chunk keys."""
    return sum(t.nbytes for store in bank.layers for t in (store.keys, store.values, store.chunk_keys))


@contextmanager
def banks_made() -> Iterator[list[int]]:
    """Collects the bytes of the banks that are made, after a 0."""
    sizes, original = [0], LongMem.bank

    def making(self: LongMem, *args: Any, **kwargs: Any) -> MemoryBank:
        bank = original(self, *args, **kwargs)
        sizes.append(bank_bytes(bank))
        return bank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongMem, "bank", making)
        yield sizes


def train_and_measure(case: Case) -> Outcome:
    """Trains on one rank and finds out how narrow its choices were, which takes a second search for every read."""
    with measured_choices() as gaps:
        outcome = train(case, 1)
    return replace(outcome, narrowest=min(gaps))


def train(case: Case, group_size: int) -> Outcome:
    """Trains on every rank of the world, `group_size` ranks to a memory group."""
    group = MemoryGroup.build(group_size, timeout_s=60)
    exchange = exchange_of(group.process_group)
    num_lanes = case.lanes * group_size // world_size()
    torch.manual_seed(0)
    sections = {"train": {"segment_tokens": case.segment}, **case.sections}
    tiny = TinyLongMem(tiny_model(case.family), lanes=num_lanes, **sections)
    model, tokens = tiny.longmem, case.segment * SEGMENTS_PER_STEP * case.lanes
    bank = model.bank(num_lanes, group_size=group_size)
    stream = Stream(model, bank, exchange=exchange)
    lanes = Lanes(
        [RandomText(case)],
        num_lanes=case.lanes,
        lanes=range(group.number * num_lanes, (group.number + 1) * num_lanes),
        segment_tokens=case.segment,
        seed=1,
        context_tokens=model.settings.context_tokens,
    )
    parameters = dict(model.sidenet.named_parameters())
    losses, gradients, ages = [], [], {}
    for step in range(case.steps):
        total = torch.zeros(1)
        ages_seen: dict[int, list[np.ndarray]] = {}
        for _ in range(SEGMENTS_PER_STEP // group_size):
            lanes.skip(group.rank)
            segment = lanes.next_segment()
            lanes.skip(group_size - 1 - group.rank)
            seen, targets = feed_segment(stream, segment), torch.from_numpy(segment.targets)
            loss = stream.losses(seen, targets, observe_ages=_recorder(ages_seen)).sum() / tokens
            loss.backward()
            total += loss.detach()
        for parameter in parameters.values():
            _sum(_gradient(parameter))
        _sum(total)
        losses.append(float(total))
        for layer in range(len(model.geometries)):
            found = gather_objects(np.concatenate(ages_seen.get(layer, [np.zeros(0, dtype=np.int64)])))
            ages[step, layer] = np.sort(np.concatenate(found))
        gradients.append({name: _gradient(parameter).numpy().copy() for name, parameter in parameters.items()})
        traffic = dict(exchange.traffic)
        exchange.traffic.clear()
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(_gradient(parameter), alpha=-case.learning_rate)
                parameter.grad = None
    return Outcome(losses, gradients, ages, traffic, bank.shape.num_chunks * bank.shape.chunk_size, float("inf"))


def train_all(cases: list[Case], group_size: int) -> list[Outcome]:
    """Trains with one case after another, on ranks that are started once."""
    return [train(case, group_size) for case in cases]


def _recorder(seen: dict[int, list[np.ndarray]]) -> AgeObserver:
    return lambda layer, ages: seen.setdefault(layer, []).append(ages.numpy())


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sum(tensor: torch.Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(tensor)
