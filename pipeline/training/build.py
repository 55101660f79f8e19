"""Building a run: every check first, then data, engines, memory, and who owns which state."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from pipeline.backbone.backbone import identity
from pipeline.backbone.families import family_of
from pipeline.backbone.load import check_weights, load_backbone, read_backbone_config
from pipeline.checkpoint.background import Background, wait_for_all
from pipeline.checkpoint.folder import CONTEXT_TOKENS, MEMORY_TOKENS, Checkpoints, StateOwner
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.memory import MemoryOwner
from pipeline.checkpoint.owners import LanesOwner, RandomOwner
from pipeline.config.schema import Config
from pipeline.config.world import WorldSplit, check_world
from pipeline.data.lanes import Lanes
from pipeline.data.store import check_tokenizer
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.launchers import local_rank
from pipeline.distributed.ranks import check_agreement, on_rank_zero, rank, together, world_size
from pipeline.distributed.signals import Signals
from pipeline.distributed.watch import TimeLimits
from pipeline.errors import ConfigError
from pipeline.memory.bank import MemoryBank
from pipeline.memory.exchange import exchange_of
from pipeline.memory.place import ShardPlace
from pipeline.metrics.phases import PhaseTimer, events_of
from pipeline.model.longmem import DTYPES, LongMem, build, layout_of
from pipeline.model.stream import Stream
from pipeline.training.engine_owner import EngineOwner
from pipeline.training.engines import (
    Engines,
    check_precision,
    made_whole,
    start_distributed,
)
from pipeline.training.job.job import Job
from pipeline.training.job.run_folder import SCRATCH, check_folder
from pipeline.training.replay import replay
from pipeline.training.step import Trainer
from pipeline.training.stores import Stores, open_stores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run, ready to go.

    Attributes:
        config: Its settings.
        folder: The run folder.
        group: This rank's memory group.
        model: Backbone and SideNet in their engines.
        trainer: Does the steps.
        stores: The data.
        bank: This rank's memory, or None.
        checkpoints: The run's checkpoints.
        owners: Everything that must survive a restart (docs/architecture.md lists it).
        resume_from: The checkpoint to go on from, or None.
        job: How it fares, and how it ends.
    """

    config: Config
    folder: Path
    group: MemoryGroup
    model: LongMem
    trainer: Trainer
    stores: Stores
    bank: MemoryBank | None
    checkpoints: Checkpoints
    owners: Sequence[StateOwner]
    resume_from: Path | None
    job: Job


def build_run(config: Config, *, signals: Signals | None = None) -> Run:
    """Builds a run.

    Collective: every rank must call it together.

    Args:
        config: The settings.
        signals: What may ask the job to stop, or None.

    Returns:
        The run; nothing has been trained yet.

    Raises:
        LongMemError: Something is wrong with settings, data, backbone, run folder or checkpoint; on every rank.
    """
    limits = TimeLimits.of(config.run.collective_timeout_s)
    device = start_distributed(timeout_s=limits.collective_s)
    job = Job(config, signals)
    with job.ending_together():
        return _build(config, device, job, limits)


def _build(config: Config, device: torch.device, job: Job, limits: TimeLimits) -> Run:
    job.watch.at("checking")
    check_agreement("the configuration", config.model_dump(mode="json"))
    split = together(lambda: check_world(config, world_size()))
    together(lambda: check_precision(config))
    stores = together(lambda: check_inputs(config))
    reads_all = config.data.verify == "full" and local_rank(os.environ) == 0  # one rank of each machine
    verification = Background(stores.verify) if reads_all else None
    folder = job.folder
    on_rank_zero(lambda: check_folder(folder, config))
    resume_from = together(lambda: find_checkpoint(config, folder, data=stores.identity))
    check_agreement("the checkpoint to go on from", str(resume_from))  # a file system may show others to some
    job.begin(0 if resume_from is None else read_manifest(resume_from).step)
    group = MemoryGroup.build(
        config.memory.group_size,
        timeout_s=limits.collective_s,
        on_host=config.memory.device == "host",
    )
    _seed(config.run.seed)
    job.watch.at("loading the backbone")
    model, engine, backbone_identity = build_model(config, device)
    job.watch.at("checking the token store")
    wait_for_all(verification)
    together(lambda: _raise(None if verification is None else verification.error))
    lanes = _lanes(config, stores, split, group.number)
    bank = _bank(model, split, group) if config.memory.enabled else None
    timer = PhaseTimer() if device.type == "cpu" else PhaseTimer(**events_of(get_accelerator().Event))
    stream = Stream(model, bank, exchange=exchange_of(group.process_group), phase=timer.phase)
    trainer = Trainer(stream, engine, lanes, config.train, timer=timer, num_segments=split.accumulation_steps)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.checkpoint.keep,
        group_size=config.memory.group_size,
        identity=_identity(config, model, backbone_identity, stores.identity),
        timeout_s=config.run.collective_timeout_s,
    )
    owners: list[StateOwner] = [
        EngineOwner(engine, config, scratch=folder / SCRATCH),
        LanesOwner(lanes),
        RandomOwner(),
    ]
    if bank is not None:
        owners.append(_memory_owner(config, stream, lanes, bank))
    return Run(config, folder, group, model, trainer, stores, bank, checkpoints, owners, resume_from, job)


def _bank(model: LongMem, split: WorldSplit, group: MemoryGroup) -> MemoryBank:
    return together(lambda: model.bank(split.lanes_per_group, group_size=group.size))


def _memory_owner(config: Config, stream: Stream, lanes: Lanes, bank: MemoryBank) -> MemoryOwner:
    place = ShardPlace(
        lanes=lanes.lanes,
        num_lanes=config.data.lanes,
        turn=stream.turn,
        num_tokens=config.memory.tokens,
    )
    store = config.checkpoint.memory == "save"
    return MemoryOwner(bank, place, store=store, replay=lambda: replay(stream, lanes))


def build_model(config: Config, device: torch.device) -> tuple[LongMem, Any, str]:
    """Loads the backbone into partitions, copies the SideNet from it, and starts both engines.

    Collective: every rank must call it together.

    Args:
        config: The settings.
        device: This rank's device.

    Returns:
        The model, the SideNet's engine, and the backbone's identity.

    Raises:
        BackboneError: The backbone's files are missing or damaged, or hold other weights than they should.
    """
    engines = Engines(config)
    with engines.partitioning():
        causal_lm = load_backbone(
            config.backbone.path,
            dtype=DTYPES[config.train.precision],
            attention=config.backbone.attention,
            who=f" on rank {rank()}",
        )
    backbone, sidenet = build(config.model, causal_lm, made_whole=made_whole)
    backbone_identity = identity(causal_lm, made_whole=made_whole)
    backbone_engine, engine = engines.start(backbone, sidenet.to(device))
    model = LongMem(config.model, backbone, sidenet, encode=backbone_engine, run_sidenet=engine)
    return model, engine, backbone_identity


def check_inputs(config: Config) -> Stores:
    """Checks data, tokenizer and the backbone's configuration against the settings, before any weight is loaded.

    Args:
        config: The settings.

    Returns:
        The open stores.

    Raises:
        LongMemError: Something does not fit.
    """
    check_stored(config)
    stores = open_stores(config)
    whole_config = read_backbone_config(config.backbone.path)
    backbone_config = whole_config.get_text_config()
    check_positions(config, backbone_config)
    for store in stores.opened:
        store.limit_vocabulary(int(backbone_config.vocab_size))
    layout_of(config.sidenet, backbone_config.num_hidden_layers)
    check_weights(config.backbone.path, whole_config)
    tokenizer = load_tokenizer(config.backbone.path)
    for store in stores.train:
        check_tokenizer(store, tokenizer)
    return stores


def check_stored(config: Config) -> None:
    """Checks that a checkpoint can hold what memory is found by. Raises ConfigError: it cannot."""
    if config.memory.enabled and config.memory.chunk_keys == "unrounded" and config.checkpoint.memory == "save":
        raise ConfigError(
            [
                "a checkpoint stores rounded keys, by which a restarted run would find other chunks; got: "
                "memory.chunk_keys unrounded and checkpoint.memory save; do: set checkpoint.memory to replay"
            ]
        )


def check_positions(config: Config, backbone_config: Any) -> None:
    """Checks that a segment and its left context fit a backbone of learned positions; others have no end.

    Raises ConfigError: They do not; BackboneError: the family is unknown.
    """
    most = getattr(backbone_config, "max_position_embeddings", None)
    wanted = config.backbone.context_tokens + config.train.segment_tokens
    if family_of(backbone_config).positions == "learned" and most is not None and wanted > most:
        raise ConfigError(
            [
                f"backbone.context_tokens {config.backbone.context_tokens} and train.segment_tokens "
                f"{config.train.segment_tokens} are more than the backbone has positions; got: {wanted}; "
                f"expected: at most {most} together; do: lower one of them"
            ]
        )


def find_checkpoint(config: Config, folder: Path, *, data: Mapping[str, Any] | None = None) -> Path | None:
    """Finds the checkpoint that `run.resume` asks for.

    Args:
        config: The settings.
        folder: The run folder.
        data: Identity of what is trained on; None: not compared.

    Returns:
        Its folder, or None: start anew.

    Raises:
        CheckpointError: The named folder is no whole checkpoint, or there are checkpoints and none is whole.
    """
    if config.run.resume == "none":
        return None
    # What follows from the backbone's weights is compared when they are loaded, the rest now.
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.checkpoint.keep,
        group_size=config.memory.group_size,
        identity=_identity_of_settings(config, data or {}),
    )
    if config.run.resume == "auto":
        return checkpoints.newest()
    checkpoints.check(Path(config.run.resume))
    return Path(config.run.resume)


def _identity(config: Config, model: LongMem, backbone: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it."""
    layout, side = model.sidenet.layout, config.sidenet
    sidenet: list[Any] = [list(layout.boundaries), list(layout.memory_layers), layout.residual, side.fusion]
    otherwise = {name: getattr(side, name) for name in ("norm_epsilon", "activation")}
    if any(value is not None for value in otherwise.values()):  # as it was before there were such settings
        sidenet.append(otherwise)
    return {**_identity_of_settings(config, data), "backbone": backbone, "sidenet": sidenet}


def _identity_of_settings(config: Config, data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `_identity` that is known before the backbone is loaded."""
    known: dict[str, Any] = {
        "precision": config.train.precision,
        "memory": config.memory.enabled,
        "segments_per_step": config.train.segments_per_step,  # a step must end with the last rank of every group
        **data,
    }
    if config.memory.enabled and config.checkpoint.memory == "save":
        # What is stored was encoded with it; what is read again is encoded anew.
        known[CONTEXT_TOKENS] = config.backbone.context_tokens
        known[MEMORY_TOKENS] = config.memory.tokens  # a stored memory fits banks that remember less
    if config.memory.enabled and config.memory.scope == "group":
        # More groups or fewer: other lanes share a bank, and the run would not go on but begin another experiment.
        groups = world_size() // config.memory.group_size
        known["memory groups (the lanes of one share a bank, as memory.scope is 'group')"] = groups
    return known


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _lanes(config: Config, stores: Stores, split: WorldSplit, group: int) -> Lanes:
    first = group * split.lanes_per_group
    return Lanes(
        stores.train,
        weights=stores.shares,
        num_lanes=config.data.lanes,
        lanes=range(first, first + split.lanes_per_group),
        segment_tokens=config.train.segment_tokens,
        seed=config.run.seed,
        context_tokens=config.backbone.context_tokens,
    )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
