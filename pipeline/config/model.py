"""What the model is: memory, SideNet and the numbers of a segment, apart from how it is trained and where files lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.kinds import Count, Precision, Section, Tokens, TokensOrZero
from pipeline.config.rules import rule_problems
from pipeline.errors import ConfigError

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


class MemoryConfig(Section):
    """The memory bank and how it is read."""

    enabled: bool = True
    """Whether the SideNet reads memory at all. Off is the baseline with the same weights."""
    tokens: Tokens = 65536
    """Tokens remembered per lane and memory layer; a multiple of `chunk_size`."""
    chunk_size: Count = 4
    """Consecutive tokens retrieved together, found by the mean of their keys."""
    top_k_tokens: Count = 64
    """Tokens that each query retrieves; a multiple of `chunk_size`."""
    retrieve_for: Literal["head", "kv_head"] = "head"
    """Who retrieves: each query head for itself (the paper), or the query heads of a key/value head together, by the
    best of their scores."""
    window_tokens: TokensOrZero = 0
    """Tokens of a lane right before a segment that are read whole, at their real distance, beside the segment's own;
    what is retrieved is older. A multiple of `chunk_size`, at most `tokens`; 0: none."""
    sink: bool = False
    """Whether every query can also read one constant token, encoded alone, which takes the attention that belongs
    nowhere."""
    scope: Literal["document", "lane", "group"] = "lane"
    """Which past a query sees: its own document's, its lane's, or that of all lanes of its memory group."""
    group_size: Count = 1
    """Ranks that share one bank and read it together. Divides the world size and train.segments_per_step."""
    search: Literal["torch", "faiss"] = "torch"
    """Exact search by blocked matrix products, or by a flat faiss index."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of what is remembered; `auto` takes `train.precision`."""
    chunk_keys: Literal["stored", "unrounded"] = "stored"
    """Chunks are found by the mean of their keys as they are stored, or as they came, before they were rounded to
    `dtype` (the code of the paper's authors). A memory that is read from a file is always found by what is stored:
    `unrounded` wants `checkpoint.memory: replay`."""
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
    query_block_tokens: Count = 128
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
    residual: Literal["interleaved", "paper", "paper_normed"] = "interleaved"
    """Where the backbone's residual differences come in; with `interleaved` the untrained SideNet is the backbone.
    `paper_normed` is `paper` as its authors' code has it: the last difference is that of the normed last state."""
    norm_epsilon: Annotated[float, Field(gt=0, le=1)] | None = None
    """Epsilon of the SideNet's norms; null: as in the backbone's layers that they are copies of."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] | None = None
    """Activation of the SideNet's MLPs, by transformers' names (`gelu`: error function, `gelu_new`: tanh); null:
    the backbone's."""
    fusion: Literal["gate", "joint"] = "gate"
    """How memory joins local attention: a learnt mix per head (the paper), or one softmax over both."""
    gate_init: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.0
    """Start of the number learnt per head. `gate`: sigmoid of it is the weight of local attention; `joint`: it is
    added to the memory's logits."""
    activation_checkpointing: bool = False
    """Recompute the SideNet's activations in the backward pass: less memory, about a third more time."""


class ModelSettings(Section):
    """What a LongMem is. A run's are `Config.model`; where they stand in its YAML is said by each field.

    Raises:
        ConfigError: Fields that are valid one by one contradict each other.
    """

    memory: MemoryConfig = MemoryConfig()
    """`memory`: the bank and how it is read."""
    sidenet: SideNetConfig = SideNetConfig()
    """`sidenet`: the trained side-network."""
    context_tokens: TokensOrZero = 0
    """`backbone.context_tokens`."""
    segment_tokens: Count = 1024
    """`train.segment_tokens`."""
    precision: Precision = "fp32"
    """`train.precision`."""
    loss_piece_tokens: Count = 256
    """`train.loss_piece_tokens`."""

    @property
    def memory_dtype(self) -> Precision:
        """Number format of the bank, `auto` resolved."""
        return self.precision if self.memory.dtype == "auto" else self.memory.dtype

    @model_validator(mode="after")
    def _check_rules(self) -> ModelSettings:
        sections = self.model_dump()
        named = {f"train.{name}": sections.pop(name) for name in ("segment_tokens", "precision", "loss_piece_tokens")}
        problems = rule_problems(dotted(sections) | named)
        if problems:
            raise ConfigError(problems)
        return self


def dotted(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections flattened to `section.key` -> value; a section that is no mapping is left out."""
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }
