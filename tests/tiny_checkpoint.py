"""The checkpoints of a run without a training: a SideNet whose weights are not those of its backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.backbone.backbone import identity
from pipeline.checkpoint.folder import Checkpoints, SavedWorld
from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from tests.tiny_longmem import TinyLongMem
from tests.tiny_models import tiny_model


class Weights:
    """The owner of a SideNet's weights, without an engine."""

    name = "sidenet"

    def __init__(self, tiny: TinyLongMem) -> None:
        self.tiny = tiny

    def least_bytes(self) -> int:
        return 0

    def save(self, folder: Path) -> Callable[[], None] | None:
        weights = {name: weight.detach().clone() for name, weight in self.tiny.longmem.sidenet.named_parameters()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.yaml").write_text(dump_config(self.tiny.config))
        return None

    def check(self, folder: Path, saved: SavedWorld) -> None:
        raise NotImplementedError

    def load(self, folder: Path, saved: SavedWorld) -> None:
        raise NotImplementedError


def trained_longmem(**sections: Mapping[str, Any]) -> TinyLongMem:
    """A LongMem beside a llama, as if it were trained.

    Args:
        **sections: Of `tiny_config`.
    """
    sidenet = {"layout": "top", "memory_layers": [2], "fusion": "joint"}
    tiny = TinyLongMem(tiny_model("llama"), lanes=2, sidenet=sidenet, **sections)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in tiny.longmem.sidenet.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return tiny


def save_checkpoints(tiny: TinyLongMem, run: Path, *, steps: tuple[int, ...] = (4, 7)) -> Path:
    """Makes a run folder with checkpoints of a LongMem beside a llama, and its settings."""
    run.mkdir()
    config: Config = tiny.config
    (run / "config.yaml").write_text(dump_config(config))
    found = {"backbone": identity(tiny_model("llama")), "precision": "fp32"}
    checkpoints = Checkpoints(run / "checkpoints", keep=len(steps), group_size=1, identity=found)
    for step in steps:
        checkpoints.save(step, [Weights(tiny)])
        checkpoints.publish_if_written(wait=True)
    return run
