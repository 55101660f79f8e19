"""How a launcher ends when something is wrong: in words for what a user can mend, with a traceback for our own bugs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pipeline.distributed.launchers import local_rank
from pipeline.errors import EXIT_FAILED, LongMemError


@contextmanager
def explained() -> Iterator[None]:
    """Prints a LongMemError without traceback and exits with 1; leaves at once on other errors.

    One rank of each machine prints what is wrong with files and settings, which its other ranks find alike; a rank
    that the words name prints, too.

    Yields:
        Nothing.
    """
    try:
        yield
    except LongMemError as error:
        if local_rank(os.environ) == 0 or f"rank {_rank()}" in str(error):
            _say(f"\nerror: {error}")
        leave(EXIT_FAILED)
    except Exception:
        _say(f"\nrank {_rank()} failed:\n{traceback.format_exc()}")
        leave(EXIT_FAILED)


def _say(words: str) -> None:
    with suppress(OSError):  # a log on a full disk
        print(words, file=sys.stderr, flush=True)


def _rank() -> str:
    """This process's rank; under MPI known only after the job was joined, so asked for when it is needed."""
    return os.environ.get("RANK", "0")


def leave(code: int) -> None:
    """Exits at once where other ranks may be waiting: an orderly shutdown of the process group could wait for them.

    Args:
        code: The exit code.
    """
    with suppress(OSError):  # a log on a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
