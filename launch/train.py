"""Trains LongMem: `deepspeed launch/train.py --config FILE [--section.key value ...]`; `--help` lists every setting.

Exit codes, on every rank: 0 finished (or stopped by `train.stop_after_steps`), 75 stopped by a signal and to be started
again, 1 failed. `RUN/status.json` says the same with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import end_well, run_program
from pipeline.config.load import load_from_command_line
from pipeline.config.schema import Config
from pipeline.distributed.signals import Signals
from pipeline.errors import EXIT_PREEMPTED

if TYPE_CHECKING:
    from pipeline.training.loop import Ended


def main() -> None:
    """Parses, builds, runs."""
    run(load_from_command_line(sys.argv[1:]))


def run(config: Config) -> None:
    """Trains with a configuration, and shows what came out."""
    with Signals(usr1_stops=config.run.on_usr1 == "stop") as signals:
        ended = _train(config, signals)
        if ended.asked is not None:
            end_well(EXIT_PREEMPTED)


def _train(config: Config, signals: Signals) -> Ended:
    # Loaded after the settings are known to be right: these imports take seconds.
    from eval.while_training import check_evaluation, evaluate
    from pipeline.distributed.ranks import rank
    from pipeline.training.build import build_run
    from pipeline.training.engines import end_distributed
    from pipeline.training.loop import train
    from pipeline.training.summary import summary

    check_evaluation(config)
    built = build_run(config, signals=signals)
    ended = train(
        built,
        evaluate=lambda model, stores: evaluate(model, stores, config, group=built.group, progress=rank() == 0),
        signals=signals,
    )
    if rank() == 0:
        print(summary(built.folder), flush=True)
        if ended.reason is not None:
            print(f"stopped after step {ended.step} by {ended.reason}; start again to go on", flush=True)
    end_distributed()
    return ended


def program() -> None:
    """The command `longmem-train`."""
    run_program(main)


if __name__ == "__main__":
    program()
