"""One optimizer step: every segment of it through backbone, memory, SideNet and back.

Shapes: `B` lanes of this rank, `T` segment tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import TrainConfig
from pipeline.data.lanes import Lanes, Segment
from pipeline.distributed.ranks import gather_objects, world_size
from pipeline.distributed.signals import ASKS
from pipeline.errors import TrainingError
from pipeline.memory.reader import AgeObserver
from pipeline.metrics.phases import PhaseTimer
from pipeline.model.stream import Context, Seen, Stream
from pipeline.training.optimizer import learning_rate_at, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says of itself, over all ranks.

    Attributes:
        loss: Mean over predicted tokens, nats.
        grad_norm: Of all gradients, before clipping.
        learning_rate: Of weights.
        tokens: Tokens read by the job.
        seconds: Of the step.
        phases: Seconds of each phase on this rank.
        traffic: Bytes that this rank sent for its memory group, by purpose.
        asked: What asks the run to stop or to save, on any rank: one of `ASKS`, or None.
        source_tokens: Tokens of each source that all lanes have read since the first step; empty where there is one.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    phases: dict[str, float]
    traffic: dict[str, int]
    asked: str | None
    source_tokens: tuple[int, ...]


class Trainer:
    """Does optimizer steps. Owns no state: lanes, memory and engines do.

    Args:
        stream: Backbone, SideNet, and this rank's part of the memory; without a bank memory is off.
        engine: The SideNet's engine.
        lanes: The lanes of this rank's memory group; they keep the place.
        settings: Of the optimization.
        timer: Takes the seconds of phases.
        num_segments: Segments of each lane that this rank reads in a step.
    """

    def __init__(
        self,
        stream: Stream,
        engine: Any,
        lanes: Lanes,
        settings: TrainConfig,
        *,
        timer: PhaseTimer,
        num_segments: int,
    ) -> None:
        self.stream, self.engine, self.lanes, self.settings = stream, engine, lanes, settings
        self.timer, self.num_segments = timer, num_segments

    def step(
        self, number: int, *, observe_ages: AgeObserver | None = None, asked: Callable[[], str | None] = lambda: None
    ) -> StepResult:
        """Does one optimizer step.

        Collective: every rank must call it together.

        Args:
            number: The step, counted from 1.
            observe_ages: As in `BankReader`.
            asked: Says, near the end of the step, what asks this rank to stop or to save.

        Returns:
            The step's record.

        Raises:
            TrainingError: A loss is not finite; the optimizer has not stepped.
        """
        begun = time.perf_counter()
        # Sum of losses, predicted tokens, who asks for what, tokens of sources: all of them travel in one all-reduce.
        group, first_source = self.stream.exchange, 2 + len(ASKS)
        num_sources = self.lanes.num_sources if self.lanes.num_sources > 1 else 0
        totals = torch.zeros(first_source + num_sources, dtype=torch.float64, device=self.stream.model.device)
        for micro in range(self.num_segments):
            with self.timer.phase("data"):
                segment = self.lanes.next_of_group(group.rank, group.size)
            losses, counted = self._forward(segment, observe_ages)
            totals[:2] += torch.stack([losses.detach().sum().double(), counted.double()])
            with self.timer.phase("backward"):
                # Every token weighs the same on every rank: divide by all tokens, not by those with a target.
                self.engine.backward(losses.sum() / losses.numel())
            if micro + 1 == self.num_segments:
                if (ask := asked()) is not None:
                    totals[2 + ASKS.index(ask)] = 1
                if num_sources:
                    totals[first_source:] = torch.tensor(self.lanes.tokens_of_sources())
                self._check_finite(number, totals)
            with self.timer.phase("optimizer"):
                learning_rate = learning_rate_at(number, self.settings)
                set_learning_rate(self.engine.optimizer, learning_rate)
                self.engine.step()
        loss_sum, count, *counts = totals.tolist()
        asks, of_sources = counts[: len(ASKS)], counts[len(ASKS) :]
        tokens = self.num_segments * losses.numel() * world_size()
        return StepResult(
            loss=loss_sum / max(count, 1.0),
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0),
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=time.perf_counter() - begun,
            phases=self.timer.collect(),
            traffic=self._collect_traffic(),
            asked=next((ask for ask, ranks in zip(ASKS, asks, strict=True) if ranks), None),
            source_tokens=tuple(
                int(total) // group.size for total in of_sources
            ),  # all ranks of a group have its lanes
        )

    def _forward(self, segment: Segment, observe_ages: AgeObserver | None) -> tuple[Tensor, Tensor]:
        """Losses `[B, T]` of one segment of every lane, and how many of its tokens predict."""
        seen = feed_segment(self.stream, segment)
        targets = torch.from_numpy(segment.targets).to(self.stream.model.device, non_blocking=True)
        losses = self.stream.losses(seen, targets, observe_ages=observe_ages)
        return losses, (targets >= 0).sum()

    def _collect_traffic(self) -> dict[str, int]:
        traffic = dict(self.stream.exchange.traffic)
        self.stream.exchange.traffic.clear()
        return traffic

    def _check_finite(self, number: int, totals: Tensor) -> None:
        """Adds the totals of all ranks up, and stops before the optimizer if some loss is not finite."""
        mine = float(totals[0])
        if world_size() > 1:
            dist.all_reduce(totals)
        if math.isfinite(float(totals[0])):
            return
        lane_tokens = self.lanes.index * self.settings.segment_tokens
        ill = [rank for rank, value in enumerate(gather_objects(mine)) if not math.isfinite(value)]
        error = TrainingError(
            f"the loss of step {number} is not finite; the optimizer has not stepped",
            got=f"{mine} on this rank; not finite on rank(s) {ill}; lanes read up to token {lane_tokens}",
            do="nothing was trained yet: see whether the backbone in backbone.path works in train.precision"
            if number == 1
            else "resume from the last checkpoint with a lower train.learning_rate, or in bf16 or fp32 instead of fp16",
        )
        error.on_all_ranks = True
        raise error

    @property
    def memory_fill(self) -> float:
        """Share of the memory that is filled, of the last `memory.tokens` tokens of each lane."""
        bank = self.stream.bank
        if bank is None:
            return 0.0
        remembered = bank.num_filled * bank.shape.chunk_size * self.stream.exchange.size
        return min(1.0, remembered / self.stream.model.settings.memory.tokens)


def feed_segment(stream: Stream, segment: Segment) -> Seen:
    """Encodes and remembers a segment of every lane, with the context that came with it. Collective: `Stream.feed`."""
    tokens, documents, *context = (
        torch.from_numpy(array).to(stream.model.device, non_blocking=True)
        for array in (segment.tokens, segment.documents, segment.context_tokens, segment.context_documents)
    )
    return stream.feed(tokens, documents, Context(*context), start=segment.start)
