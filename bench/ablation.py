"""Short runs of one configuration, each with some settings changed, and the table of what they reached.

    python bench/ablation.py --config configs/novels.yaml --rows bench/ablation/novels.yaml --output runs/ablation \
        --train.steps 40 [--only NAME ...] [--section.key value ...]

The rows are a YAML file: a name to the settings that differ, `{section.key: value}`. Those of the row `base` hold for
all rows, further `--section.key value` are laid over them, and a row's own over both. Each row is one `launch/train.py`
on one process, in a folder of its own under `--output`; begun again, what is finished is not run again and what was cut
off goes on. Each row is scored on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CONDITIONS = ("memory_off", "window_only", "other_memory", "memory_on", "longest_window")
HEADS = ("off", "window only", "another's", "on", "longest window")


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value).strip('"'))]


def row(name: str, settings: dict[str, Any], folder: Path) -> str:
    """What a finished run reached."""
    report = json.loads((folder / "evaluation.json").read_text("utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [step for step in steps if "seconds" in step and "tokens" in step]
    found = {(one["first"], one["second"]): one for one in report["differences"]}
    gain = found["memory_on", "window_only"]
    cells = [
        name,
        " ".join(f"`{key} {json.dumps(value)}`" for key, value in settings.items()) or "-",
        str(yaml.safe_load((folder / "config.yaml").read_text("utf-8"))["run"]["seed"]),
        f"{sum(step['tokens'] for step in steps):,}",
        f"{sum(step['seconds'] for step in steps) / 60:.1f}",
        *(f"{report['conditions'][condition]['perplexity']:.2f}" for condition in CONDITIONS),
        f"{gain['loss_nats']:+.4f} +- {gain['loss_standard_error']:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Runs the rows one after another and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rows", required=True, type=Path, help="YAML: name to settings")
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows")
    options, shared = parser.parse_known_args()
    rows = yaml.safe_load(options.rows.read_text("utf-8"))
    wanted = options.only or list(rows)
    if unknown := [name for name in wanted if name not in rows]:
        parser.error(f"{options.rows} has no row {', '.join(unknown)}; it has: {', '.join(rows)}")
    base = words(rows.get("base") or {})
    for name in wanted:
        folder = ["--run.output_dir", str(options.output / name)]
        settings = [*base, *shared, *words(rows[name] or {} if name != "base" else {})]  # the last of a key counts
        command = [sys.executable, "launch/train.py", "--config", options.config, *folder, *settings]
        subprocess.run(command, check=True)
    heads = ["row", "settings", "seed", "tokens", "minutes", *HEADS, "on - window only, nats"]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for name in wanted:
        print(row(name, rows[name] or {}, options.output / name))


if __name__ == "__main__":
    main()
