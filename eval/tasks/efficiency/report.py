"""What efficiency says: tokens a second, peak memory, and how both grow with the length of a text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import Lines, Section, Table
from eval.tasks.efficiency.cost import Cost, exponent, slope

FULL, LONGMEM = "full_attention", "longmem"
LABELS = {FULL: "backbone, full attention", LONGMEM: "LongMem"}
FORWARD, TRAINING = "forward", "training"
MODES = {FORWARD: "Reading a text (forward)", TRAINING: "Training on a text (forward and backward)"}


def efficiency_section(rounds: Sequence[Mapping[str, Any]], rule: str, device: str, ranks: int) -> Section:
    """Tables, plots and figures.

    Args:
        rounds: Of each round, by mode, system and length: the fields of a `Cost`, or `left_out` with the reason.
        rule: What was measured.
        device: On what.
        ranks: On how many ranks.

    Returns:
        The section.
    """
    tables: list[Table] = []
    plots: list[Lines] = []
    missing: list[str] = []
    growth: list[list[str]] = []
    figures: dict[str, Any] = {"device": device, "ranks": ranks, "rounds": len(rounds)}
    for mode in rounds[0]:
        systems = {system: _over_rounds([one[mode][system] for one in rounds]) for system in LABELS}
        tables.append(_table(MODES[mode], systems))
        plots += _plots(mode, systems)
        figures[mode] = {system: _figures(costs) for system, costs in systems.items()}
        growth += [_growth(f"{LABELS[system]}, {mode}", figures[mode][system]) for system in systems]
        for system, label in LABELS.items():
            for length, one in rounds[0][mode][system].items():
                if "left_out" in one:
                    missing.append(f"{label}, {mode}, {int(length):,} tokens: {one['left_out']}")
    columns = ["what", "seconds grow with length to the power", "a token costs, us", "more for each 1,000 tokens, us"]
    note = (
        "Least squares over lengths: of logarithms, and of seconds a token. What a token costs: in the shortest text."
    )
    tables.append(Table("How cost grows with the length of a text", columns, growth, note))
    if TRAINING not in rounds[0]:
        missing.append("training: a backbone that is split over ranks cannot be trained")
    return Section("Efficiency", rule, tables, plots, missing, figures)


def _over_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[int, list[Cost]]:
    """The costs of all rounds, by length; a length that a round has left out has fewer."""
    found: dict[int, list[Cost]] = {}
    for one in rounds:
        for length, cost in one.items():
            found.setdefault(int(length), [])
            if "left_out" not in cost:
                found[int(length)].append(Cost(**cost))
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _speeds(length: int, costs: Sequence[Cost]) -> list[float]:
    return [length / cost.seconds for cost in costs]


def _table(title: str, systems: Mapping[str, Mapping[int, Sequence[Cost]]]) -> Table:
    rows = []
    for length in systems[FULL]:
        costs = {system: by_length[length] for system, by_length in systems.items()}
        speeds = {system: _speeds(length, one) for system, one in costs.items()}
        ratio = "-"
        if all(speeds.values()):
            ratio = f"{statistics.median(speeds[LONGMEM]) / statistics.median(speeds[FULL]):.2f}"
        row = [f"{length:,}", *(_range(speeds[system]) for system in LABELS), ratio]
        for system in LABELS:
            peak, grown = (
                _median([getattr(one, name) for one in costs[system]]) for name in ("peak_bytes", "grown_bytes")
            )
            row.append("-" if peak is None or grown is None else f"{peak / 2**20:,.0f} (+{grown / 2**20:,.0f})")
        rows.append(row)
    columns = ["tokens", *(f"{label}: tokens/s" for label in LABELS.values()), "times as fast"]
    columns += [f"{label}: peak MiB (beside what was there)" for label in LABELS.values()]
    return Table(title, columns, rows, "Medians, and in brackets the slowest and the fastest round; - where left out.")


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    median = f"{statistics.median(values):,.0f}"
    return median if len(values) == 1 else f"{median} [{min(values):,.0f}, {max(values):,.0f}]"


def _figures(by_length: Mapping[int, Sequence[Cost]]) -> dict[str, Any]:
    measured = {length: costs for length, costs in by_length.items() if costs}
    seconds = {length: statistics.median(cost.seconds for cost in costs) for length, costs in measured.items()}
    return {
        "tokens_per_second": {length: length / one for length, one in seconds.items()},
        "seconds": seconds,
        "peak_bytes": {length: _median([one.peak_bytes for one in costs]) for length, costs in measured.items()},
        "grown_bytes": {length: _median([one.grown_bytes for one in costs]) for length, costs in measured.items()},
        "exponent": exponent(list(seconds), list(seconds.values())),
        "seconds_per_token_per_token": slope(list(seconds), list(seconds.values())),
    }


def _growth(label: str, figures: Mapping[str, Any]) -> list[str]:
    if figures["exponent"] is None:
        return [label, "-", "-", "-"]
    length, seconds = next(iter(figures["seconds"].items()))
    more = figures["seconds_per_token_per_token"] * 1e9
    return [label, f"{figures['exponent']:.2f}", f"{seconds / length * 1e6:,.1f}", f"{more:+,.2f}"]


def _plots(mode: str, systems: Mapping[str, Mapping[int, Sequence[Cost]]]) -> list[Lines]:
    speeds, peaks = {}, {}
    for system, by_length in systems.items():
        figures = _figures(by_length)
        speeds[LABELS[system]] = [*figures["tokens_per_second"]], [*figures["tokens_per_second"].values()]
        known = {length: one / 2**20 for length, one in figures["peak_bytes"].items() if one is not None}
        peaks[LABELS[system]] = [*known], [*known.values()]
    title = MODES[mode]
    return [
        Lines(f"speed-{mode}", f"{title}: speed", "tokens of the text", "tokens/s", speeds, log_x=True),
        Lines(f"memory-{mode}", f"{title}: memory", "tokens of the text", "peak memory, MiB", peaks, log_x=True),
    ]
