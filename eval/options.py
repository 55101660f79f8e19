"""What tasks can be asked: `--TASK.KEY VALUE`; other `--SECTION.KEY VALUE` are settings of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_origin

import yaml
from pydantic import ValidationError

from eval.task import Task, TaskOptions
from eval.tasks import all_tasks, task_named
from pipeline.errors import ConfigError


def choose(names: str) -> list[type[Task[Any]]]:
    """The tasks that `--task` names; `all`: all. Raises ConfigError: there is none of a name."""
    if names == "all":
        return list(all_tasks().values())
    return [task_named(name.strip()) for name in dict.fromkeys(names.split(","))]


def take_options(
    tasks: Sequence[type[Task[Any]]], rest: Sequence[str], *, data: Sequence[str], limit: str | None
) -> tuple[dict[str, TaskOptions], list[str]]:
    """Takes the options of tasks from a command line.

    Args:
        tasks: The tasks.
        rest: `--section.key value` or `--section.key=value`, of tasks and of the run; `--key` alone where only one of
            the tasks has such an option.
        data: `PATH` for the only task that has data, `TASK=PATH` otherwise.
        limit: A number of items, `small`, or None.

    Returns:
        The options by task, and the arguments that are settings of the run.

    Raises:
        ConfigError: Something is wrong; names all problems.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {task.name: dict(task.small) if limit == "small" else {} for task in tasks}
    if limit is not None and limit != "small":
        for of_task in values.values():
            of_task["limit"] = _value(limit)
    for name, paths in _data(tasks, data, problems).items():
        values[name]["data"] = paths
    left: list[str] = []
    arguments = list(rest)
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.partition("=")
        section, _, key = name.removeprefix("--").partition(".")
        if section in values and argument.startswith("--"):
            if not equals:
                value = arguments.pop(0) if arguments else ""
            values[section][key.replace("-", "_")] = _value(value)
        elif argument.startswith("--") and not key and len(owners := _owners(tasks, section)) == 1:
            if not equals:
                value = arguments.pop(0) if arguments else ""
            values[owners[0]][section.replace("-", "_")] = _value(value)
        elif section in all_tasks():
            problems.append(f"{name} is an option of a task that is not evaluated; do: add {section} to --task")
        else:
            left.append(argument)
    options = {task.name: _validated(task, values[task.name], problems) for task in tasks}
    if problems:
        raise ConfigError(problems, source="command line")
    return {name: one for name, one in options.items() if one is not None}, left


def help_text() -> str:
    """All tasks with their options."""
    lines = []
    for name, task in all_tasks().items():
        lines.append(f"{name}: {(task.__doc__ or '').strip().splitlines()[0]}")
        for key, field in task.options_class.model_fields.items():
            lines.append(
                f"  --{name}.{key} (default {field.default})\n      {' '.join((field.description or '').split())}"
            )
    lines.append(
        "\nSettings of the run, such as --memory.tokens or --memory.group_size, are laid over the model's own."
    )
    return "\n".join(lines) + "\n"


def _data(tasks: Sequence[type[Task[Any]]], data: Sequence[str], problems: list[str]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    names = [task.name for task in tasks]
    for one in data:
        name, equals, path = one.partition("=")
        if equals and name in all_tasks():
            if name in names:
                found[name] = (*found.get(name, ()), path)
            continue
        if len(names) == 1:
            found[names[0]] = (*found.get(names[0], ()), one)
        else:
            problems.append(f"--data {one[:200]} is of no task; expected: TASK=PATH; do: say whose data it is")
    return found


def _owners(tasks: Sequence[type[Task[Any]]], key: str) -> list[str]:
    """The tasks that alone may be asked with `--KEY`, without their name: those that have such an option."""
    return [task.name for task in tasks if key.replace("-", "_") in task.options_class.model_fields]


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _as_tuple(value: Any) -> Any:
    """Several values: with commas between them, in YAML's brackets, or only one."""
    if isinstance(value, str):
        value = [_value(one) for one in value.split(",")]
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _validated(task: type[Task[Any]], values: Mapping[str, Any], problems: list[str]) -> TaskOptions | None:
    fields = task.options_class.model_fields
    listed = {name for name, field in fields.items() if get_origin(field.annotation) is tuple}
    try:
        return task.options_class.model_validate(
            {name: _as_tuple(value) if name in listed else value for name, value in values.items()}
        )
    except ValidationError as error:
        for one in error.errors():
            key = ".".join(str(part) for part in one["loc"])
            problems.append(
                f"--{task.name}.{key}: {one['msg']}; got: {str(one['input'])[:100]}; do: see launch/evaluate.py --help"
            )
        return None
