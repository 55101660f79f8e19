"""A trained model whose backbone is split over the ranks, for an evaluation: nothing of it is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.config.schema import Config, RunConfig
from pipeline.distributed.ranks import barrier, rank, together, world_size
from pipeline.distributed.watch import Watch
from pipeline.model.load import Trained, join, load_for
from pipeline.model.longmem import LongMem
from pipeline.training.engines import Engines, end_distributed, made_whole, start_distributed


def load_partitioned(trained: Trained, backbone: str | None, device: torch.device) -> LongMem:
    """Loads the backbone in ZeRO-3 partitions, and the SideNet whole on every rank.

    Collective: every rank must call it together, after `start_distributed`.

    Args:
        trained: The SideNet.
        backbone: As in `load_longmem`.
        device: This rank's device.

    Returns:
        The model.

    Raises:
        LongMemError: As `load_longmem`.
    """
    engines = together(lambda: Engines(_split_anyhow(trained.config)))
    with engines.partitioning():
        model = load_for(trained, backbone, who=f" on rank {rank()}")
    whole, sidenet = join(trained, model, device, made_whole=made_whole)
    return LongMem(trained.config.model, whole, sidenet, encode=engines.start_backbone(whole))


def _split_anyhow(config: Config) -> Config:
    """The settings, but for what of a training must fit the number of ranks: lanes, and segments of a step."""
    data = config.data.model_copy(update={"lanes": world_size()})
    train = config.train.model_copy(update={"segments_per_step": config.memory.group_size})
    return config.model_copy(update={"data": data, "train": train})


def under_deepspeed(work: Callable[[Callable[[Trained, str | None], LongMem]], object]) -> None:
    """Does something with a partitioned model in the job that a launcher started; if a rank fails, all end.

    Collective: every rank must call it.

    Args:
        work: Is given what loads the model.

    Raises:
        LongMemError: This rank's own error, or one that names the rank whose failure stopped it.
    """
    device = start_distributed(timeout_s=RunConfig.model_fields["collective_timeout_s"].default)
    watch = Watch(RunConfig.model_fields["collective_timeout_s"].default)
    try:
        work(lambda trained, backbone: load_partitioned(trained, backbone, device))
        barrier()
    except Exception as error:
        explained = watch.explained(error)
        if explained is error:
            raise
        raise explained from error
    watch.close()
    end_distributed()
