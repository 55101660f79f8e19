"""What the programs have in common that make token stores: their options, their ends, their words."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.ending import StopSignals, ignore_signals
from pipeline.errors import LongMemError

if TYPE_CHECKING:
    from pipeline.data.prepare import Prepared


def run(make: Callable[[StopSignals], Prepared]) -> int:
    """Makes a store and says what was written; a signal ends the process with 128 + its number.

    Args:
        make: Makes it. Its imports belong into it: they take seconds, in which Ctrl-C is to be heeded already.

    Returns:
        The exit status: 0, or 1 after an error that was printed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Worker processes read and tokenize; threads below each of them would be too many.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with StopSignals() as stop:
        from pipeline.data.prepare import summary

        try:
            prepared = make(stop)
        except (LongMemError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    _say(summary(prepared))
    return 0


def end(status: int) -> None:
    """Ends the program with an exit status."""
    ignore_signals()
    sys.exit(status)


def _say(words: str) -> None:
    try:
        print(words, flush=True)
    except OSError:  # nobody reads it any more, or a log on a full disk; the store is written all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count(text: str) -> int:
    """An option that is a whole number."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from error
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def share(text: str) -> float:
    """An option that is a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from error
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not from 0 to 1")
    return number


def path(text: str) -> Path:
    """An option that is a path."""
    if not text:  # of a variable that a script did not set; Path would take it for the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
