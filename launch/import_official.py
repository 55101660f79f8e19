"""Makes the published LongMem into one of this project: `launch/import_official.py BACKBONE LONGMEM ...`; `--help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.official.convert import import_official


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, and imports."""
    parser = argparse.ArgumentParser(
        description="Makes the two fairseq checkpoints of the paper's authors into a folder for "
        "AutoModelForCausalLM.from_pretrained and launch/evaluate.py. Needs no fairseq, and runs no code that stands "
        "in a checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("backbone", metavar="BACKBONE.pt", type=Path, help="the backbone's checkpoint")
    parser.add_argument("longmem", metavar="LONGMEM.pt", type=Path, help="the checkpoint of LongMem beside it")
    parser.add_argument("--dict", metavar="FILE", type=Path, required=True, help="the dict.txt published with them")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--bpe", metavar="NAME", default="gpt2", help="folder or hub name of GPT-2's tokenizer (default: %(default)s)"
    )
    tokenizer.add_argument("--no-tokenizer", action="store_true", help="make none")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = import_official(
        options.backbone,
        options.longmem,
        options.dict,
        options.output,
        bpe=None if options.no_tokenizer else options.bpe,
    )
    print(
        f"{sizes.num_layers} backbone layers of {sizes.hidden_size:,}, {sizes.num_side_layers} of the SideNet, memory "
        f"read in its layer {sizes.memory_layer} -> {options.output}"
    )


def program() -> None:
    """The command `longmem-import-official`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
