"""The inputs of tiny runs, for all tests with ranks."""

from tests.tiny_run import tiny_run

__all__ = ["tiny_run"]
