"""Operations of a training step, counted, and what a whole run of them would take on a cluster.

    python bench/flops.py --config configs/paper.yaml --shape gpt2-medium [--section.key value ...]
        [--peak-tflops 312 --utilisation 0.3]

One segment of one lane is trained on with a full memory, on this machine's CPU, with random weights: `torch`'s counter
sees every matrix product of both engines, forward and backward, of search and of reading. A product and a sum are two
operations; attention counts as if it were not causal; what is gathered, sorted and rotated does not count. Hours: the
operations of all tokens of the run over what an accelerator is taken to do, its peak times a utilisation, both assumed.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import torch
from ablation import words
from step_time import trainer_for
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import AutoModelForCausalLM

from pipeline.config.load import load_config
from pipeline.metrics.phases import PhaseTimer
from pipeline.planning.shapes import KNOWN_SHAPES
from pipeline.training.build import build_model
from pipeline.training.engines import start_distributed

# What torch's counter leaves out: attention's own kernels on a CPU.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
PHASES = ("backbone", "retrieve_and_read", "sidenet", "loss", "backward")


@register_flop_formula(_FORWARD)
def attention(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    """Two products of queries `[B, H, Q, D]` with keys or values `[B, H, K, D]`."""
    return 4 * query.numel() * key[-2]


@register_flop_formula(_BACKWARD)
def attention_backward(_: torch.Size, query: torch.Size, key: torch.Size, *__: object, **___: object) -> int:
    """Five: the scores once more, and the gradients of probabilities, queries, keys and values."""
    return 10 * query.numel() * key[-2]


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape", required=True, choices=list(KNOWN_SHAPES))
    parser.add_argument("--peak-tflops", type=float, default=312.0, help="of one accelerator, dense bf16 (A100: 312)")
    parser.add_argument("--utilisation", type=float, default=0.3, help="the part of it that is taken to be reached")
    options, overrides = parser.parse_known_args()
    device = start_distributed(timeout_s=600)
    torch.manual_seed(0)
    asked = load_config(options.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        backbone = AutoModelForCausalLM.from_config(KNOWN_SHAPES[options.shape](), dtype=torch.float32)
        backbone.save_pretrained(folder)
        vocab_size = backbone.config.vocab_size
        del backbone
        ours = {
            "run.output_dir": folder,
            "backbone.path": folder,
            "data.path": folder,
            "data.lanes": 1,
            "train.segments_per_step": 1,
            "train.precision": "fp32",
        }
        config = load_config(options.config, [*overrides, *words(ours)])
        model, engine, _ = build_model(config, device)
        length = config.train.segment_tokens
        tokens = np.random.default_rng(0).integers(vocab_size, size=9 * length)
        trainer = trainer_for(model, engine, config.train, tokens, config.memory.tokens)
        with FlopCounterMode(display=False) as counter:
            trainer.timer = PhaseTimer(clock=counter.get_total_flops)
            trainer.stream.phase = trainer.timer.phase
            phases = trainer.step(1).phases
    total = sum(phases.values())
    print("| phase | GFLOP a token | share |\n| --- | --- | --- |")
    for name in PHASES:
        print(f"| {name} | {phases.get(name, 0) / length / 1e9:.3f} | {phases.get(name, 0) / total:.1%} |")
    left_out = {name: value for name, value in phases.items() if name not in PHASES and value}
    assert not left_out, f"phases that the table lacks: {left_out}"
    print(f"| all | {total / length / 1e9:.3f} | |")
    run_tokens = asked.train.steps * asked.train.segments_per_step * asked.data.lanes * length
    hours = total / length * run_tokens / (options.peak_tflops * 1e12 * options.utilisation) / 3600
    print(
        f"\n{run_tokens:,} tokens: {total / length * run_tokens:.2e} FLOP, {hours:,.0f} hours of one accelerator of "
        f"{options.peak_tflops:g} TFLOP/s at {options.utilisation:.0%}"
    )


if __name__ == "__main__":
    main()
