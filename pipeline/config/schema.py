"""Every setting of a run: one frozen class a component, a text under each field with its unit.

The ranges stand in the types, so that the check, the error message and `docs/configuration.md` have one source.
What needs two fields at once is in `rules.py`; what needs the world size in `world.py`; what needs the backbone
(layer numbers, for one) is checked by whoever loads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.config.rules import rule_problems
from pipeline.errors import ConfigError

MOST_STEPS = 10**9
MOST_TOKENS = 10**10
"""In a memory, in a context: more than any host holds, and far from where numbers of 64 bits end."""


def _nameable(text: str) -> str:
    if "\0" in text:
        raise ValueError("no file has such a name")
    return text


# Generous, and safe: everything that is worked out of numbers within these ranges fits the types of torch and numpy.
Count = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
StepsOrZero = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
TokensOrZero = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_nameable)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]

POSITION_PATTERN = re.compile(r"none|true|(fixed|clamp):[1-9][0-9]{0,8}")
MOST_LAYERS = 10**4


def _position(value: object) -> object:
    # An unquoted `true` in YAML is a boolean; the rule that it names is text.
    text = "true" if value is True else value
    if isinstance(text, str) and not POSITION_PATTERN.fullmatch(text):
        raise ValueError("not a position rule")
    return text


def _memory_layers(value: object) -> object:
    if value is None or value == "all":
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("neither 'all' nor a list of layers")
    if any(type(layer) is not int or not 1 <= layer <= MOST_LAYERS for layer in value) or len(set(value)) != len(value):
        raise ValueError("layers are counted from 1, each named once")
    return tuple(sorted(value))


class Section(BaseModel):
    """Base of all settings: frozen, strict (no text where a number belongs), unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """The run as a whole: where it writes, how it starts."""

    output_dir: Text
    """Folder of this run: checkpoints, metrics, logs, the resolved configuration."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of everything drawn at random: which lane a document is dealt to, and the order in each lane."""
    resume: Text = "auto"
    """`auto` goes on from the newest checkpoint of `output_dir` or starts afresh, `none` starts afresh, a folder
    names the checkpoint to go on from."""
    collective_timeout_s: Annotated[int, Field(ge=10, le=10**6)] = 1800
    """Seconds within which a rank that died or is stuck ends the run on all ranks, counted from when they wait for it.
    Collectives time out a little earlier, to leave time for finding out which rank it was."""
    on_usr1: Literal["stop", "continue"] = "stop"
    """What SIGUSR1 does after saving: end the run as SIGTERM and SIGINT do, or go on."""


class BackboneConfig(Section):
    """The frozen language model."""

    path: Text
    """Hugging Face folder or hub name of the pre-trained model."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention of the frozen layers: PyTorch's fused one or plain matrix products."""
    deepspeed: Text = "ds_configs/backbone_zero3_inference.json"
    """DeepSpeed JSON of the frozen engine (ZeRO stage 3), relative to the current folder or the repository."""


class DataConfig(Section):
    """The training stream."""

    path: Text
    """Folder made by `launch/prepare_data.py`, with `train/` and optionally `validation/`."""
    verify: Literal["full", "size"] = "full"
    """What is checked of the store when a run starts: `full` reads all of it and compares hashes, while the backbone
    is loaded; `size` compares the sizes of its files."""
    lanes: Count
    """Rows of the training stream, over the whole job and not per rank. The memory groups must divide them."""


class MemoryConfig(Section):
    """The memory bank and how it is read."""

    enabled: bool = True
    """Whether the SideNet reads memory at all. Off is the baseline with the same weights."""
    tokens: Tokens = 65536
    """Tokens remembered per lane and memory layer; a multiple of `chunk_size`."""
    chunk_size: Count = 4
    """Consecutive tokens retrieved together, found by the mean of their keys."""
    top_k_tokens: Count = 64
    """Tokens that each query head retrieves for each token; a multiple of `chunk_size`."""
    scope: Literal["document", "lane", "group"] = "lane"
    """Which past a query sees: its own document's, its lane's, or that of all lanes of its memory group."""
    group_size: Count = 1
    """Ranks that share one bank and read it together. Divides the world size and train.segments_per_step."""
    search: Literal["torch", "faiss"] = "torch"
    """Exact search by blocked matrix products, or by a flat faiss index."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of what is remembered; `auto` takes `train.precision`."""
    device: Literal["accelerator", "host"] = "accelerator"
    """Where the bank lives: beside the model, or in host memory when it does not fit there."""
    position: Annotated[
        str,
        BeforeValidator(_position),
        Field(
            json_schema_extra={"kind": "`none`, `true`, `fixed:N` or `clamp:N`, N a whole number of at most 9 digits"}
        ),
    ] = "none"
    """How far back remembered tokens seem to lie, in tokens: nowhere (`none`, the paper), at their real distance
    (`true`), all N back (`fixed:N`), at their real distance up to N (`clamp:N`)."""
    query_block_tokens: Count = 64
    """Query tokens searched at once: bounds the scores that are whole in memory."""

    @property
    def num_chunks(self) -> int:
        """Chunks that the bank holds per lane and memory layer."""
        return self.tokens // self.chunk_size

    @property
    def top_k_chunks(self) -> int:
        """Chunks that each query head retrieves for each token."""
        return self.top_k_tokens // self.chunk_size


class SideNetConfig(Section):
    """The trained side-network."""

    layout: Literal["uniform", "top"] = "uniform"
    """`uniform`: blocks spread evenly over the whole backbone (the paper); `top`: one SideNet layer beside each of
    the backbone's last layers."""
    num_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    """SideNet layers; null takes half the backbone's for `uniform` and all of them for `top`."""
    memory_layers: Annotated[
        tuple[int, ...] | Literal["all"] | None,
        BeforeValidator(_memory_layers),
        Field(
            json_schema_extra={"kind": f"`all`, null, or a list of different whole numbers >= 1 and <= {MOST_LAYERS:,}"}
        ),
    ] = None
    """SideNet layers that read memory, counted from 1; null is one layer, three quarters up (the paper)."""
    residual: Literal["interleaved", "paper"] = "interleaved"
    """Where the backbone's residual differences come in; with `interleaved` the untrained SideNet is the backbone."""
    fusion: Literal["gate", "joint"] = "gate"
    """How memory joins local attention: a learnt mix per head (the paper), or one softmax over both."""
    gate_init: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.0
    """Start of the number learnt per head. `gate`: sigmoid of it is the weight of local attention; `joint`: it is
    added to the memory's logits."""
    activation_checkpointing: bool = False
    """Recompute the SideNet's activations in the backward pass: less memory, about a third more time."""


class TrainConfig(Section):
    """The optimization. One step is one optimizer step, whatever the world size."""

    steps: Steps
    """Optimizer steps of the whole run; the learning rate schedule ends here."""
    stop_after_steps: Steps | None = None
    """End after this step as if interrupted, with a checkpoint; null runs to the end."""
    segment_tokens: Count = 1024
    """Tokens of a lane read in one forward pass; a multiple of `memory.chunk_size`."""
    segments_per_step: Count = 1
    """Consecutive segments of each lane in one optimizer step, split over the ranks of a memory group and gradient
    accumulation."""
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 2e-4
    """Highest learning rate of the SideNet's weights."""
    gate_learning_rate_factor: Factor = 100.0
    """Learning rate of the numbers learnt per head, as a multiple of the weights'. They have no weight decay."""
    warmup_steps: StepsOrZero = 0
    """Optimizer steps of linear warm-up, at most `steps`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    final_learning_rate_fraction: Fraction = 0.1
    """Learning rate at the last step as a fraction of the highest one; `constant` ignores it."""
    weight_decay: Factor = 0.01
    """Decoupled weight decay (AdamW) of the weight matrices, per unit of learning rate."""
    adam_beta1: Beta = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Beta = 0.98
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """Added to AdamW's denominator."""
    gradient_clipping: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    precision: Precision = "fp32"
    """Number format of both engines. `bf16` and `fp16` keep fp32 master weights of the SideNet."""
    loss_piece_tokens: Count = 256
    """Tokens whose logits over the vocabulary are held at once."""
    histogram_every_steps: StepsOrZero = 50
    """Optimizer steps between TensorBoard histograms (gates, age of what is retrieved); 0 writes none."""
    deepspeed: Text = "ds_configs/sidenet_zero2.json"
    """DeepSpeed JSON of the training engine (ZeRO stage 2), relative to the current folder or the repository."""

    def tokens_per_step(self, lanes: int) -> int:
        """Tokens read in one optimizer step by the whole job.

        Args:
            lanes: Lanes of the whole job.

        Returns:
            The number of tokens.
        """
        return lanes * self.segments_per_step * self.segment_tokens


class CheckpointConfig(Section):
    """When training is saved."""

    every_steps: StepsOrZero = 0
    """Optimizer steps between checkpoints; 0 saves at the end only."""
    every_minutes: Factor = 0.0
    """Minutes between checkpoints, by rank 0's clock and after a whole step; 0 goes by steps alone. With both settings
    whichever is due first saves."""
    keep: Count = 2
    """Newest checkpoints that stay; older ones are removed."""
    memory: Literal["save", "replay"] = "save"
    """`save` stores what is remembered; `replay` stores none of it, and a restart reads the last `memory.tokens` of
    each lane again with the backbone. Loading follows what a checkpoint holds."""


class EvaluationConfig(Section):
    """Scoring of held-out documents while training and after it."""

    every_steps: StepsOrZero = 0
    """Optimizer steps between evaluations; 0 evaluates at the end only."""
    documents: Count = 8
    """Held-out documents used."""
    context_tokens: TokensOrZero = 4096
    """Tokens of each document read into memory before any is scored."""
    scored_tokens: Tokens = 1024
    """Tokens scored in each document, after the context."""


class Config(Section):
    """All settings of a run.

    Raises:
        ConfigError: Fields that are valid one by one contradict each other. A field that is wrong by itself raises
            pydantic's own error; `load_config` puts both into one ConfigError.
    """

    run: RunConfig
    """The run as a whole."""
    backbone: BackboneConfig
    """The frozen language model."""
    data: DataConfig
    """The training stream."""
    memory: MemoryConfig = MemoryConfig()
    """The memory bank."""
    sidenet: SideNetConfig = SideNetConfig()
    """The trained side-network."""
    train: TrainConfig
    """The optimization."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When training is saved."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Scoring of held-out documents."""

    @property
    def memory_dtype(self) -> Precision:
        """Number format of the bank, `auto` resolved."""
        return self.train.precision if self.memory.dtype == "auto" else self.memory.dtype

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        problems = rule_problems(dotted(self.model_dump()))
        if problems:
            raise ConfigError(problems)
        return self


def dotted(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten sections to dotted names.

    Args:
        sections: Section name to a mapping of its keys; a section that is no mapping is left out.

    Returns:
        `section.key` to value.
    """
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }
