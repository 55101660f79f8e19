"""What SQuAD says: exact match and F1 by condition and number of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.controls import Comparison, compare
from eval.report import Lines, Section, Table
from eval.scorer import BACKBONE, CONDITIONS, LABELS, LONGEST_WINDOW, MEMORY_ON, OTHER_MEMORY, WINDOW_ONLY
from eval.squad_file import exact_match, f1
from eval.task import Scores

FIGURES: Mapping[str, Callable[[str, Sequence[str]], float]] = {"exact match": exact_match, "F1": f1}
AS_WITHOUT: Mapping[str, str] = {OTHER_MEMORY: MEMORY_ON, WINDOW_ONLY: MEMORY_ON, LONGEST_WINDOW: BACKBONE}
"""What a condition is the same as where nothing is in memory."""
RULE = (
    "Answers are what the model writes, the likeliest token at a time, up to the first new line or {answer_tokens} "
    "tokens. They are compared as the official script does: lower case, no ASCII punctuation, no articles, one space "
    "between words; exact match and F1 over words with the right answer where it is highest; a question without answer "
    "is rightly answered with nothing, and no threshold for that is searched. Percent of questions; 95 % intervals by "
    "bootstrap over questions, of which each has its mean over {num_seeds} draws of demonstrations. "
)
WHERE = {
    "window": "Passages stand before their questions; {window} demonstrations before that, the further ones in memory.",
    "memory": "The passage is in memory, before the further demonstrations there and the passages of the window's "
    "{window}: no window but the recent and the longest one sees it unless there is very little after it.",
}
APART = " Demonstrations are of passages kept apart from those that are asked about, a quarter of the only file."
LEFT_OUT = " Questions that have no answer were left out."


def squad_section(
    scores: Sequence[Scores],
    *,
    passage: str,
    window: int,
    answer_tokens: int,
    other: str,
    leaves_out: bool,
    has_passages_apart: bool,
) -> Section:
    """The report.

    Args:
        scores: Of all items.
        passage: Where passages were: `window` or `memory`.
        window: Demonstrations in the window.
        answer_tokens: Tokens written at most.
        other: What other memory was.
        leaves_out: Whether questions without answer were left out.
        has_passages_apart: Whether the demonstrations are of the same file.

    Returns:
        The section.
    """
    names = {**LABELS, OTHER_MEMORY: f"(d) memory of {other}"}
    num_seeds = len({one["seed"] for one in scores})
    rule = RULE.format(answer_tokens=answer_tokens, num_seeds=num_seeds).replace(
        "over 1 draws", "over one draw"
    ) + WHERE[passage].format(window=window)
    cells = {
        memory: [one for one in scores if one["memory"] == memory]
        for memory in dict.fromkeys(one["memory"] for one in scores)
    }
    found = {
        figure: {memory: _compared(parts, scored) for memory, parts in cells.items()}
        for figure, scored in FIGURES.items()
    }
    where = {memory: f"{memory:,} further demonstrations in memory" for memory in cells}
    tables = []
    for memory, parts in cells.items():
        tables += [
            found[figure][memory].table(
                f"{figure}, {where[memory]}", f"{figure}, %", form="{:.1f}", labels=names, note=_note(parts, passage)
            )
            for figure in FIGURES
        ]
        tables += _by_kind(parts, names, where[memory])
    there = {name for parts in cells.values() for one in parts for name in one["answers"]}
    missing = [f"{names[name]}: this model or its settings have none" for name in CONDITIONS if name not in there]
    if set(cells) == {0} and passage == "window":
        missing = ["(d) to (f): with nothing in memory they are the same as (c) or (a)"]
    return Section(
        "SQuAD: written answers",
        rule + LEFT_OUT * leaves_out + (APART if has_passages_apart else ""),
        tables,
        [_plot(figure, names, cells) for figure, cells in found.items() if len(cells) > 1],
        missing,
        {
            "passage": passage,
            "window_demonstrations": window,
            "by_memory_demonstrations": {
                str(memory): {
                    **{figure: found[figure][memory].to_dict() for figure in FIGURES},
                    "answerable": _kinds(parts),
                }
                for memory, parts in cells.items()
            },
        },
    )


def _percent(
    parts: Sequence[Scores], scored: Callable[[str, Sequence[str]], float], answerable: bool | None = None
) -> dict[str, list[float]]:
    """By condition, of each question: its mean over seeds; all questions, or those that have an answer or have none."""
    by_question: dict[str, dict[str, list[float]]] = {}
    for one in parts:
        for name, answers in one["answers"].items():
            for question, answer, references in zip(one["ids"], answers, one["references"], strict=True):
                if answerable is None or answerable == bool(references):
                    values = by_question.setdefault(name, {}).setdefault(question, [])
                    values.append(100 * scored(answer, references))
    return {name: [float(np.mean(values)) for values in of.values()] for name, of in by_question.items()}


def _compared(parts: Sequence[Scores], scored: Callable[[str, Sequence[str]], float]) -> Comparison:
    return compare(_percent(parts, scored))


def _kinds(parts: Sequence[Scores]) -> dict[str, Any]:
    """Means of questions that have an answer, and of those that have none."""
    found: dict[str, Any] = {}
    for kind, answerable in (("yes", True), ("no", False)):
        values = {figure: _percent(parts, scored, answerable) for figure, scored in FIGURES.items()}
        found[kind] = {figure: {name: float(np.mean(one)) for name, one in of.items()} for figure, of in values.items()}
        found[kind]["questions"] = max((len(one) for of in values.values() for one in of.values()), default=0)
    return found


def _by_kind(parts: Sequence[Scores], names: Mapping[str, str], where: str) -> list[Table]:
    """A table of questions with and without answer, if there are both."""
    kinds = _kinds(parts)
    if not kinds["no"]["questions"] or not kinds["yes"]["questions"]:
        return []
    rows = [
        [names[name]]
        + [f"{kinds[kind][figure][name]:.1f}" for kind, figure in (("yes", "exact match"), ("yes", "F1"), ("no", "F1"))]
        for name in kinds["yes"]["F1"]
    ]
    counts = [f"{kinds[kind]['questions']} questions" for kind in ("yes", "no")]
    columns = [
        "condition",
        f"exact match, %, of {counts[0]} with an answer",
        "F1, %, of these",
        f"%, of {counts[1]} without one",
    ]
    return [Table(f"With and without an answer, {where}", columns, rows)]


def _note(parts: Sequence[Scores], passage: str) -> str:
    """What was in memory, and what is no longer."""
    tokens, forgotten = (np.mean([one[key] for one in parts]) for key in ("memory_tokens", "forgotten"))
    if not tokens:
        return "With nothing in memory (d) and (e) are (c), and (f) is (a)."
    text = f"{tokens:,.0f} tokens in memory, with what fills whole segments"
    if not forgotten:
        return f"{text}."
    what = "what fills up, and then the passage" if passage == "memory" else "the oldest demonstrations"
    return f"{text}, which has no room for the first {forgotten:,.0f}: {what}."


def _plot(figure: str, names: Mapping[str, str], cells: Mapping[int, Comparison]) -> Lines:
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for condition in dict.fromkeys(name for cell in cells.values() for name in cell.means):
        values = []
        for cell in cells.values():
            mean = cell.means.get(condition) or cell.means.get(AS_WITHOUT.get(condition, condition))
            values.append(float("nan") if mean is None else mean.mean)
        lines[names[condition]] = list(cells), values
    return Lines(
        figure.replace(" ", "-").lower(),
        f"SQuAD: {figure}",
        "further demonstrations in memory",
        f"{figure}, %",
        lines,
    )
