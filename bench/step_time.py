"""What memory costs in a training step: phases and peak memory with memory off, 4k, 16k and 65,536 tokens full.

One process, one rank, both DeepSpeed engines; the settings take turns, so that a drifting machine slows all alike. Peak
memory is that of a process of its own for each setting. Profiles read as `configs/deep.yaml` and `configs/paper.yaml`
do; the left context of `deep` is encoded with memory off, too: what it costs is in the phase `backbone`. Banks are
filled with the keys and values of real text; where the text is shorter than the bank it is repeated with noise of a
tenth of their spread, so that no two chunks are alike.

    python bench/step_time.py [--profile paper|deep] [--backbone DIR] [--segment-tokens 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

# Threads of a rank wait for each other by turning round, not by sleeping: set before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import torch
import yaml
from transformers import AutoTokenizer

from pipeline.config.load import load_config
from pipeline.config.schema import Config, TrainConfig
from pipeline.data.lanes import Segment
from pipeline.data.stdlib import collect
from pipeline.memory.bank import MemoryBank
from pipeline.metrics.peak import forget_peak, peak_bytes
from pipeline.metrics.phases import PhaseTimer
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Stream
from pipeline.training.build import build_model
from pipeline.training.engines import start_distributed
from pipeline.training.step import StepResult, Trainer

SIZES = (0, 4096, 16384, 65536)
PROFILES = ("paper", "deep")


class TextLane:
    """One lane of text, begun again when it ends; segments are numbered from where a bank ends."""

    num_sources = 1

    def __init__(
        self, tokens: np.ndarray, segment_tokens: int, bank: MemoryBank | None, *, context_tokens: int
    ) -> None:
        self.tokens, self.length, self.bank, self.read = tokens, segment_tokens, bank, 0
        self.context_tokens = context_tokens

    def next_of_group(self, rank: int, size: int) -> Segment:
        """The next segment; the group is one rank."""
        span = (self.read + np.arange(self.length + 1)) % len(self.tokens)
        self.read += self.length
        text = self.tokens[span][None]
        nothing = np.zeros((1, self.length), dtype=np.int64)
        start = self.bank.end if self.bank else self.read - self.length
        before = min(self.context_tokens, start)
        context = self.tokens[(self.read - self.length - before + np.arange(before)) % len(self.tokens)][None]
        return Segment(text[:, :-1], text[:, 1:], nothing, context, np.zeros_like(context), start=start)


def read_text(backbone: str, num_tokens: int) -> np.ndarray:
    """Tokens of the Python library's own sources."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    found: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        collect(Path(folder) / "text", min_bytes=30_000)
        for path in sorted((Path(folder) / "text").iterdir()):
            found += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
            if len(found) >= num_tokens:
                break
    return np.array(found[:num_tokens], dtype=np.int64)


def configure(profile: str, backbone: str, segment_tokens: int, folder: str) -> Config:
    """How `configs/PROFILE.yaml` reads, at the backbone's size."""
    path = Path(folder) / "config.yaml"
    shipped = yaml.safe_load((Path(__file__).parents[1] / "configs" / f"{profile}.yaml").read_text())
    sidenet = shipped["sidenet"]
    if profile == "paper":  # its numbers are those of 24 layers; by default they follow the backbone
        sidenet = {name: sidenet[name] for name in ("layout", "residual", "fusion")}
    settings = {
        "run": {"output_dir": folder},
        "backbone": shipped["backbone"] | {"path": backbone},
        "data": {"path": folder, "lanes": 1},
        "memory": shipped["memory"] | {"tokens": SIZES[-1]},
        "sidenet": sidenet | {"activation_checkpointing": False},
        "train": {"steps": 1000, "segment_tokens": segment_tokens, "segments_per_step": 1, "learning_rate": 1e-6},
    }
    path.write_text(json.dumps(settings))
    return load_config(str(path))


def with_noise(x: torch.Tensor) -> torch.Tensor:
    """The same with noise of a tenth of its spread."""
    return x + 0.1 * x.std() * torch.randn_like(x)


@torch.no_grad()
def filled_bank(model: LongMem, tokens: np.ndarray, size: int) -> MemoryBank:
    """A bank with `size` tokens in it."""
    bank, length = model.bank(1, num_tokens=size), model.settings.segment_tokens
    documents = torch.zeros(1, length, dtype=torch.int64)
    text = torch.from_numpy(tokens[: len(tokens) // length * length])
    encoded = [
        [(kv.key.clone(), kv.value.clone()) for kv in model.encode(part[None], documents).memory]
        for part in text[: 8 * length].split(length)
    ]
    for index in range(bank.shape.num_chunks * bank.shape.chunk_size // length):
        segment = encoded[index % len(encoded)]
        noisy = [(with_noise(key), with_noise(value)) for key, value in segment]
        bank.append(noisy, start=index * length, documents=documents)
    return bank


def trainer_for(model: LongMem, engine: object, train: TrainConfig, tokens: np.ndarray, size: int) -> Trainer:
    """A trainer with a full bank of a size, 0 for none."""
    bank = filled_bank(model, tokens, size) if size else None
    settings, timer = model.settings, PhaseTimer()
    lane = TextLane(tokens, settings.segment_tokens, bank, context_tokens=settings.context_tokens)
    stream = Stream(model, bank, phase=timer.phase)
    return Trainer(stream, engine, lane, train, timer=timer, num_segments=1)  # type: ignore[arg-type]


def peak_mib(build: Callable[[], Trainer]) -> float:
    """Largest resident memory while a trainer is built and does two steps, MiB; what came before does not count."""
    host = torch.device("cpu")
    forget_peak(host)
    trainer = build()
    for step in (1, 2):
        trainer.step(step)
    peak = peak_bytes(host)
    assert peak is not None, "only Linux says what the peak was"
    return peak / 2**20


def measure_peak(arguments: argparse.Namespace, profile: str, size: int) -> float:
    """Peak memory of a process that trains two steps, MiB."""
    command = [sys.executable, __file__, "--profile", profile, "--peak", str(size), "--backbone", arguments.backbone]
    command += ["--segment-tokens", str(arguments.segment_tokens)]
    # Without the variables of this process's own job: the child starts one of its own.
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in job}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.strip().splitlines()[-1])


def show(
    profile: str, results: dict[int, list[StepResult]], peaks: dict[int, float], bank_mib: dict[int, float]
) -> None:
    """Prints the table of one profile."""
    phases = ["backbone", "append", "retrieve_and_read", "sidenet", "loss", "backward", "optimizer"]
    print(f"\nprofile {profile}: seconds of a step (medians of {len(results[0])})")
    print(
        f"{'memory tokens':>13} " + " ".join(f"{name[:9]:>9}" for name in [*phases, "step", "ratio", "bank MiB"]),
        end="",
    )
    print(f" {'peak MiB':>9} {'growth / bank':>14}")
    base = statistics.median(result.seconds for result in results[0])
    for size, steps in results.items():
        medians = [statistics.median(step.phases.get(name, 0.0) for step in steps) for name in phases]
        seconds = statistics.median(step.seconds for step in steps)
        cells = [*(f"{value:9.3f}" for value in medians), f"{seconds:9.3f}", f"{seconds / base:9.2f}"]
        growth = f"{(peaks[size] - peaks[0]) / bank_mib[size]:14.2f}" if size else f"{'-':>14}"
        print(f"{size:>13,} {' '.join(cells)} {bank_mib[size]:9.0f} {peaks[size]:9.0f} {growth}", flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("--backbone", default=".cache/longmem/smollm2-135m")
    parser.add_argument("--segment-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = start_distributed(timeout_s=600)
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = read_text(arguments.backbone, 40_000)
    for profile in [arguments.profile] if arguments.profile else PROFILES:
        with tempfile.TemporaryDirectory() as folder:
            config = configure(profile, arguments.backbone, arguments.segment_tokens, folder)
            model, engine, _ = build_model(config, device)
            if arguments.peak is not None:
                print(peak_mib(partial(trainer_for, model, engine, config.train, tokens, arguments.peak)))
                return
            trainers = {size: trainer_for(model, engine, config.train, tokens, size) for size in SIZES}
            results: dict[int, list[StepResult]] = {size: [] for size in SIZES}
            for number in range(arguments.rounds + 1):
                for size, trainer in trainers.items():
                    result = trainer.step(number + 1)
                    if number:  # the first round warms up
                        results[size].append(result)
            held = {size: trainer.stream.bank for size, trainer in trainers.items()}
            banks = {size: bank.shape.bytes(bank.dtype) / 2**20 if bank else 0.0 for size, bank in held.items()}
            del held, trainers, model, engine
            show(profile, results, {size: measure_peak(arguments, profile, size) for size in SIZES}, banks)


if __name__ == "__main__":
    main()
