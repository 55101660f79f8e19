"""What an evaluation says: sections of tables and plots, written as JSON, Markdown and PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import write_text

SECTION_MARKDOWN, SECTION_JSON = "section.md", "section.json"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        columns: Heads of its columns.
        rows: Cells, as they are printed.
        note: What a reader must know to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """A plot of lines.

    Attributes:
        name: Of its file.
        title: Above it.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        lines: Label to places and values.
        log_x: Whether the horizontal axis is logarithmic, to base 2.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log_x: bool = False


@dataclass(frozen=True)
class Heat:
    """A heat map.

    Attributes:
        name: Of its file.
        title: Above it.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        columns: Labels of its columns.
        rows: Labels of its rows.
        values: `[rows][columns]`; None where nothing was measured.
        lowest: Value of the darkest colour; None: the smallest.
        highest: Value of the lightest; None: the largest.
    """

    name: str
    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    lowest: float | None = None
    highest: float | None = None


@dataclass(frozen=True)
class Section:
    """What one task says.

    Attributes:
        title: Its head.
        rule: How an item is scored, and what the units of the intervals are.
        tables: Its tables.
        plots: Its plots.
        missing: Controls that a table lacks, and why.
        figures: The numbers behind the tables, plain JSON.
    """

    title: str
    rule: str
    tables: Sequence[Table] = ()
    plots: Sequence[Lines | Heat] = ()
    missing: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    sections: Mapping[str, Section],
    scores: Mapping[str, Any],
    *,
    others: Sequence[str] = (),
) -> None:
    """Writes `report.json`, `report.md` and the plots.

    Args:
        folder: Where; has a folder for each task.
        about: What was evaluated: names and texts.
        sections: By task.
        scores: By task, every item's.
        others: Tasks of the same model that were reported here before, and stay in the report.
    """
    for name, section in sections.items():
        content = {
            "rule": section.rule,
            "missing": list(section.missing),
            "figures": section.figures,
            "items": scores.get(name, {}),
        }
        for plot in section.plots:
            draw(plot, folder / f"{name}-{plot.name}.png")
        write_text(folder / name / SECTION_MARKDOWN, section_markdown(name, section))
        write_text(folder / name / SECTION_JSON, json.dumps(plain(content), indent=1) + "\n")
    names = sorted({*sections, *others})
    tasks = {name: json.loads((folder / name / SECTION_JSON).read_text(encoding="utf-8")) for name in names}
    write_text(folder / "report.json", json.dumps({"about": plain(about), "tasks": tasks}, indent=1) + "\n")
    parts = [(folder / name / SECTION_MARKDOWN).read_text(encoding="utf-8") for name in names]
    write_text(folder / "report.md", "".join([head_markdown(about), *parts]))


def markdown(about: Mapping[str, Any], sections: Mapping[str, Section]) -> str:
    """The report as Markdown."""
    return "".join([head_markdown(about), *(section_markdown(name, section) for name, section in sections.items())])


def head_markdown(about: Mapping[str, Any]) -> str:
    """The beginning of a report."""
    return "\n".join(["# Evaluation", "", *(f"- {name}: {value}" for name, value in about.items())]) + "\n"


def section_markdown(name: str, section: Section) -> str:
    """What one task says, as Markdown."""
    lines = ["", f"## {section.title}", "", section.rule]
    for table in section.tables:
        block = [list(table.columns), *(list(row) for row in table.rows)]
        lines += ["", f"**{table.title}**", "", *aligned([block], markdown=True)]
        lines += ["", table.note] if table.note else []
    lines += ["", *(f"- not there: {control}" for control in section.missing)] if section.missing else []
    for plot in section.plots:
        lines += ["", f"![{plot.title}]({name}-{plot.name}.png)"]
    return "\n".join(lines) + "\n"


def draw(plot: Lines | Heat, path: Path) -> None:
    """Draws a plot into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    if isinstance(plot, Lines):
        for number, (label, (places, values)) in enumerate(plot.lines.items()):
            axes.plot(places, values, label=label, marker="osD^vP*X"[number % 8], markersize=4)
        if plot.log_x:
            ticks = sorted({place for places, _ in plot.lines.values() for place in places})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # never over the lines
    else:
        numbers = np.array([[np.nan if value is None else value for value in row] for row in plot.values])
        image = axes.imshow(numbers, aspect="auto", cmap="viridis", vmin=plot.lowest, vmax=plot.highest)
        axes.set_xticks(range(len(plot.columns)), plot.columns)
        axes.set_yticks(range(len(plot.rows)), plot.rows)
        for (row, column), value in np.ndenumerate(numbers):
            if np.isfinite(value):
                shade = float(np.asarray(image.norm(value)))
                axes.text(
                    column,
                    row,
                    f"{value:.3g}",
                    ha="center",
                    va="center",
                    color="black" if shade > 0.6 else "white",
                )
        figure.colorbar(image)
    figure.savefig(path, dpi=110)


def plain(value: Any) -> Any:
    """As JSON can hold it: a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aligned(blocks: Sequence[Sequence[Sequence[str]]], *, markdown: bool) -> list[str]:
    """Blocks of rows as text, the first row of each its head; columns are equally wide in all blocks."""
    widths = [max(len(row[column]) for block in blocks for row in block) for column in range(len(blocks[0][0]))]
    return [_aligned(block, widths, markdown=markdown) for block in blocks]


def _aligned(block: Sequence[Sequence[str]], widths: Sequence[int], *, markdown: bool) -> str:
    lines = []
    for row in block:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    rule = ["-" * width for width in widths]
    if markdown:
        rule = [rule[0], *(f"{line[:-1]}:" for line in rule[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))
    return "\n".join(lines)
