"""Recall: a passkey asked for, and a passage read again, long after they were read. Needs no data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from eval.documents import data_of_run, open_stores
from eval.report import Section
from eval.runner import EvaluationError
from eval.scorer import OTHER_MEMORY, How, Scorer, Tokens, split
from eval.task import Given, Item, Scores, Task, TaskOptions
from eval.tasks.recall.passkey import MAX_TOKENS, Passkey, PasskeyMaker, first_integer, is_decided, keys, most_digits
from eval.tasks.recall.read_again import Source, made_up, of_stores, place_of_second, read_once, read_twice
from eval.tasks.recall.report import recall_section
from pipeline.config.kinds import Count, Fraction
from pipeline.config.kinds import Tokens as TokenCount
from pipeline.errors import DataError

logger = logging.getLogger(__name__)
Thing = TypeVar("Thing")


class RecallOptions(TaskOptions):
    """What is hidden where."""

    lengths: tuple[TokenCount, ...] = (1024, 4096, 16384, 65536)
    """Tokens of texts with a passkey, question included; [] leaves passkeys out."""
    depths: tuple[Fraction, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the passkey stands, from 0 (beginning) to 1 (end)."""
    keys: Count = 4
    """Passkeys, each in a text of its own, for each length and depth."""
    distances: tuple[TokenCount, ...] = (1000, 4000, 16000, 64000)
    """Tokens from the beginning of a passage to that of its second reading; [] leaves passages out."""
    passages: Count = 4
    """Passages, each read again at every distance."""
    passage_tokens: TokenCount = 512
    """Tokens of a passage; its first one is not scored."""
    seed: int = 0
    """Of keys and of sentences that are made up."""


@dataclass(frozen=True)
class Passages:
    """Passages that lend each other their memories; those after `num_scored` only lend.

    Attributes:
        names: Of each.
        tokens: int64 `[P]` each.
        filler: As in `Source`.
        source: Name of the source.
        num_scored: How many are scored.
    """

    names: Sequence[str]
    tokens: Sequence[Tokens]
    filler: Tokens
    source: str
    num_scored: int


class Recall(Task[RecallOptions]):
    """Passkeys over lengths and depths, and passages read again over distances. Data: a token store for passages."""

    name = "recall"
    options_class = RecallOptions
    small: ClassVar[Mapping[str, Any]] = {
        "lengths": [1056, 2080],  # a little more than whole segments: what is read for each token written is short
        "depths": [0.0, 0.5, 1.0],
        "keys": 1,
        "distances": [1000, 2000],
        "passages": 2,
        "passage_tokens": 256,
    }

    def __init__(self, options: RecallOptions, given: Given) -> None:
        super().__init__(options, given)
        self._guess: dict[str, list[int]] = {}
        self._digits_a_token = most_digits(given.tokenizer.get_vocab())

    def items(self) -> Sequence[Item]:
        """Two passkey texts of one length an item, then two passages an item, which lend each other their memories."""
        options = self.options
        if not (options.lengths and options.depths) and not options.distances:
            raise EvaluationError("recall has nothing to do", do="name lengths and depths, or distances")
        if len(options.data) > 1:
            raise EvaluationError("recall reads one token store", got=", ".join(options.data), do="name one of them")
        memory = self.given.config.memory.tokens
        if beyond := [f"{one:,}" for one in (*options.lengths, *options.distances) if one > memory]:
            logger.warning(
                "recall: of %s tokens memory, which holds %s, forgets the beginning", ", ".join(beyond), f"{memory:,}"
            )
        found = [*self._passkey_items(), *self._passage_items()]
        return found[: options.limit]

    def score(self, item: Item, scorer: Scorer) -> Scores:
        """What is answered, or the losses of both readings, under every condition."""
        if isinstance(item.content, Passages):
            return self._read_again(item.content, scorer)
        texts, num_scored = item.content
        return {text.name: one for text, one in zip(texts, self._ask(texts, num_scored, scorer), strict=False)}

    def report(self, scores: Mapping[str, Scores]) -> Section:
        """Accuracy by length and depth, and loss by distance."""
        parts = [one for item in scores.values() for one in item.values()]
        asked = [one for one in parts if "answers" in one]
        again = [one for one in parts if "again" in one]
        return recall_section(asked, again, memory_tokens=self.given.config.memory.tokens, longest=self.given.longest)

    def _passkey_items(self) -> list[Item]:
        options, items = self.options, []
        maker = PasskeyMaker(self.given.tokens)
        for length in dict.fromkeys(options.lengths):
            places = [(depth, number) for depth in dict.fromkeys(options.depths) for number in range(options.keys)]
            drawn = keys(len(places), seed=f"{options.seed}/{length}")
            texts = [
                maker.make(f"passkey/{length}/{depth:g}/{number}", length=length, depth=depth, key=key)
                for (depth, number), key in zip(places, drawn, strict=True)
            ]
            for pair, num_scored in _pairs(texts):
                items.append(Item(" ".join(text.name for text in pair[:num_scored]), (pair, num_scored)))
        return items

    def _passage_items(self) -> list[Item]:
        options = self.options
        if not options.distances:
            return []
        if min(options.distances) < options.passage_tokens or options.passage_tokens == 1:
            raise EvaluationError(
                "recall.distances has one shorter than a passage, or a passage has one token only",
                got=f"{min(options.distances)} and recall.passage_tokens {options.passage_tokens}",
                expected="passages of 2 tokens or more, and distances of as many",
                do="raise the distance, or set recall.passage_tokens to another number",
            )
        source = self._source()
        items = []
        for pair, num_scored in _pairs(list(enumerate(source.passages))):
            names = [f"passage/{source.identity}/{number}" for number, _ in pair]
            content = Passages(names, [tokens for _, tokens in pair], source.filler, source.name, num_scored)
            items.append(Item(" ".join(names[:num_scored]), content))
        return items

    def _source(self) -> Source:
        """Held-out text of the run where there is enough of it, sentences otherwise; of the store that is named."""
        options, config = self.options, self.given.config
        sizes = {
            "num_passages": options.passages,
            "passage_tokens": options.passage_tokens,
            "filler_tokens": place_of_second(max(options.distances), config.train.segment_tokens),
        }
        try:
            paths = options.data or data_of_run(config, "validation")
            return of_stores(open_stores(paths, self.given.tokenizer, split="validation"), **sizes)
        except DataError as error:
            if options.data:
                raise
            logger.info("recall: passages are made up, for the run's held-out text cannot be used: %s", error)
            return made_up(self.given.tokens, seed=options.seed, **sizes)

    def _ask(self, texts: Sequence[Passkey], num_scored: int, scorer: Scorer) -> list[dict[str, Any]]:
        cuts = [split(text.tokens, scorer.segment_tokens) for text in texts]
        past = scorer.remember(*(before for before, _ in cuts))
        forgotten = max(0, len(cuts[0][0]) - self.given.config.memory.tokens)
        found = []
        for lane, text in enumerate(texts[:num_scored]):
            written = {}
            for name in scorer.conditions:
                if name == OTHER_MEMORY and len(texts) == 1:
                    continue
                (tokens,) = scorer.greedy(
                    past,
                    [cuts[lane][1]],
                    name,
                    max_tokens=MAX_TOKENS,
                    is_done=partial(self._is_decided, text.key),
                    guesses=[self._guess.get(name, text.answer)],
                    lane=lane,
                    other=1 - lane,
                )
                written[name] = self._text(tokens)
                # Who does not find the key writes the same as the last time: a guess saves passes, nothing else.
                self._guess[name] = tokens
                if first_integer(written[name]) == text.key:
                    del self._guess[name]
            found.append(
                {
                    "length": len(text.tokens),
                    "depth": text.depth,
                    "key": text.key,
                    "forgotten": forgotten,
                    "key_is_forgotten": text.line[1] <= forgotten,
                    "answers": {name: first_integer(one) for name, one in written.items()},
                    "written": written,
                }
            )
        return found

    def _is_decided(self, key: int, written: list[int]) -> bool:
        is_at_end = self.given.tokenizer.eos_token_id in written
        num_left, most = MAX_TOKENS - len(written), self._digits_a_token
        return is_at_end or is_decided(self._text(written), key, num_left=num_left, digits_a_token=most)

    def _text(self, written: Sequence[int]) -> str:
        """What was written, up to the end of the text if that was."""
        tokenizer, whole = self.given.tokenizer, list(written)
        if tokenizer.eos_token_id in whole:
            whole = whole[: whole.index(tokenizer.eos_token_id)]
        return str(tokenizer.decode(whole, skip_special_tokens=True))

    def _read_again(self, passages: Passages, scorer: Scorer) -> Scores:
        hows = {name: How(name) for name in scorer.conditions if name != OTHER_MEMORY or len(passages.tokens) > 1}
        segment, scored, filler = scorer.segment_tokens, self.options.passage_tokens - 1, passages.filler

        def read(texts: Sequence[Tokens], start: int) -> Mapping[str, list[float]]:
            losses = scorer.follow(texts, first_scored=start, num_tokens=len(texts[0]), hows=hows)
            # What comes after a passage is none of it: the same tokens are scored in both readings.
            return {name: [float(row[:scored].mean()) for row in rows] for name, rows in losses.items()}

        first = read([read_once(tokens, filler, segment_tokens=segment) for tokens in passages.tokens], 0)
        again = {}
        for distance in dict.fromkeys(self.options.distances):
            texts = [
                read_twice(tokens, filler, distance=distance, segment_tokens=segment) for tokens in passages.tokens
            ]
            again[distance] = read(texts, place_of_second(distance, segment))
        return {
            passages.names[row]: {
                "source": passages.source,
                "num_tokens": scored,
                "first": {name: values[row] for name, values in first.items()},
                "again": {
                    str(distance): {name: values[row] for name, values in one.items()}
                    for distance, one in again.items()
                },
            }
            for row in range(passages.num_scored)
        }


def _pairs(things: Sequence[Thing]) -> list[tuple[Sequence[Thing], int]]:
    """Two by two, and how many of each are scored: the last of an odd number borrows the first, if it is not alone."""
    found: list[tuple[Sequence[Thing], int]] = []
    for at in range(0, len(things), 2):
        pair = things[at : at + 2]
        found.append((pair, 2) if len(pair) == 2 else ([*pair, *things[:1]] if at else pair, 1))
    return found
