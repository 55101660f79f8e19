"""Makes a checkpoint into a Hugging Face model: `python launch/export.py CHECKPOINT --output DIR`; `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.face.export import export


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, and exports."""
    parser = argparse.ArgumentParser(
        description="Makes a checkpoint of any number of ranks into a folder for AutoModelForCausalLM.from_pretrained: "
        "the SideNet's trained weights (fp32), configuration, tokenizer and model card. Needs neither the ranks nor "
        "the accelerators of the training; of the backbone only configuration and tokenizer are read.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a folder step_* or a run folder (newest)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--backbone", metavar="NAME", help="its folder or hub name, if not the run's backbone.path")
    parser.add_argument("--save-backbone", action="store_true", help="copy the backbone into the folder, too")
    options = parser.parse_args(arguments)
    made = export(options.checkpoint, options.output, backbone=options.backbone, save_backbone=options.save_backbone)
    print(f"{made} -> {options.output}")


def program() -> None:
    """The command `longmem-export`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
