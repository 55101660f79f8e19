"""Makes a token store from files of text: `python launch/prepare_data.py --help`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data.prepare import prepare, summary
from pipeline.errors import LongMemError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Command-line words; those of the process if None.

    Returns:
        Exit status: 0, or 1 after an error that was printed.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # --workers processes read and tokenize; threads below each of them would be too many.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        prepared = prepare(
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
        )
    except (LongMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(prepared))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Tokenize documents once, into the store that data.path names. Inputs: folders (searched to any "
        "depth), .txt files (one document each, UTF-8), .jsonl, .jsonl.gz, .jsonl.zst and .parquet (field 'text').",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help="file or folder to train on")
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_NAME", help="the backbone's folder or hub name")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder to make")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-documents", type=_count, default=0, metavar="N", help="hold out N documents, chosen by --seed"
    )
    held_out.add_argument(
        "--validation", nargs="+", default=(), metavar="INPUT", type=Path, help="hold out these files and folders"
    )
    parser.add_argument(
        "--min-tokens", type=_count, default=1, metavar="N", help="drop documents with fewer tokens (default: 1)"
    )
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-text token")
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_count, default=1234, metavar="S", help="default: 1234")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that exists")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


if __name__ == "__main__":
    sys.exit(main())
