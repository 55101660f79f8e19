"""What the scores of ChapterBreak mean: accuracy by rule, size of the context and condition.

Source of the rules: Krishna, Chang, Wieting and Iyyer (2022), "RankGen: Improving Text Generation with Large Ranking
Models", https://arxiv.org/abs/2205.09726 (`gpt2_score.py`: `avg_conditional`, `conditional`, `pmi`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.controls import compare, missing
from eval.report import Lines, Section, Table
from eval.scorer import LABELS, MEMORY_ON, OTHER_MEMORY
from eval.statistics import Float64Array
from eval.task import Scores

RULES: Mapping[str, str] = {
    "mean": "the mean loss of its tokens (RankGen's avg_conditional)",
    "sum": "the sum of the losses of its tokens (RankGen's conditional)",
    "pmi": "the sum of the losses of its tokens less that of the same tokens after one token that begins a text and "
    "nothing else (RankGen's pmi, which has nothing at all there, and no loss of the first token)",
}
TIE_NATS = 1e-5  # per token: about ten times what sums of float32 in another order differ by


def by_rule(rule: str, sums: Float64Array, without_context: Float64Array, num_tokens: Float64Array) -> Float64Array:
    """What each suffix scores by one of `RULES`, `[suffixes]`; the lowest is the best."""
    if rule == "pmi":
        return sums - without_context
    return sums / num_tokens if rule == "mean" else sums


def share_of_right(losses: Float64Array, tie: float) -> tuple[float, bool]:
    """How right it is to choose the lowest, the right one being the first.

    Args:
        losses: What each suffix scores, `[suffixes]`.
        tie: What is this near to the lowest is as low.

    Returns:
        1, 0, or 1/m if the right one is one of m that are the lowest; and whether several are. A model whose losses are
        not finite is never right.
    """
    if not np.isfinite(losses).all():
        return 0.0, False
    lowest = losses <= losses.min() + tie
    return float(lowest[0]) / int(lowest.sum()), bool(lowest.sum() > 1)


class AtSize:
    """The items of a subset after contexts of one size.

    Args:
        items: Their scores.
        size: Tokens that contexts were cut to.

    Attributes:
        conditions: Under which they were scored.
        percent: By rule and condition: 100, 0 or what a tie counts, of each item.
        ties: By rule and condition: the number of items where several suffixes are equally good.
    """

    def __init__(self, items: Sequence[Scores], size: int) -> None:
        self.items, self.size = items, size
        self.of_size: list[Mapping[str, Any]] = [one["contexts"][str(size)] for one in items]
        self.conditions = tuple(self.of_size[0]["sums"])
        self.chance = 100 * float(np.mean([1 / len(one["num_tokens"]) for one in items]))
        self.percent: dict[str, dict[str, list[float]]] = {}
        self.ties: dict[str, dict[str, int]] = {}
        for rule in RULES:
            found = {
                name: [self._share(number, name, rule) for number in range(len(items))] for name in self.conditions
            }
            self.percent[rule] = {name: [100 * share for share, _ in shares] for name, shares in found.items()}
            self.ties[rule] = {name: sum(is_tie for _, is_tie in shares) for name, shares in found.items()}

    def _share(self, number: int, condition: str, rule: str) -> tuple[float, bool]:
        item = self.items[number]
        num_tokens = np.array(item["num_tokens"], dtype=np.float64)
        # A number that is not finite comes back as None.
        sums = np.array(self.of_size[number]["sums"][condition], dtype=np.float64)
        without_context = np.array(item["without_context"][condition], dtype=np.float64)
        losses = by_rule(rule, sums, without_context, num_tokens)
        return share_of_right(losses, TIE_NATS * (1 if rule == "mean" else num_tokens.mean()))

    def tables(self, subset: str, rule: str) -> list[Table]:
        """Accuracy by the rule, and the loss of the right suffix."""
        right = {name: [one["sums"][name][0] for one in self.of_size] for name in self.conditions}
        sizes = [item["num_tokens"][0] for item in self.items]
        title = f"{subset}, {self.size:,} tokens of context"
        return [
            compare(self.percent[rule]).table(
                f"{title}: accuracy by {rule}", "accuracy, %", form="{:.1f}", note=self._note(rule)
            ),
            compare(right, sizes).table(f"{title}: how likely the right suffix is", "loss, nats a token"),
        ]

    def _note(self, rule: str) -> str:
        ties = [f"{LABELS.get(name, name)} {count}" for name, count in self.ties[rule].items() if count]
        notes = [f"Chance: {self.chance:.1f} %.", f"Ties: {', '.join(ties)}." if ties else "No ties."]
        shorter = sum(one["num_tokens"] < self.size for one in self.of_size)
        if shorter:
            notes.append(f"{shorter} of the contexts are shorter, and whole.")
        forgotten = [one["num_forgotten"] for one in self.of_size if one["num_forgotten"]]
        if forgotten:
            notes.append(
                f"Memory had no room for {len(forgotten)} of the contexts: up to {max(forgotten):,} of their first "
                "tokens were forgotten."
            )
        return " ".join(notes)

    def figures(self) -> dict[str, Any]:
        """The numbers behind the tables."""
        return {
            "num_items": len(self.items),
            "chance_percent": self.chance,
            "num_shorter": sum(one["num_tokens"] < self.size for one in self.of_size),
            "most_forgotten_tokens": max(one["num_forgotten"] for one in self.of_size),
            "accuracy_percent": {rule: compare(values).to_dict() for rule, values in self.percent.items()},
            "ties": self.ties,
        }


def report(scores: Mapping[str, Scores], contexts: Sequence[int], rule: str, suffix_tokens: int) -> Section:
    """Accuracy by size of the context and condition, for each subset.

    Args:
        scores: The task's, by item.
        contexts: Sizes that contexts were cut to.
        rule: That of comparisons and plots.
        suffix_tokens: What suffixes were cut to.

    Returns:
        The section.
    """
    tables: list[Table] = []
    plots, figures, lacking = [], {}, []
    for subset in dict.fromkeys(one["subset"] for one in scores.values()):
        own = [one for one in scores.values() if one["subset"] == subset]
        sizes = [AtSize(own, size) for size in contexts]
        tables.append(_by_size(subset, sizes, rule))
        tables += [table for size in sizes for table in size.tables(subset, rule)]
        plots.append(_plot(subset, sizes, rule))
        figures[subset] = {str(size.size): size.figures() for size in sizes}
        lacking += _lacking(subset, sizes[0].conditions)
    return Section(
        "ChapterBreak",
        f"{len(scores)} items. An item is right if the right one of its suffixes, of the first {suffix_tokens} tokens "
        f"each, has the lowest score: {RULES[rule]}. Of m suffixes that are equally good, within {TIE_NATS:g} nats a "
        "token, the right one among them, it counts 1/m; in RankGen's code 0, in ChapterBreak's 1. Units of the "
        "intervals are items. Memory of another document is of a context of another work, repeated if it is shorter.",
        tables,
        plots,
        lacking,
        figures,
    )


def _lacking(subset: str, conditions: Sequence[str]) -> list[str]:
    """The controls that are not there, and why."""
    found = []
    if MEMORY_ON in conditions and OTHER_MEMORY not in conditions:
        found.append(f"{subset}: {LABELS[OTHER_MEMORY]}: the subset has one work only")
        conditions = (*conditions, OTHER_MEMORY)
    return found + [f"{subset}: {control}: the model's settings leave it out" for control in missing(conditions)]


def _by_size(subset: str, sizes: Sequence[AtSize], first: str) -> Table:
    """Accuracy by all rules, `first` first."""
    rows = []
    for rule in sorted(RULES, key=lambda one: one != first):
        for name in sizes[0].conditions:
            cells = [f"{np.mean(size.percent[rule][name]):.1f}" for size in sizes]
            rows.append([LABELS.get(name, name), rule, *cells])
    return Table(
        f"{subset}: accuracy, %, by tokens of context",
        ["condition", "rule", *(f"{size.size:,}" for size in sizes)],
        rows,
        f"{len(sizes[0].items)} items. Chance: {sizes[0].chance:.1f} %.",
    )


def _plot(subset: str, sizes: Sequence[AtSize], rule: str) -> Lines:
    places = [float(size.size) for size in sizes]
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        LABELS.get(name, name): (places, [float(np.mean(size.percent[rule][name])) for size in sizes])
        for name in sizes[0].conditions
    }
    lines["chance"] = (places, [size.chance for size in sizes])
    safe = "".join(letter if letter.isalnum() else "_" for letter in subset)
    title = f"ChapterBreak, {subset}: accuracy by {rule}, {len(sizes[0].items)} items"
    return Lines(f"accuracy-{safe}", title, "tokens of context", "accuracy, %", lines)
