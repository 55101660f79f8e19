"""RULER's tasks that need no network, through lm-evaluation-harness: the conditions side by side, on the same items.

A score is RULER's own: the share of the reference strings that the greedily written text holds, mean over items. The
harness always makes 500 items of a task and length, of which the first `--items` are used.

    python bench/ruler.py --model runs/quickstart [--lengths 1024,4096] [--items 2] [--conditions memory_on,backbone]
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Sequence

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from eval.adapters.lm_eval import LongMemLM
from eval.adapters.loading import load, take_arguments
from eval.scorer import LABELS

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
CONDITIONS = ("backbone", "memory_off", "memory_on", "window_only", "longest_window")


def scores(
    models: Sequence[LongMemLM], tasks: Sequence[str], *, length: int, items: int, max_tokens: int | None
) -> list[dict[str, float]]:
    """Scores by task of each model at one length, with the seconds that it took; the tasks' items are made once."""
    random.seed(0)  # the harness's tasks draw from it
    metadata = {"tokenizer": models[0].tokenizer.name_or_path, "max_seq_lengths": [length]}
    loaded = TaskManager(metadata=metadata).load(list(tasks))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        if max_tokens is not None:
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_tokens}, update=True)
    found = []
    for model in models:
        begun = time.perf_counter()
        results = evaluate(model, task_dict=loaded, limit=items, bootstrap_iters=0)["results"]
        found.append({name: results[name][f"{length},none"] for name in tasks})
        found[-1]["seconds"] = time.perf_counter() - begun
    return found


def main() -> None:
    """Prints a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder, a checkpoint or an export")
    parser.add_argument("--backbone", help="by default the run's backbone.path")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="tokens, what is written included")
    parser.add_argument("--items", type=int, default=10, help="of each task and length")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--max-tokens", type=int, help="written at most; by default what each task says, 30 to 128")
    parser.add_argument("--memory-tokens", type=int, help="by default the run's memory.tokens")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    given = {"pretrained": arguments.model, "backbone": arguments.backbone}
    if arguments.memory_tokens is not None:
        given["memory.tokens"] = arguments.memory_tokens
    scorer, tokenizer, _ = load(take_arguments(given))
    names = [name for name in arguments.conditions.split(",") if name in scorer.conditions]
    models = [LongMemLM(scorer, tokenizer, condition=name) for name in names]
    tasks = arguments.tasks.split(",")
    for length in map(int, arguments.lengths.split(",")):
        found = scores(models, tasks, length=length, items=arguments.items, max_tokens=arguments.max_tokens)
        print(
            f"\n{f'{length:,} tokens, {arguments.items} items a task':40} " + " ".join(f"{name:>15}" for name in tasks)
        )
        for name, of_model in zip(names, found, strict=True):
            shown = " ".join(f"{of_model[task]:15.3f}" for task in tasks)
            print(f"{LABELS[name]:40} {shown} {of_model['seconds']:8.0f} s", flush=True)


if __name__ == "__main__":
    main()
