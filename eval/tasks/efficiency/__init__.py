"""The task `efficiency`."""

from eval.tasks.efficiency.task import Efficiency

__all__ = ["Efficiency"]
