"""The task `in_context`."""

from eval.tasks.in_context.task import InContext

__all__ = ["InContext"]
