"""What a checkpoint costs with 65,536 tokens remembered: bytes, seconds, stall of the training, seconds to resume.

`checkpoint.memory` `save` and `replay` take turns in one run, with both DeepSpeed engines. The memory is filled with
random numbers; what a restart with `replay` reads, it reads from real lanes. For each owner of state: bytes; seconds
that the training waits for `save`; seconds of writing beside the training; seconds of `load`. Then the whole: the wait
of the save, how much longer the steps beside the writing take than others, and when the checkpoint is there. Files are
read back from the page cache.

    python bench/checkpoint.py [--profile paper|deep] [--backbone DIR] [--data DIR] [--tokens 65536] [--rounds 5]
    deepspeed --num_gpus 2 bench/checkpoint.py --group-size 2
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.checkpoint.folder import SavedWorld, StateOwner
from pipeline.checkpoint.memory import MemoryOwner
from pipeline.config.schema import Config
from pipeline.distributed.ranks import barrier, gather_objects, rank, world_size
from pipeline.training.build import Run, build_run
from pipeline.training.engines import start_distributed

PROFILES = {
    "paper": {"layout": "uniform"},
    "deep": {"layout": "top", "memory_layers": "all", "fusion": "joint"},
}
POSITIONS = {"paper": "none", "deep": "clamp:512"}
MIB = 2**20


class Timed:
    """An owner of state with a clock."""

    def __init__(self, owner: StateOwner) -> None:
        self.owner, self.name = owner, owner.name
        self.stall = self.beside = self.loading = 0.0

    def save(self, folder: Path) -> Callable[[], None] | None:
        begun = time.perf_counter()
        rest = self.owner.save(folder)
        self.stall, self.beside = time.perf_counter() - begun, 0.0

        def timed() -> None:
            begun = time.perf_counter()
            if rest is not None:
                rest()
            self.beside = time.perf_counter() - begun

        return timed

    def least_bytes(self) -> int:
        return self.owner.least_bytes()

    def check(self, folder: Path, saved: SavedWorld) -> None:
        self.owner.check(folder, saved)

    def load(self, folder: Path, saved: SavedWorld) -> None:
        begun = time.perf_counter()
        self.owner.load(folder, saved)
        self.loading = time.perf_counter() - begun


@dataclass
class Cost:
    """What one checkpoint cost.

    Attributes:
        stall: Seconds that the training waited.
        delay: Seconds by which the steps beside the writing were longer, in all.
        whole_after: Seconds until the checkpoint was there.
        load: Seconds of loading, hashes included.
        owners: For each owner MiB, seconds of stall, beside, and loading.
    """

    stall: float
    delay: float = 0.0
    whole_after: float = 0.0
    load: float = 0.0
    owners: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)


def configure(arguments: argparse.Namespace, folder: str) -> Config:
    """One segment of each lane and rank a step."""
    return Config.model_validate(
        {
            "run": {"output_dir": folder},
            "backbone": {"path": arguments.backbone},
            "data": {"path": arguments.data, "lanes": arguments.lanes},
            "memory": {
                "tokens": arguments.tokens,
                "position": POSITIONS[arguments.profile],
                "group_size": arguments.group_size,
            },
            "sidenet": PROFILES[arguments.profile],
            "train": {
                "steps": 10**6,
                "segment_tokens": arguments.segment_tokens,
                "segments_per_step": arguments.group_size,
                "learning_rate": 1e-6,
            },
            "checkpoint": {"keep": 1},
            "evaluation": {"context_tokens": 256, "scored_tokens": 256},
        }
    )


class Measured:
    """A run whose memory is full."""

    def __init__(self, run: Run) -> None:
        self.run, self.owners, self.number = run, [Timed(owner) for owner in run.owners], 0
        memory = run.owners[-1]
        assert isinstance(memory, MemoryOwner)
        self.memory = memory
        self._fill()

    def _fill(self) -> None:
        """As if all that can be remembered had been read."""
        bank, trainer, tokens = self.run.bank, self.run.trainer, self.run.config.train.segment_tokens
        assert bank is not None
        shape, group = bank.shape, trainer.stream.exchange
        documents = torch.zeros(shape.num_lanes, tokens, dtype=torch.int64)
        for number in range(-(-self.run.config.memory.tokens // (tokens * group.size))):
            pair = torch.randn(2, shape.num_lanes, shape.num_kv_heads, tokens, shape.head_dim)
            start = (number * group.size + group.rank) * tokens
            bank.append([(pair[0], pair[1])] * shape.num_layers, start=start, documents=documents)
            trainer.lanes.skip(group.size)

    def step(self) -> float:
        """Seconds of one step of all ranks."""
        begun = time.perf_counter()
        self.number += 1
        self.run.trainer.step(self.number)
        barrier()
        return time.perf_counter() - begun

    def cost(self, *, store: bool, usual: float) -> Cost:
        """Saves and loads once. `store`: `checkpoint.memory` is `save`; `usual`: seconds of a step without saving."""
        self.memory.store = store
        checkpoints, begun = self.run.checkpoints, time.perf_counter()
        final = checkpoints.save(self.number, self.owners)
        cost = Cost(stall=time.perf_counter() - begun)
        while not gather_objects(final.is_dir())[0]:
            cost.delay += self.step() - usual
            checkpoints.publish_if_written()
        cost.whole_after = time.perf_counter() - begun
        begun = time.perf_counter()
        checkpoints.load(final, self.owners)
        cost.load = time.perf_counter() - begun
        for timed in self.owners:
            mib = sum(path.stat().st_size for path in (final / timed.name).rglob("*") if path.is_file()) / MIB
            cost.owners[timed.name] = (mib, timed.stall, timed.beside, timed.loading)
        return cost


def show(setting: str, costs: list[Cost], usual: float) -> None:
    """Prints the medians."""
    print(f"\ncheckpoint.memory {setting}, rounds: {len(costs)} (medians); a usual step takes {usual:.2f} s")
    print(f"{'owner':>9} {'MiB':>9} {'stall s':>9} {'beside s':>9} {'load s':>9}")
    for name in costs[0].owners:
        cells = [statistics.median(cost.owners[name][column] for cost in costs) for column in range(4)]
        print(f"{name:>9} {cells[0]:9.1f} " + " ".join(f"{cell:9.3f}" for cell in cells[1:]))
    mib = sum(owner[0] for owner in costs[0].owners.values())
    stall, delay, whole, load = (
        statistics.median(getattr(cost, name) for cost in costs) for name in ("stall", "delay", "whole_after", "load")
    )
    print(f"{'all':>9} {mib:9.1f} {stall:9.3f} {'':>9} {load:9.3f}   (loading: hashes included)")
    print(f"stall {stall / usual:.2f} steps; steps beside the writing: {delay:.2f} s longer; there after {whole:.1f} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=list(PROFILES), default="paper")
    parser.add_argument("--backbone", default=".cache/longmem/smollm2-135m")
    parser.add_argument("--data", default=".cache/longmem/quickstart-data")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--segment-tokens", type=int, default=512)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    start_distributed(timeout_s=1800)
    folder = gather_objects(tempfile.mkdtemp(prefix="bench-") if rank() == 0 else None)[0]
    try:
        measured = Measured(build_run(configure(arguments, f"{folder}/run")))
        usual = statistics.median([measured.step() for _ in range(arguments.rounds + 2)][1:])
        costs: dict[str, list[Cost]] = {"save": [], "replay": []}
        for _ in range(arguments.rounds):
            for setting, found in costs.items():
                found.append(measured.cost(store=setting == "save", usual=usual))
        if rank() == 0:
            print(f"\n{vars(arguments)}, {world_size()} ranks")
            for setting, found in costs.items():
                show(setting, found, usual)
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    main()
