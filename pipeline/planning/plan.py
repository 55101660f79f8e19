"""What a run needs on every rank, worked out before anything runs: `docs/plan.md` says how, and how exact it is."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Config
from pipeline.config.world import WorldSplit, check_world
from pipeline.planning.evaluation import evaluation_parts
from pipeline.planning.part import ALWAYS, Part
from pipeline.planning.shapes import BackboneShape
from pipeline.planning.sizes import Sizes
from pipeline.planning.traffic import Traffic, engine_traffic, memory_traffic


@dataclass(frozen=True)
class Plan:
    """What one rank needs; all ranks need the same, but for padding.

    Attributes:
        parts: What takes memory.
        traffic: What is sent in one optimizer step.
        split: The share of each rank.
        sidenet_parameters: Numbers of the SideNet.
        backbone_parameters: Numbers of the backbone.
    """

    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    split: WorldSplit
    sidenet_parameters: int
    backbone_parameters: int

    def part(self, name: str) -> Part:
        """Finds a part.

        Args:
            name: Its name.

        Returns:
            The part.

        Raises:
            KeyError: There is none of this name.
        """
        return {part.name: part for part in self.parts}[name]

    def at(self, phase: str, place: str = "accelerator") -> list[Part]:
        """What is in a place in a phase.

        Args:
            phase: One of ALWAYS.
            place: As in `Part`.

        Returns:
            The parts, largest first.
        """
        found = [part for part in self.parts if part.place == place and phase in part.phases and part.num_bytes]
        return sorted(found, key=lambda part: -part.num_bytes)

    def fullest(self, place: str = "accelerator") -> str:
        """The phase that needs most.

        Args:
            place: As in `Part`.

        Returns:
            One of ALWAYS.
        """
        return max(ALWAYS, key=lambda phase: sum(part.num_bytes for part in self.at(phase, place)))

    def peak(self, place: str = "accelerator") -> int:
        """Bytes in the phase that needs most.

        Args:
            place: As in `Part`.

        Returns:
            The number of bytes.
        """
        return sum(part.num_bytes for part in self.at(self.fullest(place), place))


def make_plan(config: Config, shape: BackboneShape, *, world_size: int) -> Plan:
    """Works out what each rank needs.

    Args:
        config: The settings.
        shape: The backbone.
        world_size: Ranks of the job.

    Returns:
        The plan.

    Raises:
        ConfigError: The world size does not fit, a DeepSpeed file is wrong, or a layer does not exist.
    """
    sizes = Sizes(config, shape, check_world(config, world_size))
    parts = [*sizes.backbone(), *sizes.sidenet(), *sizes.memory(), *sizes.activations(), *sizes.loss()]
    parts += evaluation_parts(sizes)
    traffic = [
        *memory_traffic(config, shape, sizes.split, num_memory_layers=len(sizes.layout.memory_layers)),
        *engine_traffic(
            shape,
            sizes.split,
            sidenet_parameters=sizes.sidenet_parameters,
            number_bytes=sizes.number_bytes,
            kept_whole=sizes.kept_whole,
        ),
    ]
    return Plan(tuple(parts), tuple(traffic), sizes.split, sizes.sidenet_parameters, sum(shape.parameters))
