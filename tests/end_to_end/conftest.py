"""The inputs of tiny runs, for all tests of command lines."""

from tests.tiny_run import tiny_run

__all__ = ["tiny_run"]
