"""Collects the Python library's sources as text: `python tools/collect_stdlib.py --output DIR [--min-bytes N]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.data.stdlib import collect


def main() -> None:
    """Collects, and says how much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder to make, of .txt files")
    parser.add_argument("--min-bytes", type=int, default=30_000, help="shorter files are left out")
    arguments = parser.parse_args()
    count = collect(arguments.output, min_bytes=arguments.min_bytes)
    print(f"{count} files in {arguments.output}")


if __name__ == "__main__":
    with explained():
        main()
