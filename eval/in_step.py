"""Ranks with different work under one partitioned backbone: every rank takes part in every forward pass.

ZeRO-3 gathers the weights of a layer on all ranks together. Before a rank runs the backbone, or makes the final norm or
the LM head whole, the ranks agree on what is next. Those that do not want it now do it with nothing, and ask again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed.ranks import world_size
from pipeline.model.longmem import LongMem

_ENCODE, _NORM, _HEAD, _NOTHING = range(4)


@contextmanager
def in_step(model: LongMem) -> Iterator[tuple[LongMem, Callable[[], None]]]:
    """Lets every rank run the backbone as often as it likes.

    Collective: every rank must enter and leave it. Any other collective of all ranks needs a call of `finish` before
    it, on every rank: until then others may need this rank for a forward pass of theirs.

    Args:
        model: A model whose backbone is partitioned if there are several ranks.

    Yields:
        The model to use meanwhile, and `finish`, which takes part in what others do until none wants the backbone any
        more; then every rank may go on.
    """
    if world_size() == 1:
        yield model, lambda: None
        return
    steps, made_whole = _Steps(model), model.backbone.made_whole
    model.backbone.made_whole = steps.made_whole
    try:
        yield model.encoding_by(steps.encode), steps.finish
        steps.finish()
    finally:
        model.backbone.made_whole = made_whole


class _Steps:
    """The forward passes of one rank, and its part in those of others."""

    def __init__(self, model: LongMem) -> None:
        backbone = model.backbone
        self._run, self._gathered, self._device = model.runs_backbone, backbone.made_whole, model.device
        self._parameters = {_NORM: list(backbone.norm.parameters()), _HEAD: list(backbone.head.parameters())}

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the backbone, as `Backbone.forward`."""
        self._wait_for(_ENCODE)
        return self._run(*args, **kwargs)

    @contextmanager
    def made_whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Makes the final norm or the LM head whole."""
        self._wait_for(next(what for what, own in self._parameters.items() if own[0] is parameters[0]))
        with self._gathered(parameters):
            yield

    def finish(self) -> None:
        """Returns, on all ranks together, when none wants the backbone any more."""
        self._wait_for(_NOTHING)

    def _wait_for(self, wanted: int) -> None:
        """Returns when it is this one's turn; until then does with nothing what others do."""
        while (turn := self._agree(wanted)) != wanted:
            if turn == _ENCODE:
                self._run(torch.zeros(1, 1, dtype=torch.int64, device=self._device), None)
            else:
                with self._gathered(self._parameters[turn]):
                    pass

    def _agree(self, wanted: int) -> int:
        first: Tensor = torch.tensor(wanted, device=self._device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return int(first)
