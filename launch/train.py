"""Trains LongMem: `deepspeed launch/train.py --config FILE [--section.key value ...]`; `--help` lists every setting."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.config.load import load_from_command_line
from pipeline.config.schema import Config


def main() -> None:
    """Parses, builds, runs."""
    run(load_from_command_line(sys.argv[1:]))


def run(config: Config) -> None:
    """Trains with a configuration, and shows what came out.

    Args:
        config: The settings.
    """
    # Loaded after the settings are known to be right: these imports take seconds.
    from eval.perplexity import check_evaluation, evaluate
    from pipeline.distributed.ranks import rank, world_size
    from pipeline.training.build import build_run
    from pipeline.training.loop import train
    from pipeline.training.summary import summary

    check_evaluation(config)
    built = build_run(config)
    train(
        built,
        evaluate=lambda model, store: evaluate(
            model, store, config, rank=rank(), world_size=world_size(), progress=rank() == 0
        ),
    )
    if rank() == 0:
        print(summary(built.folder), flush=True)


if __name__ == "__main__":
    # DeepSpeed 0.19 still calls collectives by names that torch 2.13 is renaming; nothing that a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with explained():
        main()
