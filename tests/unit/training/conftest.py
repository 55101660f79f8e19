"""The inputs of tiny runs, for the tests of what is checked before a run."""

from tests.tiny_run import tiny_run

__all__ = ["tiny_run"]
