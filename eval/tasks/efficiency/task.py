"""Efficiency: tokens a second and peak memory by length, of full attention and of LongMem. Needs no data.

Source: the table of LongMem (Wang et al., 2023) on speed and memory: a dense model that attends to a whole text against
one with a part of it in its window and the rest in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from eval.model_scorer import ModelScorer
from eval.report import Section
from eval.runner import EvaluationError
from eval.scorer import Scorer
from eval.sentences import sentences
from eval.task import Given, Item, Scores, Task, TaskOptions
from eval.tasks.efficiency.cost import Cost, cost_of, read_in_segments, read_with_full_attention
from eval.tasks.efficiency.report import FORWARD, FULL, LABELS, TRAINING, efficiency_section
from pipeline.config.kinds import Count, Factor
from pipeline.config.kinds import Tokens as TokenCount
from pipeline.distributed.ranks import world_size
from pipeline.memory.room import room_on
from pipeline.model.longmem import LongMem

MOST_OF_ROOM = 0.9
_FITS, _TOO_SLOW, _TOO_LARGE = range(3)


class EfficiencyOptions(TaskOptions):
    """What is timed."""

    lengths: tuple[TokenCount, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of the texts, rounded up to whole segments."""
    rounds: Count = 3
    """How often everything is measured, taking turns."""
    most_seconds: Factor = 120.0
    """A length is left out where it would take longer: the backbone the square of what it took for a shorter one."""


class Efficiency(Task[EfficiencyOptions]):
    """Tokens a second and peak memory by length: the backbone with full attention, and LongMem. Data: none."""

    name = "efficiency"
    options_class = EfficiencyOptions
    small: ClassVar[Mapping[str, Any]] = {"lengths": [512, 1024, 2048], "rounds": 1}
    deterministic = False
    _is_warm = False

    def items(self) -> Sequence[Item]:
        """Rounds, each of which measures everything in turn."""
        if not self.options.lengths:
            raise EvaluationError("efficiency has nothing to measure", do="name lengths, such as 1024,2048")
        self._text = sentences(self.given.tokens, self._lengths[-1], seed=0)
        return [Item(f"round {number}", number) for number in range(self.options.rounds)][: self.options.limit]

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """What everything cost in one round."""
        if not isinstance(scorer, ModelScorer):
            raise EvaluationError(
                "efficiency measures a model itself", got=type(scorer).__name__, expected="a ModelScorer"
            )
        # DeepSpeed's engines train the SideNet only, and nothing trains a partitioned backbone.
        modes = (FORWARD,) if world_size() > 1 else (FORWARD, TRAINING)
        lengths = self._lengths
        text = torch.from_numpy(self._text)[None].to(scorer.model.device)
        if not self._is_warm:
            for mode in modes:
                for system in LABELS:
                    _reader(scorer, system, mode)(text[:, : lengths[0]])
            self._is_warm = True
        found: dict[str, Any] = {}
        for mode in modes:
            turns = _Turns(scorer, mode, self.options.most_seconds, is_eager=self._is_eager)
            for number, length in enumerate(lengths):
                systems = list(LABELS)
                for system in systems if (number + item.content) % 2 == 0 else systems[::-1]:
                    turns.measure(system, text[:, :length])
                    scorer.on_read(length)
            found[mode] = turns.found
        return {"costs": found, "device": str(scorer.model.device), "ranks": world_size()}

    @property
    def _lengths(self) -> list[int]:
        segment = self.given.config.train.segment_tokens
        return sorted({-(-length // segment) * segment for length in self.options.lengths})

    @property
    def _is_eager(self) -> bool:
        return self.given.config.backbone.attention == "eager"

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Medians over rounds."""
        rounds, first = list(scores.values()), next(iter(scores.values()))
        rule = _rule(first, len(rounds), self.given)
        return efficiency_section([one["costs"] for one in rounds], rule, first["device"], first["ranks"])


def _rule(first: Scores, num_rounds: int, given: Given) -> str:
    config, host = given.config, "resident memory of the process"
    rules = [
        f"Medians of {num_rounds} round(s), in which all take turns in one process, after a warm-up, on "
        f"{first['device']}; one text of sentences that are made up, read from beginning to end, each token scored.",
        "The backbone attends to all of it in one pass.",
        f"LongMem reads segments of {config.train.segment_tokens} tokens, each encoded with the "
        f"{config.backbone.context_tokens} before it"
        + (
            f", with a recent window of {config.memory.window_tokens} and the rest in memory, which holds "
            f"{config.memory.tokens:,} tokens: of longer texts it forgets the beginning."
            if config.memory.enabled
            else "; memory is off."
        ),
        "Weights of backbone and SideNet are there all the time. "
        f"Memory: {'bytes allocated on the accelerator' if 'cuda' in first['device'] else host}.",
        f"Beyond {given.longest:,} tokens, the longest window, only the cost of full attention is meant.",
    ]
    if TRAINING in first["costs"]:
        rules.append(
            "Training: forward and backward, no optimizer; the backbone works out gradients of all its weights but the "
            "LM head's, LongMem those of its SideNet, after each segment."
        )
    if first["ranks"] > 1:
        rules.append(
            f"{first['ranks']} ranks: memory groups wait for each other in the backbone, and that counts; every rank "
            "reads the whole text with full attention, and its part of the segments."
        )
    return " ".join(rules)


class _Turns:
    """Measures texts that get longer, until they take too long or too much.

    Args:
        scorer: The model.
        mode: `forward` or `training`.
        most_seconds: Longest time.
        is_eager: Whether attention holds its weights.

    Attributes:
        found: By system and length, plain JSON.
    """

    def __init__(self, scorer: ModelScorer, mode: str, most_seconds: float, *, is_eager: bool) -> None:
        self._scorer, self._mode, self._most_seconds, self._is_eager = scorer, mode, most_seconds, is_eager
        self._last: dict[str, tuple[int, Cost]] = {}
        self.found: dict[str, dict[str, Any]] = {system: {} for system in LABELS}

    def measure(self, system: str, tokens: Tensor) -> None:
        """Measures one system, or says why not."""
        length = tokens.shape[1]
        reason = self._why_not(system, length)
        if reason is None:
            try:
                cost = cost_of(partial(_reader(self._scorer, system, self._mode), tokens), self._scorer.model.device)
            except (RuntimeError, MemoryError) as error:
                if world_size() > 1 or "memory" not in str(error):
                    raise
                reason = "there was not enough memory"
        if reason is None:
            self._last[system] = length, cost
            self.found[system][str(length)] = asdict(cost)
            return
        self.found[system][str(length)] = {"left_out": reason}

    def _why_not(self, system: str, length: int) -> str | None:
        """Why a length is left out, the same on all ranks of a group; None: it is not."""
        left_out = [one for one, cost in self.found[system].items() if "left_out" in cost]
        if left_out:
            return f"so was {int(left_out[0]):,}"
        model = self._scorer.model
        most = getattr(model.backbone.model.config, "max_position_embeddings", None)
        if system == FULL and model.backbone.family.positions == "learned" and most and length > most:
            return f"the backbone has {most:,} positions"
        if system not in self._last:
            return None
        before, cost = self._last[system]
        seconds, needed = expected(cost, length / before, is_full=system == FULL, is_eager=self._is_eager)
        room = room_on(model.device)
        verdict = _TOO_SLOW if seconds > self._most_seconds else _FITS
        if needed is not None and room is not None and needed > MOST_OF_ROOM * room.free:
            verdict = _TOO_LARGE
        verdicts = self._scorer.exchange.all_gather(torch.tensor(verdict, device=model.device), purpose="scores")()
        return {
            _FITS: None,
            _TOO_SLOW: f"up to {seconds:,.0f} s would be more than efficiency.most_seconds, {self._most_seconds:,.0f}",
            _TOO_LARGE: f"about {(needed or 0) / 2**30:,.1f} GiB do not fit into the memory that is free",
        }[int(verdicts.max())]


def expected(cost: Cost, ratio: float, *, is_full: bool, is_eager: bool) -> tuple[float, float | None]:
    """What a text so many times as long may well cost.

    Args:
        cost: Of the shorter text.
        ratio: How many times as long the other is.
        is_full: Whether every token attends to all before it.
        is_eager: Whether attention holds its weights, too.

    Returns:
        Seconds at most, and bytes beside what is there; None where that cannot be known.
    """
    grown = cost.grown_bytes
    needed = None if grown is None else grown * (ratio**2 if is_full and is_eager else ratio)
    return cost.seconds * (ratio**2 if is_full else ratio), needed


def _reader(scorer: ModelScorer, system: str, mode: str) -> Callable[[Tensor], Tensor]:
    model: LongMem = scorer.model
    if system == FULL:
        return partial(read_with_full_attention, model, trains=mode == TRAINING)
    return partial(read_in_segments, model, scorer.exchange, trains=mode == TRAINING)
