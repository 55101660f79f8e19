"""Answers, one after another: a dialogue as one stream that goes on, whose earlier turns are remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from pipeline.errors import DataError
from pipeline.face import checks
from pipeline.face.cache import LongMemCache
from pipeline.face.looking import Lane, Peaks, watching
from pipeline.face.memory import Memory
from pipeline.face.model import LongMemForCausalLM
from pipeline.face.remembering import begun, start_of

_ANSWER = "AN-ANSWER-STANDS-HERE"


class Shown(NamedTuple):
    """A chunk that an answer looked up."""

    document: str
    text: str
    distance: int
    """From the answer's first token back to the chunk's, in tokens."""
    share: float
    """The largest that a token of the answer gave it: of the token's attention in a layer, mean over heads."""
    layer: int
    """The memory layer, counted from 1."""


class Talk:
    """A stream that is asked and answers.

    Args:
        model: The model.
        tokenizer: Turns text into ids; its chat template is what turns are put into.
        memories: What comes before, one after another.
        reads_memory: Whether memory is read at all, its own past too.
        is_plain: Whether text is gone on with as it is, without a chat template.

    Raises:
        LongMemMemoryError: A memory is of another model.
    """

    def __init__(
        self,
        model: LongMemForCausalLM,
        tokenizer: Any,
        memories: Sequence[Memory] = (),
        *,
        reads_memory: bool = True,
        is_plain: bool = False,
    ) -> None:
        for memory in memories:
            memory.check(model.memory_kind)
        self._model, self._tokenizer = model, tokenizer
        self._has_template = not is_plain and bool(getattr(tokenizer, "chat_template", None))
        start = start_of(model.longmem, memories)
        reads_memory = reads_memory and model.longmem.settings.memory.enabled
        self._cache = LongMemCache()
        self._cache.begin(begun(model.longmem, start, reads_memory=reads_memory), None)
        self._lane = Lane(memories, start, tokenizer, own_name="this dialogue")
        self._unread: list[int] = []  # the last token of an answer: nothing has come after it yet
        self._has_begun = False
        self._peaks = Peaks()
        self._answered_at = self._lane.place

    @torch.no_grad()
    def answer(
        self,
        text: str,
        *,
        way: Mapping[str, Any],
        streamer: Any = None,
        is_stopped: Callable[[], bool] = lambda: False,
        watch: bool = False,
    ) -> str:
        """Reads a turn and answers it.

        Args:
            text: What is said.
            way: How tokens are chosen, as `generate` takes it.
            streamer: Is given the tokens as they come.
            is_stopped: Asked after each token whether the answer ends there.
            watch: Whether `looked_up` will be asked.

        Returns:
            The answer.

        Raises:
            DataError: The text is empty, or longer than memory and window.
        """
        if not text.strip():
            raise DataError("the prompt is empty", got=repr(text), do="write something")
        new = [*self._unread, *self._turn(text)]
        self._cache.count_anew()
        self._peaks = Peaks()
        sidenet = self._model.longmem.sidenet
        with ExitStack() as stack:
            if watch:
                stack.enter_context(watching(sidenet, list(sidenet.fusions), self._peaks.note))
            ids = torch.tensor([new], device=self._model.longmem.device)
            whole = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self._cache,
                use_cache=True,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Asked(is_stopped)]),
                eos_token_id=self._ends(),
                pad_token_id=self._ends()[0] if self._ends() else 0,
                **way,
            )[0].tolist()
        made = whole[len(new) :]
        self._answered_at = self._lane.place + len(new)
        self._lane.read += whole[:-1]
        self._unread, self._has_begun = whole[-1:], True
        return str(self._tokenizer.decode(made, skip_special_tokens=True))

    def looked_up(self, count: int) -> list[Shown]:
        """The chunks that a token of the last answer gave most of its attention to, if it was watched."""
        size = self._model.longmem.settings.memory.chunk_size
        return [
            Shown(*self._lane.chunk(one.place, size), self._answered_at - one.place, one.share, one.layer)
            for one in self._peaks.largest(count)
        ]

    def _ends(self) -> list[int]:
        """Tokens that an answer ends with."""
        known = self._model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        return sorted({number for number in (*known, self._tokenizer.eos_token_id) if number is not None})

    def _turn(self, text: str) -> list[int]:
        """The ids of what is said, from the end of the last answer to the begin of the next."""
        if self._has_template:
            said = {"role": "user", "content": text}
            turns = [said]
            if self._has_begun:  # templates say how a turn follows an answer, whatever came before
                turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}, said]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            text = text.split(_ANSWER, 1)[1] if self._has_begun else text
            ended = self._tokenizer.decode(self._unread)
            if self._unread and self._unread[0] in self._ends() and text.startswith(ended):
                text = text.removeprefix(ended)
        elif self._has_begun:
            text = f"\n{text}"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        checks.check_ids(torch.tensor([ids], dtype=torch.int64), self._model.config.vocab_size)
        return ids


class _Asked(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._is_stopped(), dtype=torch.bool, device=input_ids.device)
