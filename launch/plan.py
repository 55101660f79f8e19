"""Says what a run needs before it runs: `python launch/plan.py --config FILE --nodes N --gpus-per-node P`; `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.config.load import load_config
from pipeline.config.output import readers_may_leave

SHAPES = ("gpt2-medium", "llama-3-8b", "llama-3-70b")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, plans, prints."""
    parser = argparse.ArgumentParser(
        description="What a run needs on every rank: bytes, traffic, and whether it fits. No weights are loaded.",
        epilog="Single settings come last, as for launch/train.py: --section.key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the run")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=_count, default=1, metavar="P", help="ranks of each (default: 1)")
    parser.add_argument("--gpu-memory-gib", type=_gib, metavar="X", help="memory of one accelerator")
    parser.add_argument("--shape", choices=SHAPES, help="a known size instead of the backbone.path of the file")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, overrides)
    # Loaded after the settings are known to be right: these imports take seconds.
    from pipeline.planning.plan import make_plan
    from pipeline.planning.shapes import known_shape, read_shape
    from pipeline.planning.text import plan_text

    shape = known_shape(options.shape) if options.shape else read_shape(config.backbone.path)
    plan = make_plan(config, shape, world_size=options.nodes * options.gpus_per_node)
    with readers_may_leave():
        print(plan_text(plan, gpus_per_node=options.gpus_per_node, gpu_memory_gib=options.gpu_memory_gib))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def program() -> None:
    """The command `longmem-plan`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
