"""How a step is split over ranks."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from pipeline.config.schema import Config
from pipeline.config.world import WorldSplit, check_world
from pipeline.errors import ConfigError

Make = Callable[..., Config]


def with_group_size(config: Config, group_size: int) -> Config:
    """Go round the check that refuses groups of several ranks: the arithmetic is there already."""
    return config.model_copy(update={"memory": config.memory.model_copy(update={"group_size": group_size})})


def test_lanes_are_split_over_groups_and_segments_over_ranks(make: Make) -> None:
    config = make("--data.lanes=12", "--train.segments_per_step=6")
    assert check_world(config, 1) == WorldSplit(1, num_groups=1, lanes_per_group=12, accumulation_steps=6)
    assert check_world(config, 4) == WorldSplit(4, num_groups=4, lanes_per_group=3, accumulation_steps=6)
    grouped = with_group_size(config, 2)
    assert check_world(grouped, 4) == WorldSplit(4, num_groups=2, lanes_per_group=6, accumulation_steps=3)


@pytest.mark.parametrize(
    ("group_size", "world_size", "message"),
    [
        (1, 3, "data.lanes is not a multiple of the number of memory groups; got: 4 lanes and 3 groups "
         "(3 ranks / memory.group_size 1); do: set data.lanes to 6"),
        (1, 8, "do: set data.lanes to 8"),
        (2, 3, "memory.group_size does not divide the world size; got: 2 and 3 ranks"),
        (3, 3, "train.segments_per_step is not a multiple of memory.group_size; got: 2 and 3"),
    ],
)  # fmt: skip
def test_a_world_that_does_not_fit(make: Make, group_size: int, world_size: int, message: str) -> None:
    config = with_group_size(make("--data.lanes=4", "--train.segments_per_step=2"), group_size)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_world(config, world_size)
