"""What an evaluation takes: items a second of each task, and what many suffixes on one memory gain over one at a time.

Suffixes as ChapterBreak has them: `--suffixes` of 128 tokens after one context. Three ways take turns:

    together     the context is read into memory once, all suffixes are rows of one call
    one by one   the context is read into memory once, each suffix is a call of its own
    read again   the context is read again before each suffix, as where one call takes a text and what follows it

Seconds are of one item, medians over rounds, memory on; tokens are random. Tasks are measured with their small options
and under all conditions; those that need data are left out where `--data` names none.

    python bench/evaluate.py --model RUN [--data TASK=PATH ...] [--task NAME,...] [--items 2] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Threads wait for each other by turning round, not by sleeping: set before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "active")

import numpy as np
import torch
import transformers

from eval.evaluation import load_alone
from eval.model_scorer import ModelScorer
from eval.options import choose, take_options
from eval.scorer import MEMORY_ON, Row, Tokens, split
from eval.task import Given, Item, Task
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.load import read_trained

SUFFIX_TOKENS = 128
GOAL = 4.0
TOLERANCE = 1e-3  # nats: sums of float32 over 128 tokens in other batches


class Texts(NamedTuple):
    """A context, cut as `split` does, and suffixes that follow it."""

    before: Tokens
    rest: Tokens
    suffixes: Sequence[Tokens]

    @property
    def rows(self) -> list[Row]:
        """The suffixes, each with what stands before it in its segment."""
        return [Row(np.concatenate([self.rest, suffix]), len(suffix)) for suffix in self.suffixes]


Way = Callable[[ModelScorer, Texts], list[float]]


def together(scorer: ModelScorer, texts: Texts) -> list[float]:
    """One reading, one call."""
    return sums(scorer, scorer.remember(texts.before), texts.rows)


def one_by_one(scorer: ModelScorer, texts: Texts) -> list[float]:
    """One reading, a call for each suffix."""
    past = scorer.remember(texts.before)
    return [loss for row in texts.rows for loss in sums(scorer, past, [row])]


def read_again(scorer: ModelScorer, texts: Texts) -> list[float]:
    """A reading and a call for each suffix."""
    return [loss for row in texts.rows for loss in sums(scorer, scorer.remember(texts.before), [row])]


WAYS: dict[str, Way] = {"together": together, "one by one": one_by_one, "read again": read_again}


def sums(scorer: ModelScorer, past: Any, rows: Sequence[Row]) -> list[float]:
    """What each row loses."""
    return [float(losses.sum()) for losses in scorer.losses(past, rows, [MEMORY_ON])[MEMORY_ON]]


def measure_suffixes(scorer: ModelScorer, vocabulary: int, arguments: argparse.Namespace) -> None:
    """Times the ways in turns and prints a table for each size of the context."""
    random = np.random.default_rng(0)
    print(f"\n{arguments.suffixes} suffixes of {SUFFIX_TOKENS} tokens after one context, memory on")
    print("| context | in memory | tokens a row | way | s | read s | scored s | / together |\n|" + " --- |" * 8)
    for size in arguments.contexts:
        before, rest = split(random.integers(0, vocabulary, size), scorer.segment_tokens)
        texts = Texts(before, rest, list(random.integers(0, vocabulary, (arguments.suffixes, SUFFIX_TOKENS))))
        sum_of, reading = {}, []
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        together(scorer, texts._replace(before=before[: scorer.segment_tokens]))  # what is made once is made
        for _ in range(arguments.rounds):
            begin = time.perf_counter()
            scorer.remember(texts.before)
            reading.append(time.perf_counter() - begin)
            for name, way in WAYS.items():
                begin = time.perf_counter()
                sum_of[name] = way(scorer, texts)
                seconds[name].append(time.perf_counter() - begin)
        for name in WAYS:
            np.testing.assert_allclose(sum_of[name], sum_of["together"], atol=TOLERANCE, rtol=0, err_msg=name)
        show(size, texts, {name: statistics.median(each) for name, each in seconds.items()}, statistics.median(reading))


def show(size: int, texts: Texts, seconds: dict[str, float], reading: float) -> None:
    """Prints the rows of one size."""
    for name, each in seconds.items():
        read = reading * (len(texts.suffixes) if name == "read again" else 1)
        ratio = each / seconds["together"]
        cells = [f"{size:,}", f"{len(texts.before):,}", f"{len(texts.rest) + SUFFIX_TOKENS}", name, f"{each:.2f}"]
        cells += [f"{read:.2f}", f"{each - read:.2f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    gain = seconds["read again"] / seconds["together"]
    print(f"gain over reading again: {gain:.2f} (goal {GOAL:g}: {'reached' if gain >= GOAL else 'missed'})", flush=True)


def measure_tasks(scorer: ModelScorer, tasks: Mapping[Task[Any], Sequence[Item]]) -> None:
    """Times items of each task."""
    print("\n| task | items | s an item | items/s | tokens read/s |\n|" + " --- |" * 5)
    for task, items in tasks.items():
        read = [0]
        scorer.on_read = lambda num_tokens, read=read: read.append(num_tokens)  # type: ignore[misc]
        begin = time.perf_counter()
        for item in items:
            task.score(item, scorer)
        took = time.perf_counter() - begin
        each = f"{took / len(items):.1f} | {len(items) / took:.3f} | {sum(read) / took:,.0f}"
        print(f"| {task.name} | {len(items)} | {each} |", flush=True)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and `--SECTION.KEY VALUE` of tasks and of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a run folder, a checkpoint or an export")
    parser.add_argument("--backbone", help="its folder; by default the run's backbone.path")
    parser.add_argument("--task", default="all", help="names with commas between them; empty: only the suffixes")
    parser.add_argument("--data", nargs="+", action="extend", default=[], metavar="TASK=PATH")
    parser.add_argument("--items", type=int, default=2, help="of each task")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1025], help="tokens before the suffixes; none: off")
    parser.add_argument("--suffixes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    return parser.parse_known_args()


def main() -> None:
    """Measures and prints."""
    arguments, rest = parse()
    classes = choose(arguments.task) if arguments.task else []
    options, settings = take_options(classes, rest, data=arguments.data, limit="small")
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    trained = read_trained(arguments.model, settings)
    scorer = ModelScorer(load_alone(trained, arguments.backbone))
    tokenizer = load_tokenizer(arguments.backbone or trained.config.backbone.path)
    given = Given(tokenizer, trained.config, scorer.longest)
    tasks = [one(options[one.name], given) for one in classes if options[one.name].data or not one.needs_data]
    items = {task: task.items()[: arguments.items] for task in tasks}  # wrong data are said at once
    memory = ", ".join(f"{key} {value}" for key, value in trained.config.memory.model_dump().items())
    print(f"{arguments.model}: {os.cpu_count()} cores, {arguments.threads} threads, torch {torch.__version__}")
    print(
        f"segments of {scorer.segment_tokens}, left context {trained.config.backbone.context_tokens}; memory: {memory}"
    )
    measure_suffixes(scorer, len(tokenizer), arguments)
    measure_tasks(scorer, items)


if __name__ == "__main__":
    main()
