"""The task `squad`."""

from eval.tasks.squad.task import Squad

__all__ = ["Squad"]
