"""Perplexity of documents read in order, by token, word and byte, under every control, by length and by place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from eval.controls import Comparison, compare, missing
from eval.documents import check_segments, data_of_run, in_pairs, of_data, read_in_pairs
from eval.report import Lines, Section, Table
from eval.scorer import BACKBONE, CONDITIONS, LABELS, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON, How, Losses, Scorer
from eval.statistics import Float64Array, interval
from eval.task import Item, Scores, Task, TaskOptions
from pipeline.config.kinds import Count, TokensOrZero
from pipeline.config.kinds import Tokens as TokenCount
from pipeline.config.world import held_out_lanes
from pipeline.errors import ConfigError

MEMORY_OF, WINDOW_OF, BACKBONE_OF = "memory of ", "window of ", "backbone with "
SWEEPS = {
    MEMORY_OF: "By tokens of memory",
    WINDOW_OF: "By tokens of the recent window",
    BACKBONE_OF: "The backbone alone, by tokens of its window",
}
PLACES = 16


class PerplexityOptions(TaskOptions):
    """How documents are read and scored."""

    split: str = "validation"
    """Of a token store or of a data set on the hub; files have none."""
    documents: Count = 8
    """Documents used."""
    context_tokens: TokensOrZero = 4096
    """Tokens of each document read into memory before any is scored."""
    scored_tokens: TokenCount | None = 1024
    """Tokens scored in each document, after the context; null: all to its end."""
    memory_tokens: tuple[TokensOrZero, ...] = ()
    """Sweep: how far back memory reaches, each at most memory.tokens."""
    window_tokens: tuple[TokensOrZero, ...] = ()
    """Sweep: the recent window that is read whole, each at most memory.tokens."""
    backbone_windows: tuple[TokenCount, ...] = ()
    """Sweep: ordinary windows of the backbone alone, each of a segment at least and at most the longest one."""
    buckets: tuple[Count, ...] = (5_000, 10_000, 100_000, 500_000, 1_000_000)
    """Lengths of documents, in tokens, that part the table by length; by default those of PG-22 (Wang et al. 2023)."""
    words: Count | None = None
    """Words of all that is scored, as published; null: counted, between white space."""


class Perplexity(Task[PerplexityOptions]):
    """Held-out documents of the run, or others, in order."""

    name = "perplexity"
    options_class = PerplexityOptions
    small: ClassVar[Mapping[str, Any]] = {"documents": 4, "context_tokens": 3072, "scored_tokens": 512}

    def items(self) -> Sequence[Item]:
        """Documents, by pairs that lend each other their memories."""
        options, config = self.options, self.given.config
        segment, scored = config.train.segment_tokens, options.scored_tokens
        check_segments(options.context_tokens, scored, segment, self.name)
        self._check_sweeps()
        count = min(options.documents, options.limit or options.documents)
        found = of_data(
            options.data or data_of_run(config, options.split),
            self.given.tokenizer,
            split=options.split,
            count=count,
            num_tokens=None if scored is None else options.context_tokens + scored,
            min_tokens=options.context_tokens + (segment if scored is None else scored),
        )
        if scored is None:
            found = sorted(found, key=lambda one: one.length)  # partners of much the same length
        return in_pairs(found, at_once=held_out_lanes(options.documents, num_groups=1))

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """Sums of losses of each document: by segment, and by place in a segment."""
        hows = {name: How(name) for name in scorer.conditions}
        if MEMORY_ON in scorer.conditions:
            hows |= {f"{MEMORY_OF}{n:,}": How(MEMORY_ON, memory_tokens=n) for n in self.options.memory_tokens}
            hows |= {f"{WINDOW_OF}{n:,}": How(MEMORY_ON, window_tokens=n) for n in self.options.window_tokens}
        for n in self.options.backbone_windows:
            hows[f"{BACKBONE_OF}{n:,}"] = How(LONGEST_WINDOW, window_tokens=n)
        scores = {}
        for one, losses, count in read_in_pairs(item.content, scorer, self.options.context_tokens, hows):
            scored = one.tokens[self.options.context_tokens + 1 :]
            text = self.given.tokenizer.decode(scored.tolist(), clean_up_tokenization_spaces=False)
            counted = np.arange(len(next(iter(losses.values())))) < count
            scores[str(one.number)] = {
                "source": one.source,
                "tokens_of_document": one.length,
                "words": len(text.split()),
                "bytes": len(text.encode("utf-8")),
                "num_tokens": count,
                "counts": _sums(counted.astype(float), counted, scorer.segment_tokens),
                "losses": {name: _sums(values, counted, scorer.segment_tokens) for name, values in losses.items()},
            }
        return scores

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Means over tokens, and where they come from."""
        documents = [one for item in scores.values() for one in item.values()]
        names = list(documents[0]["losses"])
        names = [name for name in names if all(name in one["losses"] for one in documents)]
        totals = {name: np.array([sum(one["losses"][name]["by_segment"]) for one in documents]) for name in names}
        sizes = np.array([float(one["num_tokens"]) for one in documents])
        compared = compare(totals, sizes)
        words = self.options.words or sum(one["words"] for one in documents)
        num_bytes = sum(one["bytes"] for one in documents)
        conditions = [name for name in names if name in CONDITIONS]
        tables = [
            _main_table(compared, conditions, totals, words, num_bytes),
            *self._sweep_tables(compared, totals, sizes),
            _by_length(documents, totals, sizes, conditions, self.options.buckets),
        ]
        num_words = f"{words:,} words {'as published' if self.options.words else 'counted between white space'}"
        return Section(
            "Perplexity of documents read in order",
            f"{len(documents)} documents, {int(sizes.sum()):,} tokens ({num_words}, {num_bytes:,} bytes) scored, each "
            f"document after {self.options.context_tokens:,} tokens that were only read. Every condition scores the "
            f"same tokens. Intervals: 95 %, bootstrap over documents.{self._forgotten()}",
            tables,
            [plot for plot in (*self._sweep_plots(compared), *_curves(documents, conditions)) if plot.lines],
            missing(conditions),
            {**compared.to_dict(), "documents": len(documents), "tokens": int(sizes.sum()), "words": words}
            | {"bytes": num_bytes, "perplexity": {name: _exp(one.mean) for name, one in compared.means.items()}}
            | {"word_perplexity": {name: _exp(total.sum() / words) for name, total in totals.items()}}
            | {"bits_per_byte": {name: total.sum() / num_bytes / math.log(2) for name, total in totals.items()}},
        )

    def _check_sweeps(self) -> None:
        memory = self.given.config.memory
        most = memory.tokens if memory.enabled else 0
        for name in ("memory_tokens", "window_tokens"):
            largest = max(getattr(self.options, name), default=0)
            if largest > most:
                raise ConfigError(
                    [
                        f"perplexity.{name} asks for more than memory holds; got: {largest} and memory.tokens {most}; "
                        f"do: add --memory.tokens {largest}"
                    ]
                )
        least, longest = self.given.config.train.segment_tokens, self.given.longest
        if wrong := [size for size in self.options.backbone_windows if not least <= size <= longest]:
            raise ConfigError(
                [
                    f"perplexity.backbone_windows are those of a segment to the longest one; got: {wrong[0]}; "
                    + (
                        f"expected: {least} to {longest}; do: leave {wrong[0]} out"
                        if longest
                        else "do: leave evaluation.backbone_window_tokens out, which is 0"
                    )
                ]
            )

    def _forgotten(self) -> str:
        memory, context = self.given.config.memory, self.options.context_tokens
        if not memory.enabled or context <= memory.tokens:
            return ""
        return f" Memory holds {memory.tokens:,} tokens: at least {context - memory.tokens:,} were forgotten."

    def _sweep_tables(
        self, compared: Comparison, totals: Mapping[str, Float64Array], sizes: Float64Array
    ) -> list[Table]:
        tables = []
        for kind, title in SWEEPS.items():
            rows, before = [], None
            for name in (name for name in compared.means if name.startswith(kind)):
                mean = compared.means[name]
                step = "-" if before is None else interval(totals[name] - totals[before], sizes).text("{:+.4f}")
                to_on = compared.differences[name].text("{:+.4f}") if name in compared.differences else "-"
                rows.append([name, mean.text("{:.4f}"), f"{_exp(mean.mean):.2f}", step, to_on])
                before = name
            if rows:
                read = self.options.context_tokens + (self.options.scored_tokens or 0)
                note = f"Of {read:,} tokens of a document at most." if self.options.scored_tokens else ""
                if kind == BACKBONE_OF:
                    note += " The last token of a segment sees the whole window, the first a segment less."
                heads = ["nats a token [95 %]", "perplexity", "minus the row above, paired", "(c) minus this [95 %]"]
                first = "backbone" if kind == BACKBONE_OF else "memory on with"
                tables.append(Table(title, [first, *heads], rows, note))
        return tables

    def _sweep_plots(self, compared: Comparison) -> list[Lines]:
        plots = []
        for kind, what, sizes in (
            (MEMORY_OF, "memory", self.options.memory_tokens),
            (WINDOW_OF, "window", self.options.window_tokens),
        ):
            places = sorted({size for size in sizes if size})
            values = [
                _exp(compared.means[f"{kind}{size:,}"].mean) for size in places if f"{kind}{size:,}" in compared.means
            ]
            lines = {"memory on": (places, values)} if values else {}
            for name in (MEMORY_OFF, BACKBONE) if lines else ():
                lines[LABELS[name]] = (places, [_exp(compared.means[name].mean)] * len(places))
            title = f"Perplexity by tokens of {what}"
            plots.append(Lines(f"by-{what}", title, f"tokens of {what}", "perplexity", lines, log_x=True))
        return plots


def _sums(values: Losses, counted: Any, segment: int) -> dict[str, list[float]]:
    rows = np.where(counted, values, 0.0).reshape(-1, segment)
    return {"by_segment": rows.sum(axis=1).tolist(), "by_place": rows.sum(axis=0).tolist()}


def _exp(mean: float) -> float:
    with np.errstate(over="ignore"):  # a diverged model has perplexity inf
        return float(np.exp(mean))


def _main_table(
    compared: Comparison, conditions: Sequence[str], totals: Mapping[str, Float64Array], words: int, num_bytes: int
) -> Table:
    rows = []
    for name in conditions:
        mean, total = compared.means[name], totals[name].sum()
        rows.append(
            [
                LABELS[name],
                mean.text("{:.4f}"),
                f"{_exp(mean.mean):.2f}",
                f"{_exp(total / words):.2f}",
                f"{total / num_bytes / math.log(2):.4f}",
                compared.differences[name].text("{:+.4f}") if name in compared.differences else "-",
            ]
        )
    columns = ["condition", "nats a token [95 %]", "perplexity", "a word", "bits a byte", "(c) minus this [95 %]"]
    note = "Perplexity a word is exp(all nats / all words), as PG-19 is reported (Rae et al. 2020)."
    return Table("Held-out text", columns, rows, note)


def _by_length(
    documents: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Float64Array],
    sizes: Float64Array,
    conditions: Sequence[str],
    buckets: Sequence[int],
) -> Table:
    """Perplexity by length of the whole document; a length that no document has is not shown."""
    edges = [0, *sorted(buckets)]
    lengths = np.array([one["tokens_of_document"] for one in documents])
    rows = []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        inside = (lengths >= low) & (True if high is None else lengths < high)
        if inside.any():
            label = f"{low:,} and more" if high is None else f"{low:,} to {high:,}"
            means = [f"{_exp(totals[name][inside].sum() / sizes[inside].sum()):.2f}" for name in conditions]
            rows.append([label, *means, str(int(inside.sum()))])
    heads = [LABELS[name] for name in conditions]
    return Table("Perplexity by length of the document", ["tokens", *heads, "documents"], rows)


def _curves(documents: Sequence[Mapping[str, Any]], conditions: Sequence[str]) -> list[Lines]:
    """Loss against place in the document, a point a segment; and against place in the segment (a cold start)."""
    by_segment: dict[str, Any] = {}
    by_place: dict[str, Any] = {}
    for name in conditions:
        found = [one["losses"][name] for one in documents]
        means = _means([one["by_segment"] for one in found], [one["counts"]["by_segment"] for one in documents])
        by_segment[LABELS[name]] = (list(range(1, len(means) + 1)), means)
        segment = len(found[0]["by_place"])
        each = math.gcd(segment, PLACES) if segment % PLACES else PLACES
        pieces = [np.array(one["by_place"]).reshape(-1, each).sum(axis=1).tolist() for one in found]
        counts = [np.array(one["counts"]["by_place"]).reshape(-1, each).sum(axis=1).tolist() for one in documents]
        means = _means(pieces, counts)
        by_place[LABELS[name]] = ([each * (at + 0.5) for at in range(len(means))], means)
    return [
        Lines("by-document", "Loss by place in the document", "scored segment", "nats a token", by_segment),
        Lines("by-segment", "Loss by place in the segment", "token of the segment", "nats a token", by_place),
    ]


def _means(sums: Sequence[Sequence[float]], counts: Sequence[Sequence[float]]) -> list[float]:
    """Means over documents, place by place, as far as there is a token to count."""
    longest = max(len(one) for one in sums)
    total = np.sum([np.pad(one, (0, longest - len(one))) for one in sums], axis=0)
    number = np.sum([np.pad(one, (0, longest - len(one))) for one in counts], axis=0)
    return [float(one / many) for one, many in zip(total, number, strict=True) if many]
