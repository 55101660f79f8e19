"""The benchmarks, one file each: a class derived from `eval.task.Task` in a file here is found by its `name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from eval.task import Task
from pipeline.errors import ConfigError


def all_tasks() -> Mapping[str, type[Task[Any]]]:
    """All tasks by name, in order of their names."""
    found: dict[str, type[Task[Any]]] = {}
    for module in pkgutil.iter_modules(__path__):
        for _, member in inspect.getmembers(importlib.import_module(f"{__name__}.{module.name}"), inspect.isclass):
            if issubclass(member, Task) and not inspect.isabstract(member) and hasattr(member, "name"):
                found[member.name] = member
    return dict(sorted(found.items()))


def task_named(name: str) -> type[Task[Any]]:
    """A task's class. Raises ConfigError: there is none of that name."""
    tasks = all_tasks()
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=1)
        meant = f"did you mean {near[0]}?" if near else "name one of these"
        raise ConfigError(
            [f"there is no task {name[:100]!r}; expected: {', '.join(tasks)} or all; do: {meant}"], source="--task"
        )
    return tasks[name]
