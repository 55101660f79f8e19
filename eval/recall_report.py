"""What recall says: passkeys found by length and depth, and losses of passages by distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval.controls import compare, missing
from eval.passkey import LARGEST_KEY, MAX_TOKENS
from eval.report import Heat, Lines, Section, Table
from eval.scorer import LABELS, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON
from eval.statistics import interval
from eval.task import Scores

HEATS = (MEMORY_ON, MEMORY_OFF, LONGEST_WINDOW)


def recall_section(asked: Sequence[Scores], again: Sequence[Scores], *, memory_tokens: int, longest: int) -> Section:
    """Tables, plots and figures.

    Args:
        asked: Of each passkey text: `length`, `depth`, `key`, `forgotten` (tokens at its beginning that memory has no
            room for), `key_is_forgotten`, and by condition `answers`; may be none.
        again: Of each passage: `source`, `num_tokens` scored, mean loss by condition in `first`, by distance and
            condition in `again`; may be none.
        memory_tokens: What memory holds.
        longest: Tokens of the longest ordinary window.

    Returns:
        The section.
    """
    tables: list[Table] = []
    plots: list[Heat | Lines] = []
    rules: list[str] = []
    figures: dict[str, Any] = {}
    there: set[str] = set()
    if asked:
        there |= set(asked[0]["answers"])
        rules += _passkey_rules(asked, memory_tokens)
        tables += _passkey_tables(asked)
        plots += _heats(asked)
        figures["passkey"] = _passkey_figures(asked)
    if again:
        there |= set(again[0]["first"])
        rules += _again_rules(again, memory_tokens)
        tables += _again_tables(again)
        plots.append(_again_plot(again))
        figures["read_again"] = _again_figures(again)
    if LONGEST_WINDOW in there:
        rules.append(f"The longest window is one of {longest:,} tokens.")
    return Section("Recall", " ".join(rules), tables, plots, missing(there), figures)


def _passkey_rules(asked: Sequence[Scores], memory_tokens: int) -> list[str]:
    rules = [
        f"Passkey: {len(asked)} texts; right where the first integer in {MAX_TOKENS} tokens, written greedily, is the "
        f"key, one of 1 to {LARGEST_KEY:,} (chance {1 / LARGEST_KEY:.3%}). Units of intervals are texts."
    ]
    for (length,), texts in _by(asked, "length").items():
        if texts[0]["forgotten"]:
            gone = sorted({text["depth"] for text in texts if text["key_is_forgotten"]})
            depths = ", ".join(f"{depth:g}" for depth in gone)
            what = f"the keys at depths {depths}" if gone else "no key among them"
            rules.append(
                f"Of {length:,} tokens memory, which holds {memory_tokens:,}, has forgotten the first "
                f"{texts[0]['forgotten']:,}: {what}."
            )
    return rules


def _again_rules(again: Sequence[Scores], memory_tokens: int) -> list[str]:
    rules = [
        f"Read again: {len(again)} passages from {again[0]['source']}; mean loss of the same "
        f"{again[0]['num_tokens']:,} tokens in both readings. Units of intervals are passages."
    ]
    beyond = [f"{int(distance):,}" for distance in again[0]["again"] if int(distance) > memory_tokens]
    if beyond:
        rules.append(
            f"At distances of {', '.join(beyond)} memory, which holds {memory_tokens:,} tokens, has forgotten some or "
            "all of the first reading."
        )
    return rules


def _right(asked: Sequence[Scores]) -> dict[str, list[float]]:
    """By condition, of each text whether it was answered rightly."""
    return {name: [float(one["answers"][name] == one["key"]) for one in asked] for name in asked[0]["answers"]}


def _by(asked: Sequence[Scores], *what: str) -> dict[tuple[Any, ...], list[Scores]]:
    found: dict[tuple[Any, ...], list[Scores]] = {}
    for one in asked:
        found.setdefault(tuple(one[key] for key in what), []).append(one)
    return found


def _passkey_tables(asked: Sequence[Scores]) -> list[Table]:
    tables = [compare(_right(asked)).table("Passkeys of all lengths and depths", "found", form="{:.1%}")]
    rows = []
    for (length,), texts in _by(asked, "length").items():
        right = _right(texts)
        rows.append([f"{length:,}", *(interval(values).text("{:.0%}") for values in right.values()), str(len(texts))])
    columns = ["tokens", *(LABELS[name] for name in asked[0]["answers"]), "texts"]
    return [*tables, Table("Passkeys found by length [95 % interval]", columns, rows)]


def _passkey_figures(asked: Sequence[Scores]) -> dict[str, Any]:
    return {
        "all": compare(_right(asked)).to_dict(),
        "by_length": {
            str(length): compare(_right(texts)).to_dict() for (length,), texts in _by(asked, "length").items()
        },
        "by_length_and_depth": {
            str(length): {
                f"{depth:g}": {name: asdict(interval(values)) for name, values in _right(texts).items()}
                for (_, depth), texts in _by(of_length, "length", "depth").items()
            }
            for (length,), of_length in _by(asked, "length").items()
        },
    }


def _heats(asked: Sequence[Scores]) -> list[Heat]:
    cells, lengths = _by(asked, "length", "depth"), list(dict.fromkeys(one["length"] for one in asked))
    depths = sorted({one["depth"] for one in asked})
    return [
        Heat(
            f"passkey-{name}",
            f"Passkeys found, {LABELS[name]}",
            "tokens of the text",
            "where the key stands (0: beginning)",
            [f"{length:,}" for length in lengths],
            [f"{depth:g}" for depth in depths],
            [
                [
                    float(np.mean(_right(cells[length, depth])[name])) if (length, depth) in cells else None
                    for length in lengths
                ]
                for depth in depths
            ],
            lowest=0.0,
            highest=1.0,
        )
        for name in HEATS
        if name in asked[0]["answers"]
    ]


def _losses(again: Sequence[Scores], distance: str | None) -> dict[str, list[float]]:
    """By condition, of each passage the mean loss of its second reading at a distance, of its first where None."""
    conditions = again[0]["first"]
    return {
        name: [(one["first"] if distance is None else one["again"][distance])[name] for one in again]
        for name in conditions
    }


def _again_tables(again: Sequence[Scores]) -> list[Table]:
    first = _losses(again, None)
    columns = ["distance, tokens", *(LABELS[name] for name in first)]
    rows = [["first reading", *(interval(values).text() for values in first.values())]]
    changes, against = [], []
    for distance in again[0]["again"]:
        losses = _losses(again, distance)
        label = f"{int(distance):,}"
        rows.append([label, *(interval(values).text() for values in losses.values())])
        changes.append([label, *(interval(np.subtract(losses[name], first[name])).text("{:+.3f}") for name in first)])
        differences = compare(losses).differences
        against.append([label, *(differences[name].text("{:+.3f}") if name in differences else "-" for name in first)])
    note = f"{len(again)} passages; nats a token [95 % interval]."
    tables = [
        Table("A passage read again: loss", columns, rows, note),
        Table("Second reading minus first, paired", columns, changes, note),
    ]
    if MEMORY_ON in first:
        tables.append(Table("Second reading: memory on minus this, paired", columns, against, note))
    return tables


def _again_figures(again: Sequence[Scores]) -> dict[str, Any]:
    first = _losses(again, None)
    return {
        "source": again[0]["source"],
        "first": compare(first).to_dict(),
        "again": {distance: compare(_losses(again, distance)).to_dict() for distance in again[0]["again"]},
        "again_minus_first": {
            distance: {
                name: asdict(interval(np.subtract(values, first[name])))
                for name, values in _losses(again, distance).items()
            }
            for distance in again[0]["again"]
        },
    }


def _again_plot(again: Sequence[Scores]) -> Lines:
    distances = sorted(again[0]["again"], key=int)
    first = _losses(again, None)
    base = MEMORY_ON if MEMORY_ON in first else next(iter(first))
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        LABELS[name]: (
            [int(distance) for distance in distances],
            [float(np.mean(_losses(again, distance)[name])) for distance in distances],
        )
        for name in first
    }
    lines[f"first reading, {LABELS[base]}"] = (
        [int(distances[0]), int(distances[-1])],
        [float(np.mean(first[base]))] * 2,
    )
    return Lines("read_again", "A passage read again", "distance, tokens", "loss, nats a token", lines, log_x=True)
