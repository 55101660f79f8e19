"""A tiny run: backbone folder with tokenizer, token store and settings, made in a second, without network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.config.load import dump_config
from pipeline.config.schema import Config
from pipeline.data.store import STORE_FEATURES, write_store
from pipeline.data.tokenizer import describe_tokenizer, load_tokenizer
from tests.tiny_tokenizer import save_tiny_tokenizer

__all__ = ["PROFILES", "TinyRun", "save_backbone", "save_store", "save_tiny_run", "tiny_run"]

VOCABULARY = 300
LAYERS = 4
TRAIN_TOKENS = (90, 150, 70, 210, 130, 60, 110)
VALIDATION_TOKENS = (80, 101, 64, 30)
MORE_TRAIN_TOKENS, MORE_VALIDATION_TOKENS = (40, 75, 52, 31, 66), (90, 72)
_SENTENCES = (
    "It was a bright cold day in the harbour.",
    "The clocks of the old town were striking one after another.",
    "She remembered the letter and the long road over the hills.",
    "What had the captain said of the other ship?",
    "def read(memory, query): return the chunks of the past that match",
)
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "paper": {"layout": "uniform", "memory_layers": None, "fusion": "gate"},
    "deep": {"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 1.0},
}
POSITIONS = {"paper": "none", "deep": "clamp:24"}


@dataclass(frozen=True)
class TinyRun:
    """What a run reads.

    Attributes:
        backbone: Folder of the backbone, with its tokenizer.
        data: Folder of the token store, with both splits.
        more: Folder of another.
    """

    backbone: Path
    data: Path
    more: Path

    @property
    def mixture(self) -> dict[str, Any]:
        """For `data` of `config`: three tokens of the first store for two of the other."""
        return {"path": None, "sources": [{"path": str(self.data), "weight": 3}, {"path": str(self.more), "weight": 2}]}

    def config(self, output_dir: Path, *, profile: str = "deep", **overrides: Mapping[str, Any]) -> Config:
        """Settings of a run: 8 steps of two segments of 16 tokens in each of four lanes; memory overflows in step 3.

        Args:
            output_dir: The run folder.
            profile: `paper` or `deep`.
            **overrides: Section name to its keys that differ.
        """
        sections: dict[str, dict[str, Any]] = {
            "run": {"output_dir": str(output_dir), "collective_timeout_s": 60},
            "backbone": {"path": str(self.backbone)},
            "data": {"path": str(self.data), "lanes": 4},
            "memory": {"tokens": 64, "top_k_tokens": 16, "position": POSITIONS[profile]},
            "sidenet": dict(PROFILES[profile]),
            "train": {
                "steps": 8,
                "segment_tokens": 16,
                "segments_per_step": 2,
                "learning_rate": 0.003,
                "gate_learning_rate_factor": 10.0,
                "warmup_steps": 2,
                "loss_piece_tokens": 256,
                "histogram_every_steps": 2,
            },
            "checkpoint": {"every_steps": 3},
            "evaluation": {"documents": 2, "context_tokens": 32, "scored_tokens": 32},
        }
        for name, keys in overrides.items():
            sections[name] |= keys
        return Config.model_validate(sections)

    def write_config(self, path: Path, output_dir: Path, **kwargs: Any) -> Path:
        """The same as a YAML file."""
        path.write_text(dump_config(self.config(output_dir, **kwargs)), encoding="utf-8")
        return path


def save_backbone(folder: Path, *, seed: int = 0, tokenizer_size: int = VOCABULARY) -> Path:
    """A Llama of four layers with tied embeddings, and a tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # twice the usual size, so that attention is far from uniform
            if parameter.dim() > 1:
                parameter.copy_(2 * torch.randn(parameter.shape, generator=generator) / min(parameter.shape) ** 0.5)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder, tokenizer_size)
    return folder


def save_store(folder: Path, splits: Mapping[str, tuple[int, ...]], *, tokenizer_from: Path) -> Path:
    """A token store of random sentences.

    Args:
        folder: Where.
        splits: Name of a split to the number of tokens of each of its documents.
        tokenizer_from: Folder of the tokenizer.
    """
    tokenizer, random = load_tokenizer(tokenizer_from), np.random.default_rng(0)
    tables = {}
    for name, lengths in splits.items():
        documents = []
        for length in lengths:
            text = " ".join(random.choice(_SENTENCES, length))
            documents.append(tokenizer.encode(text, add_special_tokens=False)[:length])
        rows = {"tokens": documents, "source": [f"{name}-{number}" for number in range(len(lengths))]}
        tables[name] = datasets.Dataset.from_dict(rows, features=STORE_FEATURES)
    write_store(folder, tables, tokenizer=describe_tokenizer(tokenizer))
    return folder


def save_tiny_run(folder: Path) -> TinyRun:
    """Everything that a tiny run reads."""
    backbone = save_backbone(folder / "backbone")
    splits = {"train": TRAIN_TOKENS, "validation": VALIDATION_TOKENS}
    more = {"train": MORE_TRAIN_TOKENS, "validation": MORE_VALIDATION_TOKENS}
    stores = [save_store(folder / name, of, tokenizer_from=backbone) for name, of in (("data", splits), ("more", more))]
    return TinyRun(backbone, *stores)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny run's inputs, shared by all tests: not to be changed."""
    return save_tiny_run(tmp_path_factory.mktemp("tiny_run"))
