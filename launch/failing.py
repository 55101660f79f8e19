"""How a launcher ends: in words for what a user can mend, with a traceback for our own bugs, and well when done."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
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


def run_program(main: Callable[[], None]) -> None:
    """Runs a launcher's `main` as the program of a rank: its log, its errors in words, its end."""
    # DeepSpeed 0.19 still calls collectives by names that torch 2.13 is renaming; nothing that a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # What a rank says when another one is gone would stand below pages of torch's own frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with explained():
        main()
    end_well()


def _say(words: str) -> None:
    with suppress(OSError):  # a log on a full disk
        print(words, file=sys.stderr, flush=True)


def _flush() -> None:
    with suppress(OSError):  # a log on a full disk
        sys.stdout.flush()
        sys.stderr.flush()


def _rank() -> str:
    """This process's rank; under MPI known only after the job was joined, so asked for when it is needed."""
    return os.environ.get("RANK", "0")


def end_well(code: int = 0) -> None:
    """Ends a process whose work is done and saved, on every rank, without the end of the interpreter.

    Threads of a process group live as long as anything holds the group, destroyed or not. One that lets go of a tensor
    while the interpreter ends would crash the process ("terminate called without an active exception", in gloo's
    `runLoop`, torch 2.13), and a job script would take a run that finished, or is to go on, for a failed one.

    Args:
        code: The exit code.
    """
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpi4py would do it at the end of the interpreter; without it mpirun reports a failure
    _flush()
    os._exit(code)


def leave(code: int) -> None:
    """Exits at once where other ranks may be waiting: an orderly shutdown of the process group could wait for them."""
    _flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)
