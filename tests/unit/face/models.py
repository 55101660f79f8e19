"""Tiny LongMem models of transformers, and what they should say, worked out by a stream of whole segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.face import LongMemConfig, LongMemForCausalLM
from pipeline.model.longmem import LongMem
from pipeline.model.stream import Context, Stream
from tests.tiny_config import tiny_config
from tests.tiny_models import tiny_model

SEGMENT, MEMORY = 16, 32  # tokens: of `tiny_config`
TOLERANCE = 2e-4  # of logits, of size 1 to 10: float32 in products of other shapes
DEEP: Mapping[str, Any] = {
    "sidenet": {"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 1.0},
    "backbone": {"context_tokens": 6},
    "memory": {"position": "clamp:12", "sink": True, "window_tokens": 8, "retrieve_for": "kv_head"},
}
PAPER: Mapping[str, Any] = {"sidenet": {"layout": "uniform"}, "memory": {"position": "none"}}
QUIET: Mapping[str, Any] = {"do_sample": False, "eos_token_id": None}  # greedy, to the very end


def settings_of(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of `tiny_config` as a saved model has them."""
    found: dict[str, Any] = tiny_config(**sections).model.model_dump(mode="json")
    return found


def tiny_face(
    family: str = "llama",
    settings: Mapping[str, Any] = DEEP,
    *,
    backbone: PreTrainedModel | None = None,
    name: str = "",
    trained: bool = True,
) -> LongMemForCausalLM:
    """A LongMem over a tiny random backbone.

    Args:
        family: Of the backbone.
        settings: Sections of `tiny_config`.
        backbone: The backbone; None: `tiny_model`.
        name: Where it lies.
        trained: Whether the SideNet is another one than the backbone's copy.
    """
    backbone = tiny_model(family) if backbone is None else backbone
    config = LongMemConfig(backbone.config, settings_of(settings), backbone_name=name)
    model = LongMemForCausalLM(config, backbone).eval()
    if trained:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.sidenet.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def expected_logits(model: LongMem, texts: Tensor) -> Tensor:
    """Logits of texts `[B, n]` that a stream reads segment by segment, `[B, n, V]`."""
    stream, found, left = Stream(model, model.bank(len(texts))), [], model.settings.context_tokens
    for start in range(0, texts.shape[1], SEGMENT):
        tokens, before = texts[:, start : start + SEGMENT], texts[:, max(0, start - left) : start]
        context = Context(before, torch.zeros_like(before))
        seen = stream.look(tokens, torch.zeros_like(tokens), context, start=start)
        found.append(stream.hidden(seen))
        if tokens.shape[1] == SEGMENT:
            stream.remember(seen)
    return model.logits(torch.cat(found, dim=1))


def expected_tokens(model: LongMem, text: Sequence[int] | Tensor, count: int) -> list[int]:
    """The likeliest next tokens of a text `[n]`, one after another, each from the whole text before it."""
    grown = torch.as_tensor(text)[None]
    for _ in range(count):
        grown = torch.cat([grown, expected_logits(model, grown)[:, -1:].argmax(-1)], dim=1)
    found: list[int] = grown[0, -count:].tolist()
    return found


def are_likeliest(model: LongMem, text: Tensor, tokens: Tensor) -> bool:
    """Whether tokens `[m]` behind a text `[n]` are what `expected_tokens` gives; the text is read once."""
    before = torch.cat([text, tokens[:-1]])[None]
    return torch.equal(expected_logits(model, before)[0, -len(tokens) :].argmax(-1), tokens)


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts in one batch, padded on the left, and its mask."""
    most = max(len(text) for text in texts)
    ids = torch.stack([torch.cat([torch.zeros(most - len(text), dtype=torch.int64), text]) for text in texts])
    mask = torch.stack([torch.arange(most) >= most - len(text) for text in texts]).long()
    return ids, mask
