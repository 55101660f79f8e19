"""A plan in words: tables to read in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.planning.part import ALWAYS, Part
from pipeline.planning.plan import Plan

GIB = 2**30
USABLE = 0.9
"""Share of an accelerator that a plan may fill: the rest is for its context, NCCL and fragments."""


def in_words(num_bytes: int) -> str:
    """A number of bytes to read.

    Args:
        num_bytes: The number.

    Returns:
        Three digits or so, with a unit.
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return (
                f"{num_bytes / size:,.{0 if num_bytes >= 100 * size else 1 if num_bytes >= 10 * size else 2}f} {unit}"
            )
    return f"{num_bytes} B"


def plan_text(plan: Plan, *, gpus_per_node: int, gpu_memory_gib: float | None) -> str:
    """Writes a plan.

    Args:
        plan: The plan.
        gpus_per_node: Ranks of a machine.
        gpu_memory_gib: Memory of an accelerator; None: not known.

    Returns:
        Several lines.
    """
    split = plan.split
    group_size = split.world_size // split.num_groups
    lines = [
        f"{split.world_size} rank(s), {gpus_per_node} a node; {split.num_groups} memory group(s) of {group_size}; "
        f"{split.lanes_per_group} lane(s) a rank; {split.accumulation_steps} segment(s) of each a step",
        f"backbone {plan.backbone_parameters:,} parameters, SideNet {plan.sidenet_parameters:,}",
        "",
        "bytes per rank",
        *_table([("part", "bytes", "where", "when", "how"), *map(_row, filter(lambda p: p.num_bytes, plan.parts))]),
        "",
        *_totals(plan, gpus_per_node),
        "",
        *_traffic(plan),
    ]
    if group_size > 1 and gpus_per_node % group_size and split.world_size > gpus_per_node:
        lines.append("memory groups reach over nodes: their traffic does, too")
    return "\n".join([*lines, "", *verdict(plan, gpu_memory_gib=gpu_memory_gib)])


def verdict(plan: Plan, *, gpu_memory_gib: float | None) -> list[str]:
    """Says whether a plan fits, and what to change if it does not.

    Args:
        plan: The plan.
        gpu_memory_gib: Memory of an accelerator; None: not known.

    Returns:
        Lines.
    """
    largest = [part for part in plan.at(plan.fullest()) if part.remedy][:3]
    advice = [f"  {part.name}, {in_words(part.num_bytes)}: {part.remedy}" for part in largest]
    if gpu_memory_gib is None:
        return ["largest parts, and what makes them smaller:", *advice]
    room = int(gpu_memory_gib * GIB * USABLE)
    figures = f"{in_words(plan.peak())} of {gpu_memory_gib:g} GiB, of which {USABLE:.0%} can be used ({in_words(room)})"
    if plan.peak() <= room:
        return [f"fits: {figures}"]
    return [f"does not fit: {figures}; too much by {in_words(plan.peak() - room)}. Change one of:", *advice]


def _row(part: Part) -> tuple[str, ...]:
    when = "always" if part.phases == ALWAYS else ", ".join(part.phases)
    return part.name, in_words(part.num_bytes), part.place, when, part.how


def _totals(plan: Plan, gpus_per_node: int) -> list[str]:
    lines = [f"most at once on an accelerator: {in_words(plan.peak())} ({plan.fullest()})"]
    for place in ("host", "disk"):
        if plan.peak(place):
            each, node = in_words(plan.peak(place)), in_words(plan.peak(place) * gpus_per_node)
            lines.append(f"most at once on the {place}: {each} a rank, {node} a node")
    return lines


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["traffic: none"]
    rows = [
        (each.purpose, each.collective, str(each.ranks), in_words(each.num_bytes) + " at most" * each.at_most)
        for each in plan.traffic
    ]
    total = in_words(sum(each.num_bytes for each in plan.traffic))
    total += " at most" * any(each.at_most for each in plan.traffic)
    return [
        "bytes that a rank sends in a step",
        *_table([("purpose", "collective", "ranks", "bytes"), *rows, ("all", "", "", total)]),
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
