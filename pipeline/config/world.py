"""How an optimizer step, and an evaluation, are split over the ranks of a job."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.errors import ConfigError

PAIRS_AT_ONCE = 2
"""Pairs of held-out documents that a memory group reads at once: more would make its bank larger and no step much
faster."""


@dataclass(frozen=True)
class WorldSplit:
    """The share of each rank.

    Attributes:
        world_size: Ranks of the job.
        num_groups: Memory groups.
        lanes_per_group: Lanes that each group, and so each of its ranks, reads: the micro batch.
        accumulation_steps: Segments of each lane that one rank reads in one optimizer step.
    """

    world_size: int
    num_groups: int
    lanes_per_group: int
    accumulation_steps: int


def check_world(config: Config, world_size: int) -> WorldSplit:
    """Split lanes over memory groups, and the segments of a step over the ranks of a group.

    Args:
        config: The settings.
        world_size: Ranks of the job.

    Returns:
        The split.

    Raises:
        ConfigError: The world size does not fit; names all numbers.
    """
    group_size, lanes, segments = config.memory.group_size, config.data.lanes, config.train.segments_per_step
    problems = []
    if segments % group_size:
        problems.append(
            f"train.segments_per_step is not a multiple of memory.group_size; got: {segments} and {group_size}; "
            "do: change one of them"
        )
    if world_size % group_size:
        problems.append(
            f"memory.group_size does not divide the world size; got: {group_size} and {world_size} ranks; "
            "do: start another number of ranks, or change memory.group_size"
        )
    num_groups = max(1, world_size // group_size)
    if lanes % num_groups:
        problems.append(
            f"data.lanes is not a multiple of the number of memory groups; got: {lanes} lanes and {num_groups} "
            f"groups ({world_size} ranks / memory.group_size {group_size}); "
            f"do: set data.lanes to {-(-lanes // num_groups) * num_groups}, or start another number of ranks"
        )
    if problems:
        raise ConfigError(problems, source=f"configuration with {world_size} ranks")
    return WorldSplit(world_size, num_groups, lanes // num_groups, segments // group_size)


def held_out_lanes(num_documents: int, *, num_groups: int) -> int:
    """Lanes of a memory group's bank in an evaluation.

    Args:
        num_documents: Held-out documents, which are dealt to the groups in pairs.
        num_groups: Memory groups.

    Returns:
        Documents that a group reads at once, each in a lane of its own.
    """
    pairs = -(-num_documents // 2)
    return min(num_documents, 2) * min(PAIRS_AT_ONCE, -(-pairs // num_groups))
