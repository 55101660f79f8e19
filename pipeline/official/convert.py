"""The authors' two checkpoints made into one folder that `LongMemForCausalLM.from_pretrained` loads.

DIR/config.json, model.safetensors     the SideNet
    backbone/                          the backbone, a `longmem_gpt`
    tokenizer.json, ...                GPT-2's with the ids of dict.txt; in backbone/, too
    official.json                      the files that it was made of, and what was read off them
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pipeline.backbone.gpt import LongMemGPTConfig, LongMemGPTForCausalLM
from pipeline.config.untrusted import shown
from pipeline.errors import CheckpointError
from pipeline.face.configuration import LongMemConfig, laid_over
from pipeline.face.model import LongMemForCausalLM
from pipeline.files import hash_file, new_folder
from pipeline.model.load import fill
from pipeline.model.saved import BACKBONE
from pipeline.official.dictionary import make_tokenizer, read_dictionary
from pipeline.official.layout import Sizes, backbone_weights, check, sidenet_weights
from pipeline.official.pickles import Checkpoint, read_checkpoint

logger = logging.getLogger(__name__)
ABOUT = "official.json"
_PUBLISHED = {"memory_size": 65_536, "k": 64, "chunk_size": 4, "tokens_per_sample": 1024}
"""Settings of the published training, for what a checkpoint does not say."""


def import_official(
    backbone: Path, longmem: Path, dictionary: Path, output: Path, *, bpe: str | None = "gpt2"
) -> Sizes:
    """Makes the authors' checkpoints into a new folder, which is whole or absent.

    Args:
        backbone: fairseq's checkpoint of the backbone.
        longmem: That of LongMem.
        dictionary: fairseq's `dict.txt`.
        output: The folder to make.
        bpe: As in `make_tokenizer`; None: no tokenizer is made.

    Returns:
        The sizes of what was imported.

    Raises:
        CheckpointError: A checkpoint is not one of the authors' code, or the output cannot be written.
        DataError: The dictionary is of another model, or GPT-2's tokenizer cannot be read.
    """
    if output.exists() or output.is_symlink():
        raise CheckpointError("the output exists already; nothing was written", got=output, do="name a new folder")
    alone, whole = read_checkpoint(backbone), read_checkpoint(longmem)
    sizes = Sizes.of(alone, whole)
    ids = read_dictionary(dictionary, sizes.vocab_size)
    settings = settings_of(sizes, whole.settings)
    longest = settings["segment_tokens"]
    tokenizer = None if bpe is None else make_tokenizer(ids, bpe, longest=longest)
    logger.info("checking %d weights by name, shape and number", len(alone.model) + len(whole.model))
    check(sizes, alone, whole)
    model = build_model(sizes, whole)
    about = {"sizes": asdict(sizes), "files": [_source(path) for path in (backbone, longmem, dictionary)]}
    try:
        with new_folder(output) as folder:
            _write(model, tokenizer, about, folder)
    except OSError as error:
        raise CheckpointError(
            "the output cannot be written; nothing is left of it",
            got=f"{output} ({error})",
            expected="a new folder where one can be made",
            do="name one where you may write and where there is room",
        ) from error
    return sizes


def settings_of(sizes: Sizes, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make this project compute what the authors' code does, as `ModelSettings` has them.

    Args:
        sizes: Of the model.
        given: The settings in its checkpoint.

    Returns:
        Sections and keys. Memory is of each lane: the authors' one bank for all rows is `memory.scope: group`.

    Raises:
        CheckpointError: A setting is no number that can be.
    """
    known = {name: given.get(name, published) for name, published in _PUBLISHED.items()}
    for name, value in known.items():
        if type(value) is not int or not 0 < value < 10**9:
            raise CheckpointError(
                "the settings in the checkpoint are of no LongMem", got=f"{name} = {shown(value)}", expected="a count"
            )
    return {
        "segment_tokens": known["tokens_per_sample"],
        "memory": {
            "tokens": known["memory_size"],
            "chunk_size": known["chunk_size"],
            "top_k_tokens": known["k"],
            "position": "none",
            "dtype": "fp16",
            "chunk_keys": "unrounded",
        },
        "sidenet": {
            "layout": "uniform",
            "num_layers": sizes.num_side_layers,
            "memory_layers": [sizes.memory_layer],
            "residual": "paper_normed",
            "fusion": "gate",
            "norm_epsilon": 1e-5,
            "activation": "gelu",
        },
    }


def build_model(sizes: Sizes, longmem: Checkpoint, *, more: Mapping[str, Any] | None = None) -> LongMemForCausalLM:
    """The model of a checkpoint that was checked, in float32.

    Args:
        sizes: Of the model.
        longmem: The checkpoint of LongMem, which holds both parts.
        more: Settings laid over its own.

    Returns:
        The model.
    """
    settings = laid_over(settings_of(sizes, longmem.settings), more or {})
    config = LongMemGPTConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=settings["segment_tokens"],
        architectures=[LongMemGPTForCausalLM.__name__],
    )
    with torch.device("meta"):  # its random numbers would be drawn for nothing
        causal_lm = LongMemGPTForCausalLM(config)
    causal_lm.load_state_dict(backbone_weights(longmem), assign=True)
    whole = LongMemConfig(config, settings, backbone_name=BACKBONE, architectures=[LongMemForCausalLM.__name__])
    model = LongMemForCausalLM(whole, causal_lm.eval())
    fill(model.sidenet, sidenet_weights(longmem, sizes), longmem.path)
    return model.eval()


def _write(
    model: LongMemForCausalLM, tokenizer: PreTrainedTokenizerFast | None, about: Mapping[str, Any], folder: Path
) -> None:
    logger.info("writing %.0f million parameters", sum(x.numel() for x in model.parameters()) / 1e6)
    model.save_pretrained(folder, save_backbone=True)
    if tokenizer is not None:
        for place in (folder, folder / BACKBONE):
            tokenizer.save_pretrained(place)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _source(path: Path) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file."""
    size, sha256 = hash_file(path)
    return {"name": path.name, "bytes": size, "sha256": sha256}
