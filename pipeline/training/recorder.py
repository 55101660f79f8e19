"""What a step leaves behind: a line of metrics.jsonl, TensorBoard scalars and, now and then, histograms."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from tqdm import tqdm

from pipeline.config.schema import Config
from pipeline.distributed.ranks import rank
from pipeline.memory.reader import AgeObserver
from pipeline.metrics.record import MetricsWriter
from pipeline.model.longmem import LongMem
from pipeline.training.step import StepResult

logger = logging.getLogger(__name__)


class Recorder:
    """Records the steps of a run on rank 0.

    Args:
        config: The run's settings.
        model: The model.
        writer: Writes the files.
        first_step: Steps done before.
    """

    def __init__(self, config: Config, model: LongMem, writer: MetricsWriter, *, first_step: int) -> None:
        self.config, self.model, self.writer = config, model, writer
        self._ages: dict[int, list[np.ndarray]] = {}  # by index of the memory layer
        self._bar = tqdm(
            total=config.train.steps, initial=first_step, unit="step", desc="training", disable=rank() != 0
        )

    def ages_observer(self, step: int) -> AgeObserver | None:
        """What a step must collect for its histograms; None on steps that record none."""
        every = self.config.train.histogram_every_steps
        if rank() != 0 or every == 0 or step % every:
            return None
        self._ages.clear()
        return self._observe_ages

    def _observe_ages(self, index: int, ages: torch.Tensor) -> None:
        self._ages.setdefault(index, []).append(ages.cpu().numpy())

    def record(self, step: int, result: StepResult, *, memory_fill: float) -> None:
        """Records one step.

        Args:
            step: The step, counted from 1.
            result: What it said of itself.
            memory_fill: Share of the memory that is filled.
        """
        if rank() != 0:
            return
        if not math.isfinite(result.grad_norm):
            logger.warning("step %d: the gradients are not finite; DeepSpeed has left the weights as they were", step)
        shares = self._memory_shares()
        values = {
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "tokens_per_second": result.tokens / result.seconds,
            "seconds": result.seconds,
            "memory_fill": memory_fill,
            "gate_mean": float(self._gates().mean()),
            "memory_share": float(shares.mean()) if shares is not None else 0.0,
        }
        traffic = {f"traffic_{purpose}_bytes": sent for purpose, sent in result.traffic.items()}
        read = zip(self.config.data.shares, result.source_tokens, strict=False)  # of one source nothing is said
        sources = {f"source_{name}_fraction": tokens / sum(result.source_tokens) for name, tokens in read}
        self.writer.write(step, {**values, **traffic, **sources}, phases=result.phases)
        if self._ages:
            self._histograms(step, shares)
        self._bar.set_postfix(loss=f"{result.loss:.3f}", tokens_per_s=f"{values['tokens_per_second']:.0f}")
        self._bar.update()

    def close(self) -> None:
        """Closes the progress bar."""
        self._bar.close()

    def _gates(self) -> torch.Tensor:
        """Weight of the local part for fusion `gate`, bias of memory for `joint`: float32 `[memory layers, H]`."""
        gates = torch.stack([fusion.gate.detach().float().cpu() for fusion in self.model.sidenet.fusions.values()])
        return torch.sigmoid(gates) if self.config.sidenet.fusion == "gate" else gates

    def _memory_shares(self) -> torch.Tensor | None:
        """Mean weight of memory at the last read: float32 `[memory layers, H]`; None before it."""
        shares = [fusion.memory_share for fusion in self.model.sidenet.fusions.values()]
        read = [share for share in shares if share is not None]
        return torch.stack(read).float().cpu() if len(read) == len(shares) else None

    def _histograms(self, step: int, shares: torch.Tensor | None) -> None:
        gates = self._gates()
        for index, layer in enumerate(self.model.sidenet.layout.memory_layers):
            if index in self._ages:
                ages = torch.from_numpy(np.concatenate(self._ages[index]))
                self.writer.histogram(f"age/layer_{layer}_tokens", ages, step=step)
            self.writer.histogram(f"gate/layer_{layer}", gates[index], step=step)
            if shares is not None:
                self.writer.histogram(f"memory_share/layer_{layer}_fraction", shares[index], step=step)
        self._ages.clear()
