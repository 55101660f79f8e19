"""Trains LongMem: `deepspeed launch/train.py --config FILE [--section.key value ...]`; `--help` lists every setting."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.config.load import load_from_command_line
from pipeline.config.schema import Config


def main() -> None:
    """Parses, builds, runs."""
    config = load_from_command_line(sys.argv[1:])
    run(config)


def run(config: Config) -> None:
    """Trains with a configuration.

    Args:
        config: The settings.
    """
    # Loaded after the settings are known to be right: these imports take seconds.
    from eval.perplexity import evaluate
    from pipeline.distributed.ranks import rank, world_size
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    run = build_run(config)

    def evaluation(model, store):
        report = evaluate(model, store, config, rank=rank(), world_size=world_size(), progress=rank() == 0)
        if rank() == 0:
            print(report.table())
        return report.to_dict()

    step = train(run, evaluate=evaluation)
    if rank() == 0:
        print(f"step {step} of {config.train.steps}; run folder: {run.folder}")
        print(f"see it with: tensorboard --logdir {run.folder / 'tensorboard'}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with explained():
        main()
