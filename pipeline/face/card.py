"""The model card of an export: what it is, how it was trained, what was measured, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline.config.model import ModelSettings
from pipeline.config.schema import Config
from pipeline.config.yaml_text import write_yaml
from pipeline.face.configuration import LongMemConfig
from pipeline.face.figures import Figures
from pipeline.model.longmem import layout_of
from pipeline.model.saved import BACKBONE

_PAGE = """---
{front}# license: yours to add, and that of the backbone to be kept
---

# LongMem beside {name}

A language model with a memory ([Wang et al., 2023](https://arxiv.org/abs/2306.07174)). The backbone, {name}
(`{model_type}`), is frozen. A SideNet was trained beside it:
{num_side_layers} layers, {num_memory_layers} of which look up the past. {holds}

## How it is loaded

```python
import pipeline.face  # registers LongMem with transformers
from transformers import AutoModelForCausalLM{auto_tokenizer}
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{backbone_argument})
tokenizer = {tokenizer}
book = model.memorize(open("book.txt").read(), tokenizer=tokenizer)
```

Then `model.generate(**tokenizer("A prompt", return_tensors="pt"), memory=book)`. `pipeline` is LongMem on DeepSpeed's.

## How it was trained

{training}

Expect more of it on text of this kind than on others: these {tokens} tokens are all that the SideNet has learnt from.

## Measured on held-out text

{held_out}

## What it is like

{settings}

## Limits

- It remembers the last {memory_tokens} tokens of a stream and looks up {top_k_tokens} of them for a token; the rest is
  forgotten, and what lies in the past is found by likeness only.
- Whatever the backbone says that is wrong or harmful this model can say, too, and it repeats what its memory holds.
- It works with this backbone only, whose weights are checked by their hash when it is loaded (in {precision}).
- One device holds the model; batches are padded on the left.
"""


def card(made: LongMemConfig, config: Config, known: Figures, *, backbone: str, has_tokenizer: bool) -> str:
    """The text of README.md.

    Args:
        made: The model's configuration.
        config: The settings of its run.
        known: The training in figures.
        backbone: Folder or hub name of the backbone.
        has_tokenizer: Whether a tokenizer lies beside the model.

    Returns:
        Markdown, its front matter before it.
    """
    assert isinstance(made.backbone_config, PreTrainedConfig)
    model_type = made.backbone_config.model_type
    is_folder, is_inside = Path(backbone).is_dir(), made.backbone_name == BACKBONE
    name = Path(backbone).name if is_folder else backbone
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["longmem", "memory"]}
    if not is_folder:
        front |= {"base_model": backbone}
    model, layout = config.model, layout_of(config.model.sidenet, made.num_hidden_layers)
    return _PAGE.format(
        front=write_yaml(front) + ("# base_model: the backbone's name on the hub\n" if is_folder else ""),
        name=name,
        model_type=model_type,
        num_side_layers=len(layout.boundaries) - 1,
        num_memory_layers=len(layout.memory_layers),
        holds=f"The backbone lies in `{BACKBONE}/`." if is_inside else "The backbone's weights are not in this folder.",
        auto_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        tokenizer='AutoTokenizer.from_pretrained("THIS_FOLDER")' if has_tokenizer else "...  # the backbone's own",
        backbone_argument="" if is_inside or not is_folder else f', backbone="FOLDER_OF/{name}"',
        training=_training(config, known),
        tokens=f"{known.tokens:,}",
        held_out=_held_out(known),
        settings=_settings(model),
        memory_tokens=f"{model.memory.tokens:,}",
        top_k_tokens=f"{model.memory.top_k_tokens:,}",
        precision=model.precision,
    )


def _training(config: Config, known: Figures) -> str:
    train = config.train
    loss = (
        "not known: the run's folder holds no metrics of these steps"
        if known.loss_nats is None
        else (f"{known.loss_nats:.4f} nats a token, mean of the last steps (at most 10)")
    )
    rows = [
        ("optimizer steps", f"{known.step:,} of {known.of_steps:,}"),
        ("tokens read", f"{known.tokens:,}"),
        ("a step", f"{known.lanes} lanes x {known.segments_per_step} segments x {known.segment_tokens:,} tokens"),
        ("text", _text(config.data.shares)),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}, {train.warmup_steps} steps of warm-up"),
        ("precision", train.precision),
        ("training loss", loss),
    ]
    return _table(("", ""), rows)


def _text(shares: Mapping[str, float]) -> str:
    if len(shares) == 1:
        return f"the token store `{next(iter(shares))}`"
    return "a mixture of the token stores " + ", ".join(f"`{name}` ({share:.1%})" for name, share in shares.items())


def _held_out(known: Figures) -> str:
    if not known.table:
        return f"Nothing was: {known.why_none}."
    return f"After step {known.step:,}, by the run itself:\n\n```text\n{known.table}\n```"


def _settings(model: ModelSettings) -> str:
    side, memory = model.sidenet, model.memory
    rows = [
        ("layout, residual", f"`{side.layout}`, `{side.residual}`"),
        ("fusion", f"`{side.fusion}`"),
        ("segment, left context", f"{model.segment_tokens:,} and {model.context_tokens:,} tokens"),
        ("memory", f"{memory.tokens:,} tokens in chunks of {memory.chunk_size}, scope `{memory.scope}`"),
        ("looked up for a token", f"{memory.top_k_tokens:,} tokens, for each `{memory.retrieve_for}`"),
        ("recent window, sink", f"{memory.window_tokens:,} tokens, {'yes' if memory.sink else 'no'}"),
        ("positions in memory", f"`{memory.position}`"),
    ]
    return _table(("setting", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
