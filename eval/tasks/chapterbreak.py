"""ChapterBreak: which of six passages begins the next chapter, told by which is the likeliest after the book so far.

Sources: task, files and cuts (contexts from the left, suffixes from the right to 128 tokens) are of Sun, Thai and Iyyer
(2022), "ChapterBreak: A Challenge Dataset for Long-Range Language Models", https://arxiv.org/abs/2204.10878; the space
between context and suffix of Krishna, Chang, Wieting and Iyyer (2022), "RankGen: Improving Text Generation with Large
Ranking Models", https://arxiv.org/abs/2205.09726 (`gpt2_score.py`), as are the rules; contexts of 4k, 6k and 8k of Wang
et al. (2023), "Augmenting Language Models with Long-Term Memory", https://arxiv.org/abs/2306.07174.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from eval.chapterbreak_files import Example, read_examples
from eval.chapterbreak_report import report
from eval.report import Section
from eval.scorer import (
    BACKBONE,
    LONGEST_WINDOW,
    MEMORY_OFF,
    MEMORY_ON,
    OTHER_MEMORY,
    WINDOW_ONLY,
    Row,
    Scorer,
    Tokens,
    split,
)
from eval.task import Item, Scores, Task, TaskOptions
from pipeline.config.kinds import Count
from pipeline.config.kinds import Tokens as TokenCount
from pipeline.errors import DataError

WITHOUT_CONTEXT = {
    BACKBONE: BACKBONE,
    MEMORY_OFF: MEMORY_OFF,
    MEMORY_ON: MEMORY_ON,
    OTHER_MEMORY: MEMORY_ON,
    WINDOW_ONLY: MEMORY_ON,
    LONGEST_WINDOW: BACKBONE,
}
"""Under which condition a suffix is read without context: an empty memory is the same whoever's it is."""


class ChapterBreakOptions(TaskOptions):
    """How examples are cut and scored."""

    contexts: Annotated[tuple[TokenCount, ...], Field(min_length=1)] = (4096, 6144, 8192)
    """Tokens of context, cut from the left; each is a figure of its own, and a reading of its own."""
    suffix_tokens: Count = 128
    """Tokens of a suffix, cut from the right."""
    rule: Literal["mean", "sum", "pmi"] = "mean"
    """The rule of the comparisons and the plot; accuracy by the others is stated too."""
    subset: str = "all"
    """`pg19`, `ao3` or `all`."""


class ChapterBreak(Task[ChapterBreakOptions]):
    """Which of six passages begins the next chapter? Published files: `{"pg19": {work: [{ctx, pos, negs}]}, ...}`."""

    name = "chapterbreak"
    options_class = ChapterBreakOptions
    # One token more than whole segments of 256: then rows repeat one token of context, not 256.
    small: ClassVar[Mapping[str, Any]] = {"limit": 3, "contexts": (1025,), "suffix_tokens": 64}
    needs_data = True

    def items(self) -> Sequence[Item]:
        """Examples, each with one of another work, if there is one in its subset, whose context lends its memory."""
        longest_row = self.given.config.train.segment_tokens + self.options.suffix_tokens
        if 0 < self.given.longest < longest_row:
            raise DataError(
                "a suffix and what stands before it in its segment are longer than the backbone's longest window",
                got=f"{longest_row} tokens (train.segment_tokens + chapterbreak.suffix_tokens)",
                expected=f"at most {self.given.longest}",
                do="lower --chapterbreak.suffix_tokens or --train.segment_tokens",
            )
        examples = read_examples(self.options.data, self.options.subset)
        return [Item(one.name, (one, other)) for one, other in zip(examples, _others(examples), strict=True)][
            : self.options.limit
        ]

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """Reads the context of every size into memory once, and all suffixes as rows of that memory."""
        example, other = item.content
        suffixes = [
            np.array(self.given.tokens(" " + text.strip())[: self.options.suffix_tokens], dtype=np.int64)
            for text in example.suffixes
        ]
        context = self.given.tokens(example.context.strip())
        foreign = None if other is None else self.given.tokens(other.context.strip())
        names = [name for name in scorer.conditions if foreign is not None or name != OTHER_MEMORY]
        by_size = {
            str(size): _score(scorer, context[-size:], foreign, suffixes, names) for size in self.options.contexts
        }
        nothing = scorer.remember(np.array([], dtype=np.int64))
        needed = [name for name in names if name in WITHOUT_CONTEXT.values()]
        alone = _sums(scorer, nothing, self._beginning(), suffixes, needed)
        return {
            "subset": example.subset,
            "num_tokens": [len(suffix) for suffix in suffixes],
            "without_context": {name: alone[WITHOUT_CONTEXT[name]] for name in names},
            "contexts": by_size,
        }

    def _beginning(self) -> Tokens:
        """A token that begins a text: what documents begin or end with, or a line's end."""
        tokenizer = self.given.tokenizer
        special = [one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None]
        return np.array((special or self.given.tokens("\n"))[:1], dtype=np.int64)

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Accuracy by context size and condition, for each subset."""
        return report(scores, self.options.contexts, self.options.rule, self.options.suffix_tokens)


def _others(examples: Sequence[Example]) -> list[Example | None]:
    """For each example one of the next work in its subset, never of its own, which may tell the end; None: none."""
    works: dict[str, dict[str, list[Example]]] = {}
    for example in examples:
        works.setdefault(example.subset, {}).setdefault(example.work, []).append(example)
    found: list[Example | None] = []
    for example in examples:
        names = list(works[example.subset])
        after = works[example.subset][names[(names.index(example.work) + 1) % len(names)]]
        found.append(after[example.number % len(after)] if len(names) > 1 else None)
    return found


def _score(
    scorer: Scorer,
    context: Sequence[int],
    foreign: Sequence[int] | None,
    suffixes: Sequence[Tokens],
    names: Sequence[str],
) -> dict[str, Any]:
    """Sums of losses after one context, by condition; and how much of it there is, and was forgotten."""
    before, rest = split(context, scorer.segment_tokens)
    lanes = [before]
    if foreign is not None:
        lanes.append(np.resize(np.array(foreign[-len(before) :] if len(before) else [], dtype=np.int64), len(before)))
    past = scorer.remember(*lanes)
    return {
        "num_tokens": len(context),
        "num_forgotten": past.forgotten,
        "sums": _sums(scorer, past, rest, suffixes, names),
    }


def _sums(
    scorer: Scorer, past: Any, before: Tokens, suffixes: Sequence[Tokens], names: Sequence[str]
) -> dict[str, list[float]]:
    """Sum of the losses of each suffix by condition; what stands before it in its segment is the same for all."""
    rows = [Row(np.concatenate([before, suffix]), len(suffix)) for suffix in suffixes]
    losses = scorer.losses(past, rows, names)
    return {name: [float(of_row.sum()) for of_row in losses[name]] for name in names}
