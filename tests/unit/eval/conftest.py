"""The inputs of tiny runs, for the tests of tasks."""

from tests.tiny_run import tiny_run

__all__ = ["tiny_run"]
