"""LongMem as a model of lm-evaluation-harness: context goes into memory, logits are made for what is asked alone.

Importing this registers `longmem`; `python -m eval.lm_eval` is the harness's command line with it. `lm_eval.models` is
imported, too: version 0.4.13 registers its own models only when they are asked for while there are none.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lm_eval.models  # noqa: F401  (fills the registry)
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from eval.adapters.loading import load, take_arguments
from eval.runner import EvaluationError
from eval.scorer import MEMORY_ON, OTHER_MEMORY, How, Row, Scorer, Tokens, split

logger = logging.getLogger(__name__)
MAX_WRITTEN = 256  # of a task that says nothing, as the harness's own models do
ROWS_A_CALL = 64  # so that the progress bar moves, and the harness's cache has answers before the end
GREEDY = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k"}  # what writing greedily may be told


@dataclass(frozen=True)
class Writing:
    """How a text is written on, greedily.

    Attributes:
        until: Strings that end it, and are not part of it.
        max_tokens: Written at most.
    """

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Writing:
        """From a task's `generation_kwargs`. Raises EvaluationError: it is not greedy, or not known."""
        wanted = dict(normalize_gen_kwargs(dict(arguments), MAX_WRITTEN))
        unknown = sorted(wanted.keys() - GREEDY)
        if wanted.get("do_sample") or unknown:
            raise EvaluationError(
                "a task asks for what longmem does not write: it takes the likeliest token each time",
                got=", ".join(f"{key}={wanted[key]!r}" for key in unknown or ["do_sample", "temperature"]),
                expected="do_sample=False or temperature=0, until and max_gen_toks",
                do="add --gen_kwargs do_sample=False,temperature=0, or leave the task out",
            )
        return cls(tuple(stop for stop in wanted["until"] if stop), wanted["max_gen_toks"])


class LongMemLM(TemplateLM):
    """A model that reads what is too long for it into memory.

    Segments are cut as training cuts them: the whole segments of a context are remembered, its last 1 to
    `segment_tokens` tokens begin the row that is scored or written on. Requests that follow the same past are rows of
    one memory. What a row scores or writes beyond a segment is remembered in its turn.

    Args:
        scorer: The model.
        tokenizer: The backbone's.
        condition: How past text is read, of `scorer.conditions`; not the memory of another document.
        documents_at_once: Documents that `loglikelihood_rolling` reads side by side.
        about: What the report says of the model, plain JSON.

    Raises:
        EvaluationError: There is no such condition, or the tokenizer has no token to begin a text with.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        condition: str = MEMORY_ON,
        documents_at_once: int = 1,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self.condition = scorer, tokenizer, condition
        self._documents_at_once, self._about, self._forgotten = documents_at_once, dict(about or {}), 0
        there = [name for name in scorer.conditions if name != OTHER_MEMORY]
        if condition not in there:
            raise EvaluationError(
                "the model cannot be read under this condition",
                got=f"condition={condition}",
                expected=", ".join(there),
                do="name one of these in --model_args",
            )
        if self.prefix_token_id is None:
            raise EvaluationError(
                "the tokenizer has neither a first nor a last token: nothing predicts the first token of a text",
                got=tokenizer.name_or_path,
                do="name another with --model_args tokenizer=PATH",
            )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LongMemLM:
        """As `create_from_arg_obj`, of `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LongMemLM:
        """Loads a model.

        Args:
            arg_dict: `--model_args`: those of `eval.adapters.loading.Arguments`, and settings of the run, such as
                `memory.tokens`.
            additional_config: `device` (`cpu`, or the accelerator if there is one) and `batch_size`: documents that
                `loglikelihood_rolling` reads side by side. Other requests are put together by `tokens_at_once`.

        Returns:
            The model.

        Raises:
            LongMemError: An argument is wrong, or model or backbone cannot be loaded.
        """
        added = additional_config or {}
        arguments = take_arguments(arg_dict)
        scorer, tokenizer, about = load(arguments, device=str(added.get("device") or ""))
        size = str(added.get("batch_size") or 1)
        about["condition"] = arguments.condition
        return cls(
            scorer,
            tokenizer,
            condition=arguments.condition,
            documents_at_once=int(size) if size.isdecimal() else 1,
            about={f"longmem_{key}": value for key, value in about.items()},
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text of which the first token is scored: as in the harness's `hf`."""
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer came from."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's tokens, with special ones as in the harness's `hf`: those that the tokenizer adds, never twice."""
        del kwargs
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return self._about

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-likelihood after the context, and whether greedy decoding would write it."""
        del kwargs
        rows: dict[bytes, list[tuple[int, Row]]] = defaultdict(list)
        found, left = [(0.0, True)] * len(requests), [0] * len(requests)
        for number, (_, context, continuation) in enumerate(requests):
            for past, row in self._rows(context or [self.prefix_token_id], continuation):
                rows[past.tobytes()].append((number, row))
                left[number] += 1
        bar = tqdm(total=len(requests), desc="loglikelihood requests", disable=disable_tqdm)
        for past_bytes, all_rows in rows.items():
            all_rows.sort(key=lambda one: -len(one[1].tokens))
            past = self._remember(np.frombuffer(past_bytes, dtype=np.int64))
            for at in range(0, len(all_rows), ROWS_A_CALL):
                part = all_rows[at : at + ROWS_A_CALL]
                likelihoods = self.scorer.likelihoods(past, [row for _, row in part], self.condition)
                for (number, _), one in zip(part, likelihoods, strict=True):
                    total, is_greedy = found[number]
                    found[number] = (total - float(one.losses.sum()), is_greedy and one.is_likeliest)
                    left[number] -= 1
                    if not left[number]:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                        bar.update()
        bar.close()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of documents, each read in order, every token of it predicted.

        Args:
            requests: Their arguments are a text.
            disable_tqdm: Whether there is no progress bar.

        Returns:
            Of each document: the sum over its tokens, the first one predicted by `prefix_token_id`.
        """
        segment, found = self.scorer.segment_tokens, [0.0] * len(requests)
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        by_segments: dict[int, list[int]] = defaultdict(list)
        for number, text in enumerate(texts):
            if len(text) > 1:
                by_segments[-(-(len(text) - 1) // segment)].append(number)
        bar = tqdm(total=len(requests), desc="loglikelihood_rolling requests", disable=disable_tqdm)
        for num_segments, numbers in sorted(by_segments.items(), reverse=True):
            length = num_segments * segment
            for at in range(0, len(numbers), self._documents_at_once):
                part = numbers[at : at + self._documents_at_once]
                # `follow` takes one document or an even number. What fills them up lies behind all that is counted.
                whole = part + part[:1] if len(part) > 1 and len(part) % 2 else part
                filled = [np.pad(np.array(texts[number]), (0, length + 1 - len(texts[number]))) for number in whole]
                how = {self.condition: How(self.condition)}
                losses = self.scorer.follow(filled, first_scored=0, num_tokens=length, hows=how)[self.condition]
                for number, of_text in zip(part, losses, strict=False):
                    found[number] = -float(of_text[: len(texts[number]) - 1].sum())
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, found[number])
                    bar.update()
        bar.close()
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after contexts of any length, the likeliest token at a time.

        Args:
            requests: Their arguments are a context and `generation_kwargs`.
            disable_tqdm: Whether there is no progress bar.

        Returns:
            Texts, up to the first of the task's `until` or the last token of a text.

        Raises:
            EvaluationError: A task does not want greedy decoding.
        """
        segment = self.scorer.segment_tokens
        ways = [Writing.of(request.args[1]) for request in requests]
        texts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        written: list[list[int]] = [[] for _ in requests]
        said = [""] * len(requests)
        unfinished = set(range(len(requests)))
        bar = tqdm(total=len(requests), desc="generate_until requests", disable=disable_tqdm)
        while unfinished:
            alike: dict[tuple[bytes, Writing, tuple[int, ...]], list[tuple[int, Tokens]]] = defaultdict(list)
            for number in sorted(unfinished):
                before, prompt = split([*texts[number], *written[number]], segment)
                alike[before.tobytes(), ways[number], tuple(written[number])].append((number, prompt))
            for (past, way, so_far), rows in alike.items():
                new = self.scorer.greedy(
                    self._remember(np.frombuffer(past, dtype=np.int64)),
                    [prompt for _, prompt in rows],
                    self.condition,
                    max_tokens=min(segment, way.max_tokens - len(so_far)),
                    is_done=partial(self._is_over, way, so_far),
                )
                for (number, _), tokens in zip(rows, new, strict=True):
                    written[number] += tokens
                    if len(written[number]) >= way.max_tokens or self._is_over(way, (), written[number]) or not tokens:
                        text = self.tokenizer.decode(written[number], skip_special_tokens=True)
                        said[number] = postprocess_generated_text(str(text), list(way.until), None)
                        self.cache_hook.add_partial("generate_until", requests[number].args, said[number])
                        unfinished.remove(number)
                        bar.update()
        bar.close()
        return said

    def _rows(self, context: list[int], continuation: list[int]) -> Iterator[tuple[Tokens, Row]]:
        """A continuation as rows of at most a segment of scored tokens, each with its past of whole segments."""
        segment = self.scorer.segment_tokens
        for start in range(0, len(continuation), segment):
            piece = continuation[start : start + segment]
            past, rest = split([*context, *continuation[:start]], segment)
            yield past, Row(np.array([*rest, *piece], dtype=np.int64), len(piece))

    def _is_over(self, way: Writing, before: Sequence[int], tokens: list[int]) -> bool:
        if tokens[-1:] == [self.eot_token_id]:
            return True
        text = self.tokenizer.decode([*before, *tokens]) if way.until else ""
        return any(stop in text for stop in way.until)

    def _remember(self, tokens: Tokens) -> Any:
        """Reads a past into memory; says so when it is longer than any before, and memory cannot hold it."""
        past = self.scorer.remember(tokens)
        forgotten = getattr(past, "forgotten", 0)
        if forgotten > self._forgotten:
            self._forgotten = forgotten
            logger.warning(
                "a context of %s tokens is longer than memory: its first %s are forgotten; to keep them, raise "
                "memory.tokens in --model_args",
                f"{len(tokens):,}",
                f"{forgotten:,}",
            )
        return past


if "longmem" not in model_registry:  # a version of the harness that finds entry points has it already
    model_registry.register("longmem", target=LongMemLM)
