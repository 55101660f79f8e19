"""Every setting of a run: one frozen class a component, a text under each field with its unit.

The ranges stand in the types (`kinds.py`), so that the check, the error message and `docs/configuration.md` have one
source; what the model is stands in `model.py`.
What needs two fields at once is in `rules.py`; what needs the world size in `world.py`; what needs the backbone
(layer numbers, for one) is checked by whoever loads it.
"""

from __future__ import annotations

from fractions import Fraction as Exact
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.kinds import (
    Beta,
    Count,
    Factor,
    Folder,
    FolderOrNone,
    Fraction,
    Precision,
    Section,
    Steps,
    StepsOrZero,
    Text,
    Tokens,
    TokensOrZero,
)
from pipeline.config.model import MemoryConfig, ModelSettings, SideNetConfig, dotted
from pipeline.config.rules import rule_problems
from pipeline.errors import ConfigError


class RunConfig(Section):
    """The run as a whole: where it writes, how it starts."""

    output_dir: Folder
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

    path: Folder
    """Hugging Face folder or hub name of the pre-trained model."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention of the frozen layers: PyTorch's fused one or plain matrix products."""
    context_tokens: TokensOrZero = 0
    """Tokens of a lane before each segment that the backbone reads again with it, so that what is remembered of its
    first tokens knows what came before. Wants `memory.sink`. 0: each segment is encoded alone (the paper)."""
    deepspeed: Text = "ds_configs/backbone_zero3_inference.json"
    """DeepSpeed JSON of the frozen engine (ZeRO stage 3), in the current folder or among those shipped."""


class SourceConfig(Section):
    """One of the sources of a mixture."""

    path: Folder
    """As `data.path`."""
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Tokens read of it, against those of the other sources and their weights."""


def _listed(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        raise ValueError("not a list")
    return tuple(value)


class DataConfig(Section):
    """The training stream."""

    path: FolderOrNone = None
    """Folder made by `launch/prepare_data.py`, with `train/` and optionally `validation/`. This or `sources` is
    required."""
    sources: Annotated[
        tuple[SourceConfig, ...],
        BeforeValidator(_listed),
        Field(
            json_schema_extra={
                "kind": "a list of `{path: FOLDER, weight: NUMBER}`, weights >= 1e-06 and <= 1e+06 or left out"
            }
        ),
    ] = ()
    """Instead of `path`, a mixture: each a folder as there, and how many tokens of it are read against those of the
    others (`weight`, 1 where left out)."""
    verify: Literal["full", "size"] = "full"
    """What is checked of the stores when a run starts: `full` reads all of them and compares hashes, while the backbone
    is loaded; `size` compares the sizes of their files."""
    lanes: Count
    """Rows of the training stream, over the whole job and not per rank. The memory groups must divide them."""

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources; `path` is one alone."""
        return self.sources if self.path is None else (SourceConfig(path=self.path),)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens of each source, by a name of its own: the last part of its path, if all have others."""
        names = [PurePath(source.path).name for source in self.mixture]
        if len(set(names)) < len(names):
            names = [f"{number}_{name}" for number, name in enumerate(names, start=1)]
        # As written, in decimals: 3 and 1 are to give the very shares of 0.3 and 0.1.
        weights = [Exact(repr(source.weight)) for source in self.mixture]
        return {name: float(weight / sum(weights)) for name, weight in zip(names, weights, strict=True)}


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
    """DeepSpeed JSON of the training engine (ZeRO stage 2), in the current folder or among those shipped."""


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
    backbone_window_tokens: TokensOrZero | None = None
    """The longest ordinary window that the backbone alone is tried with, the rival of memory: tokens are scored with so
    many before them, or as many as there are. Null: as many as the backbone was made for; 0: it is not tried."""


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
    def model(self) -> ModelSettings:
        """What the model is, apart from how it is trained."""
        train = self.train
        return ModelSettings(
            memory=self.memory,
            sidenet=self.sidenet,
            context_tokens=self.backbone.context_tokens,
            segment_tokens=train.segment_tokens,
            precision=train.precision,
            loss_piece_tokens=train.loss_piece_tokens,
        )

    @staticmethod
    def sections_of(model: ModelSettings) -> dict[str, dict[str, Any]]:
        """The part of a run's settings that `model` gives back: section to its keys, as YAML has them."""
        train = model.model_dump(mode="json")
        sections = {name: train.pop(name) for name in ("memory", "sidenet")}
        return sections | {"backbone": {"context_tokens": train.pop("context_tokens")}, "train": train}

    @model_validator(mode="after")
    def _check_rules(self) -> Config:
        problems = rule_problems(dotted(self.model_dump()))
        if problems:
            raise ConfigError(problems)
        return self
