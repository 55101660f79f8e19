"""Makes a token store from files of text: `python launch/prepare_data.py --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.preparing import count, end, path, run
from pipeline.errors import LongMemError

if TYPE_CHECKING:
    from pipeline.data.ending import StopSignals
    from pipeline.data.prepare import Prepared

MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; a signal ends the process with 128 + its number."""
    options = _parser().parse_args(arguments)

    def make(stop: StopSignals) -> Prepared:
        from pipeline.data.prepare import prepare

        return prepare(
            options.inputs,
            tokenizer=options.tokenizer,
            output=options.output,
            validation_inputs=options.validation,
            validation_documents=options.validation_documents,
            min_tokens=options.min_tokens,
            append_eos=not options.no_eos,
            num_workers=options.workers,
            seed=options.seed,
            overwrite=options.overwrite,
            skip_unreadable=options.skip_unreadable,
            drop_nul=options.drop_nul,
            stop=stop,
        )

    return run(make)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokenize documents once, into the store that data.path names. Inputs: folders (searched to any "
        "depth, through symbolic links too; hidden files and folders are passed over), .txt files (one document each, "
        "UTF-8), .jsonl, .jsonl.gz, .jsonl.zst and .parquet (field 'text').",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", type=path, help="file or folder to train on")
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_NAME", help="the backbone's folder or hub name")
    parser.add_argument("--output", required=True, metavar="DIR", type=path, help="folder to make")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-documents", type=count, default=0, metavar="N", help="hold out N documents, chosen by --seed"
    )
    held_out.add_argument(
        "--validation", nargs="+", default=(), metavar="INPUT", type=path, help="hold out these files and folders"
    )
    parser.add_argument(
        "--min-tokens", type=count, default=1, metavar="N", help="drop documents with fewer tokens (default: 1)"
    )
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-text token")
    parser.add_argument(
        "--workers",
        type=_workers,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=count, default=1234, metavar="S", help="default: 1234")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that exists, and nothing else")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out files and folders that cannot be read, and list them"
    )
    parser.add_argument(
        "--add-hashes",
        action=_AddHashes,
        metavar="STORE",
        help="nothing else: add hashes to a store that was made without, so that changes in it are noticed from now on",
    )
    parser.add_argument("--drop-nul", action="store_true", help="drop NUL characters, and count them")
    return parser


class _AddHashes(argparse.Action):
    """As `--help`: does its work, and ends the program whatever else is or is not there."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, store: Any, option: str | None = None) -> None:
        from pipeline.data.store import add_hashes  # takes seconds

        try:
            info = add_hashes(path(store))
        except argparse.ArgumentTypeError as error:
            parser.error(f"{option}: {error}")
        except (LongMemError, OSError) as error:
            parser.exit(1, f"error: {error}\n")
        parser.exit(0, f"hashes of {', '.join(info.splits)} were added to {store}\n")


def _workers(text: str) -> int:
    number = count(text)
    if not 1 <= number <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{number} processes; this machine can have 1 to {MAX_WORKERS}")
    return number


def program() -> None:
    """The command `longmem-prepare-data`."""
    end(main())


if __name__ == "__main__":
    program()
