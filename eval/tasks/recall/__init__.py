"""The task `recall`."""

from eval.tasks.recall.task import Recall

__all__ = ["Recall"]
