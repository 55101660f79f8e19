"""Evaluates a trained model: `launch/evaluate.py --model RUN --task NAME[,NAME...]`; `--help` lists tasks and options.

One process needs no launcher and no DeepSpeed; under a launcher the backbone is split over the ranks, and memory over
those of a memory group.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import run_program
from pipeline.config.output import readers_may_leave
from pipeline.distributed.launchers import is_started_by_mpi, slurm_ranks


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and settings of tasks and of the run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--model", type=Path, metavar="RUN", help="a run folder, a checkpoint (step_*) or an export")
    parser.add_argument("--backbone", metavar="PATH", help="its folder or hub name; by default the run's backbone.path")
    parser.add_argument("--task", default="all", metavar="NAME[,NAME...]", help="default: all that have their data")
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="[TASK=]PATH", help="files, folders or hub names"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/evaluation")
    parser.add_argument("--limit", metavar="N|small", help="items of each task; small: minutes on two cores")
    parser.add_argument("-h", "--help", action="store_true", help="this, and all options of all tasks")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed's launcher gives it
    options, rest = parser.parse_known_args(arguments)
    if options.help or options.model is None:
        from eval.options import help_text

        with readers_may_leave():
            sys.stdout.write(parser.format_help() + "\n" + help_text())
        raise SystemExit(0 if options.help else 2)
    return options, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, evaluates, writes the report."""
    options, rest = parse(arguments)
    # Loaded after the command line is known to be right: these imports take seconds.
    from eval.evaluation import Asked, evaluate

    asked = Asked(options.model, options.backbone, options.task, options.data, options.output, options.limit, rest)
    if "RANK" in os.environ or is_started_by_mpi(os.environ) or slurm_ranks(os.environ):
        from pipeline.training.partitioned import under_deepspeed

        under_deepspeed(lambda load: evaluate(asked, load))
    else:
        evaluate(asked)


def program() -> None:
    """The command `longmem-evaluate`."""
    run_program(main)


if __name__ == "__main__":
    program()
