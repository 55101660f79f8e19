"""What the ranks of `test_elastic.py` do: train, say what the model has become, or die while they load."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.errors import LongMemError
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Stream
from tests.tiny_run import VOCABULARY

SEGMENT = 16


@dataclass(frozen=True)
class Trained:
    """What a run says when it ends.

    Attributes:
        weights: The SideNet's, as it computes with them.
        logits: Of a segment that remembers the one before it.
        refusal: The error that ended it before it began, or None.
    """

    weights: dict[str, Tensor]
    logits: Tensor
    refusal: str | None = None


def train_all(configs: list[Config]) -> list[Trained]:
    """Trains with one configuration after another."""
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    found = []
    for config in configs:
        try:
            run = build_run(config)
        except LongMemError as error:
            found.append(Trained({}, torch.zeros(0), str(error)))
            continue
        train(run)
        weights = {name: weight.detach().clone() for name, weight in run.model.sidenet.named_parameters()}
        found.append(Trained(weights, logits_of(run.model)))
    return found


def tokens_of_two() -> Tensor:
    """Two segments of random tokens, `[1, 2 T]`."""
    return torch.randint(VOCABULARY, (1, 2 * SEGMENT), generator=torch.Generator().manual_seed(1))


def logits_of(model: LongMem, tokens: Tensor | None = None) -> Tensor:
    """Logits of a segment that remembers the one before it, `[1, T, V]`; the same on every rank."""
    tokens = tokens_of_two() if tokens is None else tokens
    documents, stream = torch.zeros(1, SEGMENT, dtype=torch.int64), Stream(model, model.bank(1))
    with torch.no_grad():
        _, second = (stream.feed(part, documents) for part in tokens.split(SEGMENT, dim=1))
        return model.logits(stream.hidden(second))


def die_while_converting(config: Config) -> None:
    """Rank 0 is killed when the checkpoint of other ranks is converted and nobody has loaded it."""
    from pipeline.training import universal
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    convert = universal._convert

    def convert_and_die(source: Path, target: Path) -> Any:
        convert(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    universal._convert = convert_and_die
    train(build_run(config))
