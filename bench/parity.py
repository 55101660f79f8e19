"""The largest differences between this project and what the authors' code computed, as docs/official.md has them.

python bench/parity.py [RECORD.safetensors]     # by default the reduced record of the tests
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.official import EXACT, FILLED, REDUCED, Record, bound_of, replay

BANKS = {False: "own keys and values", True: "what was in their bank"}


def rows(record: Record) -> Iterator[tuple[str, str, float, float]]:
    """Case, quantity, largest difference over the segments, and what the tests allow."""
    alone: dict[str, float] = {}
    for segment in (0, 5):
        with torch.no_grad():
            gave = record.model().backbone.model(record.tokens("b1", segment), output_hidden_states=True)
        for name, got in [("logits", gave.logits), *((f"hidden{i}", x) for i, x in enumerate(gave.hidden_states))]:
            expected = record.given("b1", segment, f"backbone_{name}")
            if expected is not None:
                name = name.rstrip("0123456789")
                alone[name] = max(alone.get(name, 0.0), float((got[:, -expected.shape[1] :] - expected).abs().max()))
    yield from (("backbone alone", name, difference, EXACT) for name, difference in alone.items())
    for case, writes_recorded in (("b1", False), ("b1", True), ("b2", False)):
        found = replay(record, record.model(), case, writes_recorded=writes_recorded)
        for name in dict.fromkeys(name for differences in found.values() for name in differences):
            difference = max(differences.get(name, 0.0) for differences in found.values())
            bound = bound_of(name, len(FILLED[case]) - 1, writes_recorded=writes_recorded)
            yield f"{case}, {BANKS[writes_recorded]}", name, difference, bound


def main() -> None:
    """Prints the table."""
    record = Record.read(Path(sys.argv[1]) if sys.argv[1:] else REDUCED)
    print("| case | quantity | largest difference | tolerance |\n| --- | --- | --- | --- |")
    for case, name, difference, bound in rows(record):
        whole = name == "knn_slots"
        print(f"| {case} | {name} | {f'{difference:.0f} slots' if whole else f'{difference:.1e}'} | {bound:.1e} |")


if __name__ == "__main__":
    main()
