"""The errors that a user can reach. Each message says what is wrong, what was got, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: stopped before the end, to be started again."""


class LongMemError(Exception):
    """Base of every error that LongMem raises on purpose; the launchers print it without a traceback.

    Args:
        what: What is wrong, as one sentence.
        got: What was found.
        expected: What would have been right.
        do: What the user can do about it.

    Attributes:
        on_all_ranks: Whether every rank raises it at the same place, so that nobody need be told.
        got: As given.
    """

    on_all_ranks = False
    got: object = None

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None) -> None:
        self.got = got
        parts = [what]
        if got is not None:
            parts.append(f"got: {got}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if do is not None:
            parts.append(f"do: {do}")
        super().__init__("; ".join(parts))


class ConfigError(LongMemError):
    """A configuration is invalid. Holds every problem found, not only the first.

    Args:
        problems: One line for each problem.
        source: Where the configuration came from (a file, the command line).
    """

    def __init__(self, problems: Sequence[str], *, source: str = "configuration") -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source} has {len(self.problems)} problem(s):\n{lines}")


def in_a_line(error: BaseException) -> str:
    """What went wrong, as a message has room for it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_failure(error: Exception) -> str:
    """What a load failed with; of what the unpickler refused only the name: torch's page of advice would mislead."""
    text = str(error)
    for mark in ("Unsupported global: ", "Trying to load unsupported GLOBAL ", "Unsupported operand "):
        if mark in text:
            refused = (mark + text.split(mark, 1)[1].splitlines()[0]).split(" was not ")[0]
            return f"{type(error).__name__}: {refused[:200]}"
    return f"{type(error).__name__}: {next(iter(text.splitlines()), '')[:500]}"


class DataError(LongMemError):
    """Input text or a token store is missing, empty, malformed or foreign."""


class BackboneError(LongMemError):
    """A backbone cannot be used: unknown family, unsupported variant, missing files."""


class CheckpointError(LongMemError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another run."""


class LongMemMemoryError(LongMemError):
    """A memory is foreign, damaged, or is asked for what it does not hold."""


class TrainingError(LongMemError):
    """Training cannot go on: a loss that is not finite, a run folder in use, ranks that disagree."""
