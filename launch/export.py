"""Turns a checkpoint into one file of SideNet weights: `python launch/export.py CHECKPOINT --output DIR`; `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.checkpoint.export import export


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, and exports."""
    parser = argparse.ArgumentParser(
        description="Turns a checkpoint of any number of ranks into one safetensors file of the SideNet's trained "
        "weights (fp32), with its configuration. Needs neither the ranks nor the accelerators of the training.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a folder step_* or a run folder (newest)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder")
    options = parser.parse_args(arguments)
    print(f"{export(options.checkpoint, options.output)} -> {options.output}")


def program() -> None:
    """The command `longmem-export`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
