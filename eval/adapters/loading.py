"""What a harness's command line says of a LongMem, and the model that it means."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from eval.model_scorer import ModelScorer
from eval.runner import EvaluationError
from eval.scorer import MEMORY_ON
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import ConfigError
from pipeline.model.load import load_whole, read_trained


@dataclass(frozen=True)
class Arguments:
    """What is evaluated.

    Attributes:
        pretrained: A run folder, a checkpoint (`step_*`) or an export.
        backbone: Folder or hub name of its backbone; None: the run's `backbone.path`.
        tokenizer: Folder or hub name; None: the backbone's. Tasks that make their own text, such as RULER's, want it.
        condition: Of `eval.scorer.CONDITIONS`.
        tokens_at_once: Tokens of rows in one forward pass.
        settings: `--section.key value`, laid over the run's settings.
    """

    pretrained: Path
    backbone: str | None = None
    tokenizer: str | None = None
    condition: str = MEMORY_ON
    tokens_at_once: int = 8192
    settings: tuple[str, ...] = ()


def take_arguments(given: Mapping[str, Any]) -> Arguments:
    """Reads `key=value` pairs; a key with a dot is a setting of the run. Raises ConfigError: names all problems."""
    known = [field.name for field in fields(Arguments) if field.name != "settings"]
    problems, settings = [], []
    for key, value in given.items():
        if "." in key:
            settings += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            problems.append(
                f"{key} is no argument of longmem; expected: {', '.join(known)}, or settings of the run such as "
                f"memory.tokens; do: {f'did you mean {near[0]}?' if near else 'leave it out'}"
            )
    if not given.get("pretrained"):
        problems.append("pretrained is missing; expected: a run folder, a checkpoint or an export; do: add it")
    at_once = given.get("tokens_at_once", Arguments.tokens_at_once)
    if not isinstance(at_once, int) or at_once < 1:
        problems.append(f"tokens_at_once is no number of tokens; got: {at_once!r}; do: give a number above 0")
    if problems:
        raise ConfigError(problems, source="--model_args")
    plain = {key: value for key, value in given.items() if "." not in key and value is not None}
    return Arguments(**(plain | {"pretrained": Path(str(given["pretrained"])), "settings": tuple(settings)}))


def load(arguments: Arguments, *, device: str = "") -> tuple[ModelScorer, PreTrainedTokenizerBase, dict[str, Any]]:
    """Loads a model into this process.

    Args:
        arguments: What is evaluated.
        device: `cpu`; anything else: the accelerator if there is one.

    Returns:
        The scorer, the tokenizer, and what to say of them, plain JSON.

    Raises:
        LongMemError: Model, backbone or tokenizer cannot be loaded, or do not belong together; or there are ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise EvaluationError(
            "the harness drives one process, which holds the whole model",
            got=f"{ranks} ranks",
            expected="one process, without a launcher",
            do="start python -m eval.lm_eval by itself; launch/evaluate.py scores its tasks on many ranks",
        )
    trained = read_trained(arguments.pretrained, arguments.settings)
    config, path = trained.config, arguments.backbone or trained.config.backbone.path
    tokenizer = load_tokenizer(arguments.tokenizer or path)
    place = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    scorer = ModelScorer(
        load_whole(trained, arguments.backbone, place),
        longest=config.evaluation.backbone_window_tokens,
        tokens_at_once=arguments.tokens_at_once,
    )
    about = {
        "weights_sha256": trained.sha256,
        "backbone": trained.backbone,
        "segment_tokens": config.train.segment_tokens,
        "context_tokens": config.backbone.context_tokens,
        "longest_window": scorer.longest,
        "memory": config.memory.model_dump(mode="json"),
        "arguments": {key: str(value) for key, value in asdict(arguments).items()},
    }
    return scorer, tokenizer, about
