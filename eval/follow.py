"""Documents that are read in order, segment by segment, by the ranks of a memory group in turn.

Shapes: `B` documents, one a row; `T` segment tokens; `G` ranks of a memory group; `N` tokens of a document, and after
them what fills the last `G` segments up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eval.scorer import BACKBONE, LONGEST_WINDOW, MEMORY_OFF, OTHER_MEMORY, WINDOW_ONLY, How, Losses, Tokens
from pipeline.memory.exchange import Exchange
from pipeline.model.longmem import LongMem
from pipeline.model.loss import IGNORED
from pipeline.model.stream import Context, Seen, Stream


def follow(
    model: LongMem,
    exchange: Exchange,
    texts: Sequence[Tokens],
    *,
    first_scored: int,
    num_tokens: int,
    hows: Mapping[str, How],
    longest: int,
    on_read: Callable[[int], None],
) -> dict[str, list[Losses]]:
    """As `Scorer.follow`.

    Args:
        model: The model.
        exchange: The memory group, all of whose ranks call this together.
        texts: As there.
        first_scored: As there.
        num_tokens: As there.
        hows: As there.
        longest: Tokens of the longest ordinary window.
        on_read: Is told after each segment how many tokens this rank has read.

    Returns:
        As there.
    """
    reading = _Reading(model, exchange, texts, first_scored, num_tokens, hows)
    losses = reading.losses(on_read)
    for name, how in hows.items():
        if how.condition == LONGEST_WINDOW:
            losses[name] = reading.with_longest_window(min(longest, how.window_tokens or longest), on_read)
    return {
        name: [row.numpy() for row in exchange.all_gather(of_rank, purpose="scores")().sum(dim=0).double().cpu()]
        for name, of_rank in losses.items()
    }


class _Reading:
    """Some documents, one a row, with a bank of their own."""

    def __init__(
        self,
        model: LongMem,
        exchange: Exchange,
        texts: Sequence[Tokens],
        first_scored: int,
        num_tokens: int,
        hows: Mapping[str, How],
    ) -> None:
        self.model, self.exchange, self.segment_tokens = model, exchange, model.settings.segment_tokens
        self.stride, self.scored = exchange.size * self.segment_tokens, slice(first_scored, num_tokens)
        # The group's segments end together: what fills them up lies behind all that is read, and has no target.
        length = -(-num_tokens // self.stride) * self.stride
        self.tokens = torch.zeros(len(texts), length, dtype=torch.int64, device=model.device)  # [B, N]
        self.targets = torch.full_like(self.tokens, IGNORED)
        for text, tokens, targets in zip(texts, self.tokens, self.targets, strict=True):
            piece = torch.from_numpy(np.asarray(text[: num_tokens + 1], dtype=np.int64)).to(model.device)
            tokens[:num_tokens], targets[: len(piece) - 1] = piece[:num_tokens], piece[1:]
        self.documents = torch.arange(len(texts), device=model.device)[:, None].expand(-1, self.segment_tokens)
        self.partners = torch.arange(len(texts), device=model.device) ^ 1
        self.hows = {name: how for name, how in hows.items() if how.condition != LONGEST_WINDOW}
        bank = None
        if any(how.condition not in (BACKBONE, MEMORY_OFF) for how in self.hows.values()):
            remembered = min(model.settings.memory.tokens, num_tokens)
            bank = model.bank(len(texts), num_tokens=remembered, group_size=exchange.size)
        # A row is one document: within it scope `document` hides nothing, and `group` would show it the others'.
        self.stream = Stream(model, bank, exchange=exchange, settings=replace(model.read_settings, scope="lane"))
        self.readers = {name: self._reader(how) for name, how in self.hows.items()}

    def losses(self, on_read: Callable[[int], None]) -> dict[str, Tensor]:
        """Reads the documents to the end: this rank's losses, 0 where another rank has read, float32 `[B, scored]`."""
        found = {name: self._nothing() for name in self.hows}
        first = self.exchange.rank * self.segment_tokens
        for start in range(first, self.tokens.shape[1], self.stride):
            segment = slice(start, start + self.segment_tokens)
            before = slice(start - min(self.model.settings.context_tokens, start), start)
            context = Context(self.tokens[:, before], self.documents[:, :1].expand(-1, before.stop - before.start))
            seen = self.stream.feed(self.tokens[:, segment], self.documents, context)
            # Scoring is a matter of the whole group, though some of its segments may lie before what is scored.
            if start - first + self.stride > self.scored.start:
                for name, how in self.hows.items():
                    losses = self._losses(self.readers[name], how, seen, self.targets[:, segment])
                    if self.scored.start <= start < self.scored.stop:
                        at = start - self.scored.start
                        found[name][:, at : at + self.segment_tokens] = losses
            on_read(self.documents.numel())
        return found

    def with_longest_window(self, longest: int, on_read: Callable[[int], None]) -> Tensor:
        """Losses by the backbone alone with a window of so many tokens at most, float32 `[B, scored]`.

        Where not everything fits, each segment has what fits before it: its last token sees the whole window.

        The ranks of a group share the rows; each reads as many, one at a time.
        """
        group, scored, into = self.exchange, self.scored, self._nothing()
        length = scored.stop - scored.start if scored.stop <= longest else self.segment_tokens
        for row in range(group.rank, -(-len(self.tokens) // group.size) * group.size, group.size):
            one = slice(row % len(self.tokens), row % len(self.tokens) + 1)
            for start in range(scored.start, scored.stop, length):
                stop = min(start + length, scored.stop)
                before = min(start, max(0, longest - (stop - start)))
                tokens = self.tokens[one, start - before : stop]
                encoding = self.model.encode(tokens, None, num_context=before)
                found = self.model.backbone_losses(encoding, self.targets[one, start:stop])
                on_read(stop - start)
                if row < len(self.tokens):
                    into[one, start - scored.start : stop - scored.start] = found
        return into

    def _reader(self, how: How) -> Stream:
        """The same memory, read so."""
        settings = replace(self.model.read_settings, scope="lane")
        if how.memory_tokens is not None:
            settings = replace(settings, num_tokens=how.memory_tokens)
        if how.window_tokens is not None:
            settings = replace(settings, window_tokens=how.window_tokens)
        settings = replace(settings, window_tokens=min(settings.window_tokens, settings.num_tokens))
        return Stream(self.model, self.stream.bank, exchange=self.exchange, settings=settings)

    def _losses(self, reader: Stream, how: How, seen: Seen, targets: Tensor) -> Tensor:
        """Losses of one segment, nats, float32 `[B, T]`."""
        if how.condition == BACKBONE:
            return reader.backbone_losses(seen, targets)
        is_off = how.condition == MEMORY_OFF or how.memory_tokens == 0
        return reader.losses(
            seen,
            targets,
            memory="none" if is_off else "own",
            retrieves=how.condition != WINDOW_ONLY,
            # The window stays the row's own: what is borrowed is what retrieval gives.
            retrieve_from=self.partners if how.condition == OTHER_MEMORY else None,
        )

    def _nothing(self) -> Tensor:
        scored = self.scored.stop - self.scored.start
        return torch.zeros(len(self.tokens), scored, dtype=torch.float32, device=self.model.device)
