"""The two engines of a process: the backbone in ZeRO-3 partitions without optimizer, the SideNet in ZeRO-2."""

from __future__ import annotations

import ctypes
import datetime
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from pipeline.backbone.backbone import Backbone
from pipeline.config.deepspeed import backbone_deepspeed, sidenet_deepspeed
from pipeline.config.schema import Config
from pipeline.distributed.launchers import is_started_by_mpi, slurm_ranks
from pipeline.distributed.ranks import world_size
from pipeline.errors import ConfigError, in_a_line
from pipeline.sidenet.sidenet import SideNet
from pipeline.training.job.leftovers import lock_extensions_for_life, unlink_shared_buffers
from pipeline.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)
_JOINING = datetime.timedelta(minutes=5)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def start_distributed(*, timeout_s: float) -> torch.device:
    """Joins the job that a launcher started (deepspeed, torchrun, srun, mpirun), or starts one of one rank.

    Args:
        timeout_s: Seconds after which a collective that does not end fails, once all ranks have joined; for joining
            they have at least five minutes.

    Returns:
        This rank's device.
    """
    os.environ.update(slurm_ranks(os.environ))
    if "RANK" not in os.environ and not is_started_by_mpi(os.environ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    # DeepSpeed compiles an extension here with the ninja that pip put beside this interpreter. Another version of it,
    # or none, is what an environment that is not activated would find: it compiles everything again, or fails.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Two environments that share torch's default folder would each compile again what the other compiled.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # Products of float32 tensors as float32: TF32, which containers may switch on, keeps three digits, and which chunks
    # are retrieved would depend on how the memory is split.
    torch.set_float32_matmul_precision("highest")
    limit = datetime.timedelta(seconds=timeout_s)
    # DeepSpeed 0.19 makes groups of its own without a time-out. Theirs would be torch's default of 30 minutes, whatever
    # the job's is; torch 2.13 has no public way to change it.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    lock_extensions_for_life()
    # Ranks may start minutes apart: imports from a busy file system, nodes that come one after the other.
    deepspeed.init_distributed(timeout=max(limit, _JOINING), verbose=False)
    distributed_c10d._set_pg_timeout(limit)
    distributed_c10d._get_default_store().set_timeout(limit)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        unlink_shared_buffers()
        _keep_freed_memory()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(accelerator.current_device_name())


def _keep_freed_memory() -> None:
    """Lets the C library keep what is freed for the next step, which the kernel would otherwise clear page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def end_distributed() -> None:
    """Leaves the job in order: threads of a group that outlives the interpreter may crash it. Collective."""
    torch.distributed.destroy_process_group()


def check_precision(config: Config) -> None:
    """Checks that the accelerator can compute in the precision asked for.

    Args:
        config: The run's settings.

    Raises:
        ConfigError: It cannot.
    """
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[config.train.precision]:
        usable = [name for name, works in supported.items() if works]
        raise ConfigError(
            [
                f"train.precision is {config.train.precision}, which this accelerator ({accelerator.device_name()}) "
                f"does not support; expected: one of {', '.join(usable)}; do: set train.precision to one of them"
            ]
        )


def made_whole(parameters: Any) -> AbstractContextManager[Any]:
    """Makes parameters whole inside, partitioned or not; what is written to them is lost. Collective."""
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)
    return context


class Engines:
    """Backbone and SideNet under DeepSpeed.

    Collective: every rank must build it together.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._backbone_json = _accepted(backbone_deepspeed(config, world_size()), "backbone.deepspeed")
        self._sidenet_json = _accepted(sidenet_deepspeed(config, world_size()), "train.deepspeed")

    @contextmanager
    def partitioning(self) -> Iterator[None]:
        """Splits what transformers loads while it is open over the ranks: no rank ever holds it whole."""
        lives = HfDeepSpeedConfig(self._backbone_json)  # transformers asks whether this object is there
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del lives

    def start(self, backbone: Backbone, sidenet: SideNet) -> tuple[Any, Any]:
        """Puts both under their engines: the backbone's and the SideNet's. Collective: every rank must call it."""
        backbone_engine = self.start_backbone(backbone)
        sidenet_engine, *_ = deepspeed.initialize(
            model=sidenet,
            optimizer=build_optimizer(sidenet, self._config.train),
            config=self._sidenet_json,
            dist_init_required=False,
        )
        return backbone_engine, sidenet_engine

    def start_backbone(self, backbone: Backbone) -> Any:
        """Puts the backbone under its engine. Collective: every rank must call it."""
        engine, *_ = deepspeed.initialize(model=backbone, config=self._backbone_json, dist_init_required=False)
        engine.module.eval()
        return engine


def _accepted(content: dict[str, Any], setting: str) -> dict[str, Any]:
    """Has DeepSpeed look at its JSON before weights are loaded. Raises ConfigError: it does not accept it."""
    try:
        deepspeed.DeepSpeedConfig(deepcopy(content))
    except Exception as error:  # it raises whatever it comes upon
        problem = f"DeepSpeed does not accept the file: {in_a_line(error)}; do: see ds_configs/*.json"
        raise ConfigError([problem], source=setting) from error
    return content
