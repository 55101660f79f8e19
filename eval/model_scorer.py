"""The `Scorer` over a LongMem.

Shapes: `B` rows at once on a rank, `T` tokens of the longest, `P` tokens that were remembered, `E` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from eval.batches import Batch, Inputs, batches, most_tokens
from eval.follow import follow
from eval.scorer import (
    BACKBONE,
    CONDITIONS,
    LONGEST_WINDOW,
    MEMORY_OFF,
    MEMORY_ON,
    OTHER_MEMORY,
    WINDOW_ONLY,
    How,
    Likelihood,
    Losses,
    Row,
    Tokens,
)
from pipeline.distributed.groups import MemoryGroup
from pipeline.memory.exchange import exchange_of
from pipeline.model.longmem import LongMem
from pipeline.model.opened import OpenSegment, rows_of_past
from pipeline.model.stream import Context, Memory, Seen, Stream
from pipeline.sidenet.past import SideNetPast

EVERYTHING = 10**10  # a backbone that says nothing of the longest text that it was made for


@dataclass(frozen=True)
class Past:
    """Texts that were read into memory, each in a lane of its own; what is scored begins where they end.

    Attributes:
        stream: The memory.
        tokens: int64 `[lanes, P]`.
        forgotten: Tokens of each that memory has no room for any more.
        read: What the backbone alone keeps of a lane from a place on, by both: the last it was asked for.
    """

    stream: Stream
    tokens: Tensor
    forgotten: int
    read: dict[tuple[int, int], DynamicCache] = field(default_factory=dict)


def longest_window(config: Any, wanted: int | None) -> int:
    """Tokens of the longest ordinary window that a backbone is tried with; None: as many as it was made for."""
    most = getattr(config, "max_position_embeddings", None) or EVERYTHING
    return most if wanted is None else min(most, wanted)


@dataclass
class _Alike:
    """What all texts of a call begin with alike, read once for all its passes.

    Attributes:
        opened: The segment that it opens.
        seen: It.
        read: By condition: input of the LM head `[1, shared, E]`, and what the SideNet keeps.
        longest: What the backbone alone keeps with its longest window; and input of the LM head, if anything is alike.
    """

    opened: OpenSegment = field(default_factory=lambda: OpenSegment.empty(1))
    seen: Seen | None = None
    read: dict[str, tuple[Tensor, SideNetPast]] = field(default_factory=dict)
    longest: tuple[DynamicCache, list[Tensor]] | None = None


class ModelScorer:
    """A `Scorer` over a LongMem.

    Args:
        model: The model.
        group: This rank's memory group; None: this rank alone.
        longest: Tokens of the longest ordinary window; None: what the backbone was made for; 0: it is not tried.
        tokens_at_once: Tokens of texts, context included, in one forward pass of a rank.
        on_read: Is told after each forward pass how many tokens this rank has read in it.
    """

    def __init__(
        self,
        model: LongMem,
        group: MemoryGroup | None = None,
        *,
        longest: int | None = None,
        tokens_at_once: int = 8192,
        on_read: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        self.model, self._at_once, self.on_read = model, tokens_at_once, on_read
        self.exchange = exchange_of(None if group is None else group.process_group)
        self.segment_tokens = model.settings.segment_tokens
        self.longest = longest_window(model.backbone.model.config, longest)
        memory = model.settings.memory
        absent = set() if memory.enabled else {MEMORY_ON, OTHER_MEMORY, WINDOW_ONLY}
        absent |= set() if memory.window_tokens else {WINDOW_ONLY}
        absent |= set() if self.longest else {LONGEST_WINDOW}
        self.conditions = tuple(name for name in CONDITIONS if name not in absent)

    @torch.no_grad()
    def remember(self, *lanes: Tokens) -> Past:
        """As in `Scorer`."""
        model, segment, size = self.model, self.segment_tokens, self.exchange.size
        length = min(len(lane) for lane in lanes) // segment * segment
        kept = [np.asarray(lane[len(lane) - length :], dtype=np.int64) for lane in lanes]
        tokens = torch.from_numpy(np.stack(kept)).to(model.device)
        memory = model.settings.memory
        bank = None
        if memory.enabled:
            bank = model.bank(len(lanes), num_tokens=max(segment, min(memory.tokens, length)), group_size=size)
        # A row is one text: within it scope `document` hides nothing, and `group` would show it the others'.
        settings = replace(model.read_settings, scope="lane")
        stream = Stream(model, bank, exchange=self.exchange, settings=settings)
        past = Past(stream, tokens, max(0, length - memory.tokens))
        # The group's segments end together: what fills them up lies behind all that is read.
        filled = torch.zeros(len(lanes), -(-length // (segment * size)) * segment * size, dtype=torch.int64)
        filled = filled.to(model.device)
        filled[:, :length] = tokens
        for start in range(self.exchange.rank * segment, filled.shape[1], segment * size):
            documents = _lane_numbers(len(lanes), segment, model.device)
            stream.feed(filled[:, start : start + segment], documents, self._context(filled, start))
            self.on_read(documents.numel())
        return past

    @torch.no_grad()
    def losses(
        self, past: Past, rows: Sequence[Row], conditions: Sequence[str], *, lane: int = 0, other: int = 1
    ) -> dict[str, list[Losses]]:
        """As in `Scorer`."""
        return self._scores(past, rows, conditions, lane, other, self._losses)

    @torch.no_grad()
    def likelihoods(
        self, past: Past, rows: Sequence[Row], condition: str, *, lane: int = 0, other: int = 1
    ) -> list[Likelihood]:
        """As in `Scorer`."""

        def measure(hidden: Tensor, right: Tensor) -> Tensor:
            is_likeliest = self.model.likeliest(hidden) == right
            return torch.stack([self._losses(hidden, right), is_likeliest.float()], dim=1)

        found = self._scores(past, rows, [condition], lane, other, measure)[condition]
        return [Likelihood(one[:, 0], bool(one[:, 1].all())) for one in found]

    @torch.no_grad()
    def greedy(
        self,
        past: Past,
        prompts: Sequence[Tokens],
        condition: str,
        *,
        max_tokens: int,
        is_done: Callable[[list[int]], bool],
        guesses: Sequence[Sequence[int]] | None = None,
        lane: int = 0,
        other: int = 1,
    ) -> list[list[int]]:
        """As in `Scorer`."""
        written: list[list[int]] = [[] for _ in prompts]
        open_rows = list(range(len(prompts)))
        room = most_tokens(prompts) + max_tokens
        while open_rows:
            texts, tried = [], []
            for number in open_rows:
                guess = list(guesses[number]) if guesses else []
                done = written[number]
                tried.append(guess[len(done) : max_tokens - 1] if guess[: len(done)] == done else [])
                texts.append(np.array([*prompts[number], *done, *tried[-1]], dtype=np.int64))
            chosen = self._choices(past, texts, [len(one) for one in tried], condition, lane, other, room)
            for number, guess, choice in zip(open_rows, tried, chosen, strict=True):
                for place, token in enumerate(choice):
                    written[number].append(token)
                    is_as_guessed = place < len(guess) and guess[place] == token
                    if not is_as_guessed or len(written[number]) >= max_tokens or is_done(written[number]):
                        break
            open_rows = [n for n in open_rows if len(written[n]) < max_tokens and not is_done(written[n])]
        return written

    @torch.no_grad()
    def follow(
        self, texts: Sequence[Tokens], *, first_scored: int, num_tokens: int, hows: Mapping[str, How]
    ) -> dict[str, list[Losses]]:
        """As in `Scorer`."""
        return follow(
            self.model,
            self.exchange,
            texts,
            first_scored=first_scored,
            num_tokens=num_tokens,
            hows=hows,
            longest=self.longest,
            on_read=self.on_read,
        )

    def _choices(
        self,
        past: Past,
        texts: Sequence[Tokens],
        num_tried: Sequence[int],
        condition: str,
        lane: int,
        other: int,
        room: int,
    ) -> list[list[int]]:
        """The likeliest token at each of the last `num_tried + 1` places of every text."""
        found: list[list[int]] = []
        alike = _Alike()
        for part in self._batches(texts):
            for _, hidden in self._hidden(past, part, [condition], lane, other, room, alike):
                most = max(num_tried[number] for number in part.all_numbers) + 1
                last = torch.tensor([len(texts[number]) - 1 for number in part.numbers], device=hidden.device)
                places = (last[:, None] - torch.arange(most - 1, -1, -1, device=hidden.device)).clamp_min(0)
                wanted = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
                best = part.of_all_ranks(self.model.logits(wanted).argmax(dim=-1), self.exchange)  # [B, most]
                found += [best[number][most - 1 - num_tried[number] :].tolist() for number in best]
        return found

    def _batches(self, texts: Sequence[Tokens]) -> Iterator[Batch]:
        context = self.model.settings.context_tokens
        return batches(
            texts, self.exchange, num_context=context, tokens_at_once=self._at_once, device=self.model.device
        )

    def _losses(self, hidden: Tensor, right: Tensor) -> Tensor:
        return self.model.losses(hidden[None], right[None])[0]

    def _scores(
        self,
        past: Past,
        rows: Sequence[Row],
        conditions: Sequence[str],
        lane: int,
        other: int,
        measure: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, list[Any]]:
        """What is measured at the scored places alone, of hidden states `[n, E]` and targets `[n]`, for each row."""
        inputs, alike = Inputs.of(rows), _Alike()
        room = most_tokens([row.tokens for row in rows])
        found: dict[str, dict[int, Any]] = {name: {} for name in conditions}
        for part in self._batches(inputs.texts):
            where, targets = inputs.scored(part)
            for name, hidden in self._hidden(past, part, conditions, lane, other, room, alike):
                values = measure(hidden[where[0], where[2]], targets)
                found[name] |= inputs.collect(part, where, values, self.exchange)
        return {name: [of_row[number] for number in range(len(rows))] for name, of_row in found.items()}

    def _hidden(
        self, past: Past, part: Batch, conditions: Sequence[str], lane: int, other: int, room: int, alike: _Alike
    ) -> Iterator[tuple[str, Tensor]]:
        """Input of the LM head for texts that follow a past, under each condition, `[B, T, E]`.

        The longest window keeps so much `room` for a row, however many rows there are at once and however long.
        """
        ordinary = [name for name in conditions if name != LONGEST_WINDOW]
        if ordinary:
            yield from self._with_own_window(past, part, ordinary, lane, other, alike)
        if LONGEST_WINDOW in conditions:
            yield LONGEST_WINDOW, self._with_longest_window(past, lane, part, room, alike)

    def _with_own_window(
        self, past: Past, part: Batch, conditions: Sequence[str], lane: int, other: int, alike: _Alike
    ) -> Iterator[tuple[str, Tensor]]:
        """As `_hidden`; left context, and what texts begin with alike, are read once."""
        tokens, place = part.tokens, past.tokens.shape[1]
        documents, context = torch.full_like(tokens, lane), self._context(past.tokens, place, document=lane)
        if part.shared == 0:
            context = Context(*(each[lane].expand(len(tokens), -1) for each in context))
            seen = past.stream.look(tokens, documents, context, start=place)
            for name in conditions:
                yield name, self._read(past, seen, name, lane, other)
                self.on_read(tokens.numel())
            return
        head, tail = tokens[:1, : part.shared], tokens[:, part.shared :]
        if alike.seen is None:
            context = Context(*(each[lane : lane + 1] for each in context))
            alike.seen = past.stream.look(head, documents[:1, : part.shared], context, start=place, opened=alike.opened)
        everyone, rest = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device), None
        if tail.shape[1]:
            own = alike.opened.rows(everyone)
            rest = past.stream.look(tail, documents[:, part.shared :], start=place, opened=own)
        for name in conditions:
            if name not in alike.read:
                kept = SideNetPast()
                alike.read[name] = self._read(past, alike.seen, name, lane, other, kept), kept
                self.on_read(head.numel())
            hidden, kept = alike.read[name]
            hidden = hidden.expand(len(tokens), -1, -1)
            if rest is not None:
                found = self._read(past, rest, name, lane, other, rows_of_past(kept, everyone))
                hidden = torch.cat([hidden, found], dim=1)
            yield name, hidden
            self.on_read(tail.numel())

    def _read(
        self, past: Past, seen: Seen, condition: str, lane: int, other: int, kept: SideNetPast | None = None
    ) -> Tensor:
        if condition == BACKBONE:
            return self.model.backbone_hidden(seen.encoding)
        memory: Memory = "none"
        rows = torch.full((len(seen.documents),), lane, device=seen.documents.device)
        if condition != MEMORY_OFF:
            memory = rows
        return past.stream.hidden(
            seen,
            memory=memory,
            retrieve_from=torch.full_like(rows, other) if condition == OTHER_MEMORY else None,
            retrieves=condition != WINDOW_ONLY,
            at_one_place=True,
            past=kept,
        )

    def _with_longest_window(self, past: Past, lane: int, part: Batch, room: int, alike: _Alike) -> Tensor:
        """The backbone alone with all that it can take before each text; what they share is read once."""
        start = max(0, past.tokens.shape[1] - max(0, self.longest - room))
        if (lane, start) not in past.read:
            past.read.clear()  # what is written after a past reads it again and again: the newest is enough
            cache = DynamicCache(config=self.model.backbone.model.config)
            if start < past.tokens.shape[1]:
                self.model.encode(past.tokens[lane : lane + 1, start:], None, cache=cache)
            past.read[lane, start] = cache
        if alike.longest is None:
            own, head = copy.deepcopy(past.read[lane, start]), part.tokens[:1, : part.shared]
            alike.longest = own, [self._backbone_hidden(head, own)] if part.shared else []
        before, hidden = alike.longest
        found = []
        for row in part.tokens[:, None, part.shared :]:
            rest = [self._backbone_hidden(row, copy.deepcopy(before))] if row.shape[1] else []
            found.append(torch.cat([*hidden, *rest], dim=1))
        return torch.cat(found)

    def _backbone_hidden(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """What the backbone alone says of tokens after what it keeps, to which they are added."""
        hidden = self.model.backbone_hidden(self.model.encode(tokens, None, cache=cache))
        self.on_read(tokens.numel())
        return hidden

    def _context(self, tokens: Tensor, start: int, *, document: int | None = None) -> Context:
        """The left context of a segment."""
        before = tokens[:, start - min(self.model.settings.context_tokens, start) : start]
        documents = _lane_numbers(len(before), before.shape[1], before.device)
        return Context(before, documents if document is None else torch.full_like(documents, document))


def _lane_numbers(num_lanes: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.arange(num_lanes, device=device)[:, None].expand(-1, num_tokens)
