"""One figure under every condition, on the same items: means with intervals, and paired differences of memory on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.report import Table
from eval.scorer import CONDITIONS, LABELS, MEMORY_ON
from eval.statistics import Interval, Numbers, interval


@dataclass(frozen=True)
class Comparison:
    """A figure under several conditions.

    Attributes:
        means: By condition.
        differences: `memory_on` minus the condition named, paired by item.
    """

    means: Mapping[str, Interval]
    differences: Mapping[str, Interval]

    def table(
        self, title: str, figure: str, *, form: str = "{:.3f}", labels: Mapping[str, str] = LABELS, note: str = ""
    ) -> Table:
        """Means, 95 % intervals and differences, a condition a row.

        Args:
            title: What is shown.
            figure: The figure's name, with its unit.
            form: How a number is written.
            labels: Names of conditions for readers; one that is not here is shown as it is.
            note: What a reader must know besides.

        Returns:
            The table.
        """
        signed = form.replace("{:", "{:+")
        rows = []
        for name, mean in self.means.items():
            difference = self.differences[name].text(signed) if name in self.differences else "-"
            rows.append([labels.get(name, name), mean.text(form), difference, str(mean.num_items)])
        columns = ["condition", f"{figure} [95 % interval]", "memory on minus this, paired [95 %]", "items"]
        return Table(title, columns, rows, note)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "means": {name: asdict(one) for name, one in self.means.items()},
            "memory_on_minus": {name: asdict(one) for name, one in self.differences.items()},
        }


def compare(sums: Mapping[str, Numbers], sizes: Numbers | None = None) -> Comparison:
    """Compares conditions, the items of which are the same ones in the same order.

    Args:
        sums: By condition, of each item: the sum of its values.
        sizes: How many values each item has; None: one.

    Returns:
        The comparison; intervals are by bootstrap over items.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in sums.items()}
    on = arrays.get(MEMORY_ON)
    return Comparison(
        {name: interval(values, sizes) for name, values in arrays.items()},
        {name: interval(on - values, sizes) for name, values in arrays.items() if on is not None and name != MEMORY_ON},
    )


def missing(found: Iterable[str], expected: Sequence[str] = CONDITIONS) -> list[str]:
    """The controls that a table lacks, for `Section.missing`."""
    there = set(found)
    return [LABELS.get(name, name) for name in expected if name not in there]
