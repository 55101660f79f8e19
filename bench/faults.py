"""Kills a rank of a training again and again, and says what it cost: where the kills fell, steps lost, equal losses.

A tiny model on two ranks of this machine; how the kills are drawn stands in tests/fault_injection.py. Ends with 1 if
the losses are not those of an unbroken run to the last bit, or if a checkpoint that was whole was lost.

    python bench/faults.py [--kills 200] [--seed 0] [--every-steps 2]

With --finish it starts and finishes whole runs of 1, 2 and 4 ranks beside other work instead, and counts how their
processes end; ends with 1 if one of them did not exit with 0.

    python bench/faults.py --finish 120 [--busy 2]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fault_injection import Job, Kill, Life, exact_record
from tests.finishing import finish_runs, finishing_configs
from tests.tiny_run import save_tiny_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-steps", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--finish", type=int, metavar="RUNS", help="finish this many runs; kill nobody")
    parser.add_argument("--busy", type=int, default=2, help="with --finish: processes that keep the machine busy")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.finish is not None:
            sys.exit(finish(Path(folder), num_runs=options.finish, num_busy=options.busy))
        sys.exit(measure(Path(folder), kills=options.kills, seed=options.seed, every_steps=options.every_steps))


def measure(folder: Path, *, kills: int, seed: int, every_steps: int) -> int:
    """Runs everything and prints the summary; the exit code."""
    inputs = save_tiny_run(folder)
    steps = 40 + kills  # a life gets on by less than one

    def job(name: str) -> Job:
        config = inputs.config(
            folder / name,
            memory={"group_size": 2},
            train={"steps": steps, "histogram_every_steps": 0},
            checkpoint={"every_steps": every_steps, "keep": 2},
        )
        return Job(config, folder / f"notes of {name}")

    begun, numbers = time.monotonic(), random.Random(seed)
    lives: list[Life] = []
    killed = job("killed")
    for number in range(1, kills + 1):
        life = killed.live_and_die(Kill.draw(numbers))
        if life is None:
            print(f"the run ended after {len(lives)} kills", flush=True)
            break
        lives.append(life)
        print(f"{number}: {life.place} {life.touched} lost {life.lost} of {life.done}", file=sys.stderr, flush=True)
    killed.finish()
    job("unbroken").finish()
    is_equal = exact_record(folder / "killed") == exact_record(folder / "unbroken")
    return summarize(lives, steps=steps, is_equal=is_equal, minutes=(time.monotonic() - begun) / 60)


def finish(folder: Path, *, num_runs: int, num_busy: int) -> int:
    """Runs everything and prints how often which exit codes came; the exit code."""
    found = finish_runs(finishing_configs(save_tiny_run(folder), folder), num_runs, num_busy=num_busy)
    ended = Counter((run["ranks"], run["state"], tuple(run["codes"])) for run in found)
    for (ranks, state, codes), count in sorted(ended.items(), key=str):
        print(f"{count} runs of {ranks} rank(s): {state}, exit codes {codes}")
    for run in found:
        if any(run["codes"]):
            print(run["said"])
    return int(any(code for run in found for code in run["codes"]))


def summarize(lives: list[Life], *, steps: int, is_equal: bool, minutes: float) -> int:
    """Prints what the kills cost; the exit code."""
    lost = [life.lost for life in lives]
    went_missing = [life for life in lives if life.whole < life.published]
    places = Counter(life.place for life in lives)
    victims = Counter(life.kill.victim for life in lives)
    print(f"kills {len(lives)} of a run of {steps} steps, {minutes:.0f} minutes")
    print("while " + ", ".join(f"{place} {count}" for place, count in places.most_common()))
    print("of rank " + ", ".join(f"{rank}: {count}" for rank, count in sorted(victims.items())))
    print(f"steps lost by a kill: at most {max(lost)}, on average {sum(lost) / len(lost):.2f}")
    print(f"whole checkpoints lost: {len(went_missing)}")
    print(f"losses equal those of an unbroken run to the last bit: {'yes' if is_equal else 'NO'}")
    return 0 if is_equal and not went_missing else 1


if __name__ == "__main__":
    main()
