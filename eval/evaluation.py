"""One evaluation: which tasks, of which model, into which folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.in_step import in_step
from eval.model_scorer import ModelScorer, longest_window
from eval.options import choose, take_options
from eval.report import Section, markdown, write_report
from eval.runner import EvaluationError, Progress, check_same, reported_before, run
from eval.task import Given, Scores, Task
from pipeline.backbone.load import check_weights, read_backbone_config
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.groups import MemoryGroup
from pipeline.distributed.ranks import on_rank_zero, rank, together, world_size
from pipeline.errors import ConfigError
from pipeline.model.load import Trained, load_whole, read_trained
from pipeline.model.longmem import LongMem

Load = Callable[[Trained, str | None], LongMem]


class Asked(NamedTuple):
    """The command line.

    Attributes:
        model: Run folder, checkpoint or export.
        backbone: Its folder or hub name; None: the run's.
        tasks: Names, with commas between them, or `all`.
        data: Files of tasks.
        output: Folder of the report; None: `evaluation` beside the model's files.
        limit: Items of each task, or `small`, or None.
        settings: `--section.key value` of tasks and of the run.
    """

    model: Path
    backbone: str | None
    tasks: str
    data: Sequence[str]
    output: Path | None
    limit: str | None
    settings: Sequence[str]


def load_alone(trained: Trained, backbone: str | None) -> LongMem:
    """Loads a model into this process, without DeepSpeed."""
    return load_whole(trained, backbone, "cuda" if torch.cuda.is_available() else "cpu")


def evaluate(asked: Asked, load: Load = load_alone) -> dict[str, Section]:
    """Evaluates, writes the report and prints it. Goes on from what is there of the same evaluation.

    Collective: every rank must call it.

    Args:
        asked: What was asked for.
        load: Loads the model.

    Returns:
        The report, by task.

    Raises:
        LongMemError: Something is wrong with settings, data or model; before anything is scored.
    """
    chosen, trained, options = together(lambda: _read(asked))
    given = together(lambda: _given(asked, trained))
    tasks, without_data = {}, []
    for task_class in chosen:
        if task_class.needs_data and not options[task_class.name].data:
            without_data.append(task_class.name)
        else:
            tasks[task_class.name] = task_class(options[task_class.name], given)
    if without_data and (asked.tasks != "all" or not tasks):
        raise EvaluationError(
            f"{', '.join(without_data)} cannot do without data", do="name files with --data TASK=PATH"
        )
    items = together(lambda: {name: task.items() for name, task in tasks.items()})
    output = asked.output or asked.model / "evaluation"
    for name, task in tasks.items():
        check_same(output / name, _about(trained, task))
    model = load(trained, asked.backbone)
    size = trained.config.memory.group_size if trained.config.memory.enabled else 1
    group = MemoryGroup.build(
        size, timeout_s=trained.config.run.collective_timeout_s, on_host=trained.config.memory.device == "host"
    )
    scores: dict[str, Mapping[str, Scores]] = {}
    with in_step(model) as (stepping, finish):
        scorer = ModelScorer(stepping, group, longest=trained.config.evaluation.backbone_window_tokens)
        for name, task in tasks.items():
            progress = Progress(name if rank() == 0 else None)
            scorer.on_read = progress.read
            score = partial(task.score, scorer=scorer)
            scores[name] = run(items[name], score, group, finish=finish, progress=progress, folder=output / name)
    sections = {name: task.report(scores[name]) for name, task in tasks.items()}
    about = {
        "model": str(asked.model),
        "weights (SHA-256)": trained.sha256,
        "backbone": asked.backbone or trained.config.backbone.path,
        "segment tokens": trained.config.train.segment_tokens,
        "memory": ", ".join(f"{key} {value}" for key, value in trained.config.memory.model_dump().items()),
    }
    if without_data:
        about["left out for want of data"] = ", ".join(without_data)
    same = _about(trained, next(iter(tasks.values())))
    on_rank_zero(lambda: write_report(output, about, sections, scores, others=reported_before(output, same)))
    if rank() == 0:
        print(markdown(about, sections), flush=True)
        print(f"report: {output / 'report.md'}", flush=True)
    return sections


def _read(asked: Asked) -> tuple[list[type[Task[Any]]], Trained, dict[str, Any]]:
    chosen = choose(asked.tasks)
    options, left = take_options(chosen, asked.settings, data=asked.data, limit=asked.limit)
    trained = read_trained(asked.model, left)
    size = trained.config.memory.group_size
    if world_size() % size:
        raise ConfigError(
            [
                f"memory.group_size does not divide the number of ranks; got: {size} and {world_size()}; "
                "do: add --memory.group_size 1, or start another number of ranks"
            ]
        )
    return chosen, trained, options


def _given(asked: Asked, trained: Trained) -> Given:
    path = asked.backbone or trained.config.backbone.path
    config = read_backbone_config(path)
    check_weights(path, config)
    longest = longest_window(config.get_text_config(), trained.config.evaluation.backbone_window_tokens)
    return Given(load_tokenizer(path), trained.config, longest)


def _about(trained: Trained, task: Task[Any]) -> dict[str, Any]:
    """What must be the same for an evaluation to go on; how many items are scored need not."""
    config = trained.config
    return {
        "weights": trained.sha256,
        "backbone": trained.backbone,
        "memory": config.memory.model_dump(mode="json", exclude={"group_size", "search", "query_block_tokens"}),
        "context_tokens": config.backbone.context_tokens,
        "segment_tokens": config.train.segment_tokens,
        "longest_window": task.given.longest,
        "options": task.options.model_dump(mode="json", exclude={"limit"}),
    }
