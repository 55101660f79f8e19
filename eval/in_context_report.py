"""What in-context learning says: accuracies by set, number of demonstrations and condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.controls import Comparison, compare
from eval.report import Lines, Section, Table
from eval.scorer import BACKBONE, CONDITIONS, LABELS, LONGEST_WINDOW, MEMORY_ON, OTHER_MEMORY, WINDOW_ONLY
from eval.task import Scores

SHUFFLED = "shuffled_labels"
NAMES: Mapping[str, str] = {
    **LABELS,
    OTHER_MEMORY: "(d) memory of another set's demonstrations",
    LONGEST_WINDOW: "(f) backbone alone, longest window: as many as fit",
    SHUFFLED: "(g) memory on, labels in memory shuffled",
}
AS_WITHOUT: Mapping[str, str] = {
    OTHER_MEMORY: MEMORY_ON,
    WINDOW_ONLY: MEMORY_ON,
    SHUFFLED: MEMORY_ON,
    LONGEST_WINDOW: BACKBONE,
}
"""What a condition is the same as where there is no demonstration in memory."""
AS_WITHOUT_NOTE = "0: with nothing in memory (d), (e) and (g) are (c), and (f) is (a)."
RULES = {
    "labels": "An item is right if its label is the likeliest of the set's labels after the prompt, by the sum of the "
    "log-probabilities of their tokens (not divided by their number); where m are equally likely it counts 1/m.",
    "prefix": "An item is right if the likeliest token after the prompt, without spaces, begins its label (the rule of "
    "the official code: any other word is wrong, and so is nothing).",
}


@dataclass(frozen=True)
class Cell:
    """The answers to the test items of a set after so many demonstrations.

    Attributes:
        parts: Scores of its items.
        right: By condition: how right each test item is, float64 `[seeds, items]`.
        comparison: Means over seeds, compared by test item.
        ties: Test items and seeds where the right label shares the first place, by condition.
    """

    parts: Sequence[Scores]
    right: Mapping[str, npt.NDArray[np.float64]]
    comparison: Comparison
    ties: Mapping[str, int]


def in_context_section(scores: Sequence[Scores], *, rule: str, longest: int) -> Section:
    """The report.

    Args:
        scores: Of all items.
        rule: How they were answered: `labels` or `prefix`.
        longest: Tokens of the backbone's longest window.

    Returns:
        The section.
    """
    cells: dict[tuple[str, int, int], Cell] = {}
    for key in dict.fromkeys((one["set"], one["window"], one["memory"]) for one in scores):
        cells[key] = _cell([one for one in scores if (one["set"], one["window"], one["memory"]) == key], rule)
    groups = {
        key: {memory: cell for (*group, memory), cell in cells.items() if tuple(group) == key}
        for key in dict.fromkeys((name, window) for name, window, _ in cells)
    }
    num_seeds = len({one["seed"] for one in scores})
    about = (
        f"{RULES[rule]} Accuracy is the mean over {num_seeds} seed{'s' * (num_seeds > 1)} (draws of demonstrations); "
        "intervals are 95 %, by bootstrap over test items, of which each has its mean over seeds; deviation is that of "
        "the seeds' accuracies (numpy.std, as the official code). Demonstrations are drawn at random, not balanced. "
        "The window holds its demonstrations and the sentence, under every condition. Before them come the newest of "
        "memory's: as many as the left context holds under (a) and (b), as that and the recent window under (c), (d), "
        "(e) and (g), as the longest window under (f)."
    )
    return Section(
        "In-context learning: labels of sentences",
        about,
        [_sets(cells), *(_table(*key, group, longest) for key, group in groups.items())],
        [plot for key, group in groups.items() if len(group) > 1 for plot in [_plot(*key, group)]],
        _missing(cells),
        {"rule": rule, "seeds": num_seeds, "accuracy": [_figures(*key, cell) for key, cell in cells.items()]},
    )


def how_right(answer: Any, gold: int, labels: Sequence[str]) -> tuple[float, bool]:
    """How right an answer is, and whether the right label shares the first place.

    Args:
        answer: Losses of the labels, or the first word that was written.
        gold: Number of the right label.
        labels: The labels.

    Returns:
        1, 0, or 1/m where the right label is one of m that are equally likely; and whether there are several.
    """
    if isinstance(answer, str):
        return float(answer != "" and labels[gold].startswith(answer)), False
    best = [number for number, loss in enumerate(answer) if loss == min(answer)]
    return (1 / len(best) if gold in best else 0.0), len(best) > 1 and gold in best


def _cell(parts: Sequence[Scores], rule: str) -> Cell:
    seeds = list(dict.fromkeys(one["seed"] for one in parts))
    right: dict[str, list[list[float]]] = {}
    ties: dict[str, int] = {}
    for seed in seeds:
        own = [one for one in parts if one["seed"] == seed]
        for name in own[0]["answers"]:
            found = [
                how_right(answer, gold, one["labels"])
                for one in own
                for answer, gold in zip(one["answers"][name], one["gold"], strict=True)
            ]
            right.setdefault(name, []).append([value for value, _ in found])
            ties[name] = ties.get(name, 0) + sum(is_tie for _, is_tie in found)
    arrays = {name: np.array(values) for name, values in right.items()}
    comparison = compare({name: values.mean(axis=0).tolist() for name, values in arrays.items()})
    return Cell(parts, arrays, comparison, {name: count for name, count in ties.items() if count})


def _first_seed(cell: Cell) -> list[Scores]:
    return [one for one in cell.parts if one["seed"] == cell.parts[0]["seed"]]


def _balance(cell: Cell) -> dict[str, float]:
    """Which part of the test items each label is."""
    gold = [number for one in _first_seed(cell) for number in one["gold"]]
    return {label: gold.count(number) / len(gold) for number, label in enumerate(cell.parts[0]["labels"])}


def _sets(cells: Mapping[tuple[str, int, int], Cell]) -> Table:
    rows = []
    for name in dict.fromkeys(key[0] for key in cells):
        cell = next(cell for key, cell in cells.items() if key[0] == name)
        balance, pool = _balance(cell), cell.parts[0]["pool"]
        rows.append(
            [
                name,
                f"{sum(len(one['gold']) for one in _first_seed(cell))} of {cell.parts[0]['split']}",
                ", ".join(f"{label} {part:.1%}" for label, part in balance.items()),
                f"{max(balance.values()):.3f}",
                f"{1 / len(balance):.3f}",
                f"{pool['size']:,}",
                f"{pool['repeated']:,} and {pool['tested']:,}",
            ]
        )
    columns = ["set", "test items", "their labels", "majority", "chance", "demonstrations", "left out"]
    note = (
        "majority: accuracy of always saying the most frequent label of these test items. left out: demonstrations "
        "that repeat another one, and those that are test items (by text, case and spaces aside)."
    )
    return Table("Sets", columns, rows, note)


def _table(name: str, window: int, group: Mapping[int, Cell], longest: int) -> Table:
    rows, notes = [], []
    for memory, cell in group.items():
        for condition, mean in cell.comparison.means.items():
            difference = cell.comparison.differences.get(condition)
            rows.append(
                [
                    f"{memory:,}",
                    NAMES[condition],
                    mean.text(),
                    f"{cell.right[condition].mean(axis=1).std():.3f}" if len(cell.right[condition]) > 1 else "-",
                    difference.text("{:+.3f}") if difference else "-",
                    str(mean.num_items),
                ]
            )
        notes.append(_held(memory, cell, longest) if memory else AS_WITHOUT_NOTE)
        if cell.ties:
            ties = ", ".join(f"{NAMES[one]} {count}" for one, count in cell.ties.items())
            notes.append(f"{memory:,}: the right label shares the first place: {ties}.")
    columns = ["in memory", "condition", "accuracy [95 %]", "deviation", "memory on minus this, paired [95 %]", "items"]
    return Table(f"{name}, {window} demonstrations in the window", columns, rows, " ".join(notes))


def _held(memory: int, cell: Cell, longest: int) -> str:
    """What has become of the demonstrations in memory."""
    keys = ("remembered", "memory_tokens", "within_memory", "within_longest")
    mean = {key: np.mean([one[key] for one in cell.parts]) for key in keys}
    text = f"{memory:,}: with what fills whole segments {mean['remembered']:,.0f}, {mean['memory_tokens']:,.0f} tokens"
    if MEMORY_ON in cell.right and mean["within_memory"] < mean["remembered"] - 1:  # the first one is cut
        text += f", of which memory has room for the newest {mean['within_memory']:,.0f}: the others are forgotten"
    if LONGEST_WINDOW in cell.right:
        text += f"; the longest window ({longest:,} tokens) holds {mean['within_longest']:,.0f}"
    return text + (f"; the other set is {cell.parts[0]['other']}." if OTHER_MEMORY in cell.right else ".")


def _plot(name: str, window: int, group: Mapping[int, Cell]) -> Lines:
    places = list(group)
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for condition in dict.fromkeys(one for cell in group.values() for one in cell.comparison.means):
        values = []
        for cell in group.values():
            means = cell.comparison.means
            found = means.get(condition) or means.get(AS_WITHOUT.get(condition, condition))
            values.append(float("nan") if found is None else found.mean)
        lines[NAMES[condition]] = places, values
    majority = max(_balance(next(iter(group.values()))).values())
    lines["majority of the test items"] = places, [majority] * len(places)
    return Lines(
        f"{name}-{window}",
        f"{name}, {window} demonstrations in the window",
        "further demonstrations in memory",
        "accuracy",
        lines,
    )


def _missing(cells: Mapping[tuple[str, int, int], Cell]) -> list[str]:
    """Conditions that no table has."""
    there = {condition for cell in cells.values() for condition in cell.right}
    if all(memory == 0 for _, _, memory in cells):
        return ["(d) to (g): without demonstrations in memory they are the same as (c) or (a)"]
    reasons = {OTHER_MEMORY: "only one set was read, or the model has no memory"}
    return [
        f"{NAMES[name]}: {reasons.get(name, 'this model or its settings have none')}"
        for name in (*CONDITIONS, SHUFFLED)
        if name not in there
    ]


def _figures(name: str, window: int, memory: int, cell: Cell) -> dict[str, Any]:
    balance = _balance(cell)
    return {
        "set": name,
        "window_demonstrations": window,
        "memory_demonstrations": memory,
        "labels": balance,
        "majority": max(balance.values()),
        "by_seed": {condition: values.mean(axis=1).tolist() for condition, values in cell.right.items()},
        "deviation": {condition: float(values.mean(axis=1).std()) for condition, values in cell.right.items()},
        "ties": cell.ties,
        **cell.comparison.to_dict(),
    }
