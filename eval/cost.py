"""What reading a text from beginning to end costs: the backbone with attention over all of it, or LongMem in segments.

Shapes: `L` tokens of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.memory.exchange import Exchange
from pipeline.metrics.peak import forget_peak, peak_bytes
from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED
from pipeline.model.stream import Context, Stream


@dataclass(frozen=True)
class Cost:
    """What something cost.

    Attributes:
        seconds: Time that passed.
        before_bytes: Memory in use before; None where that cannot be known.
        peak_bytes: The most in use meanwhile.
    """

    seconds: float
    before_bytes: int | None
    peak_bytes: int | None

    @property
    def grown_bytes(self) -> int | None:
        """What it took beside what was there."""
        if self.before_bytes is None or self.peak_bytes is None:
            return None
        return max(0, self.peak_bytes - self.before_bytes)


def cost_of(run: Callable[[], object], device: torch.device) -> Cost:
    """Runs something and says what it cost."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    before = forget_peak(device)
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return Cost(time.perf_counter() - begun, before, peak_bytes(device))


def read_with_full_attention(model: LongMem, tokens: Tensor, *, trains: bool = False) -> Tensor:
    """Reads a text by the backbone alone, in one pass.

    Collective: with a partitioned backbone every rank must call it together; it cannot be trained then.

    Args:
        model: The model.
        tokens: int64 `[1, L]`.
        trains: Whether gradients of all weights are worked out, too (not the LM head's); they are dropped.

    Returns:
        Losses, nats, float32 `[1, L]`; 0 at the last token.
    """
    with model.backbone.keeping_nothing():
        if not trains:
            return model.backbone_losses(model.runs_backbone(tokens, None), _targets(tokens))
        with _learning(model.backbone.model):
            hidden = model.backbone.decoder(input_ids=tokens, use_cache=False)[0]
            losses = model.losses(hidden, _targets(tokens))
            losses.mean().backward()
            return losses.detach()


def read_in_segments(model: LongMem, exchange: Exchange, tokens: Tensor, *, trains: bool = False) -> Tensor:
    """Reads a text by LongMem, segment by segment, all before a segment in memory; ranks take segments in turn.

    Collective: every rank of the memory group must call it together.

    Args:
        model: The model.
        exchange: The memory group.
        tokens: int64 `[1, L]`, whole segments.
        trains: Whether gradients of the SideNet are worked out, too, after each segment; they are dropped.

    Returns:
        Losses of this rank's segments, nats, float32 `[1, L]`; 0 elsewhere and at the last token.
    """
    settings, segment, length = model.settings, model.settings.segment_tokens, tokens.shape[1]
    stride = segment * exchange.size
    filled = torch.nn.functional.pad(tokens, (0, -length % stride))  # the group's segments end together
    targets = torch.nn.functional.pad(_targets(tokens), (0, -length % stride), value=IGNORED)
    bank = None
    if settings.memory.enabled:
        bank = model.bank(1, num_tokens=min(settings.memory.tokens, length), group_size=exchange.size)
    stream = Stream(model, bank, exchange=exchange, settings=replace(model.read_settings, scope="lane"))
    found = torch.zeros(filled.shape, device=tokens.device)
    with _learning(model.sidenet) if trains else torch.no_grad():
        for start in range(exchange.rank * segment, filled.shape[1], stride):
            here = slice(start, start + segment)
            before = filled[:, start - min(settings.context_tokens, start) : start]
            with torch.no_grad():
                seen = stream.feed(
                    filled[:, here], torch.zeros_like(filled[:, here]), Context(before, torch.zeros_like(before))
                )
            losses = stream.losses(seen, targets[:, here])
            if trains:
                losses.mean().backward()
            found[:, here] = losses.detach()
    return found[:, :length]


def exponent(lengths: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The power of the length that time grows with: least squares of logarithms; None: there are less than two."""
    return _slope(np.log(lengths), np.log(seconds))


def slope(lengths: Sequence[float], seconds: Sequence[float]) -> float | None:
    """By how many seconds a token gets dearer with each token of the text: least squares; None: less than two."""
    return _slope(np.asarray(lengths), np.asarray(seconds) / np.asarray(lengths))


def _slope(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2:
        return None
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / (centred**2).sum())


def _targets(tokens: Tensor) -> Tensor:
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """Inside, gradients of a module's weights are worked out; afterwards it is as it was, and they are gone."""
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in module.parameters():
            parameter.grad = None
