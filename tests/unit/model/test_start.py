"""Invariant 6: an untrained SideNet without memory is the backbone; the `paper` form is its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GraniteConfig

from pipeline.backbone import backbone as backbone_module
from pipeline.backbone.families import FAMILIES, Family
from tests.reference import ReferenceSideNet
from tests.reference_lm import Reference
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import GATED, VARIANTS, drawn, tiny_model

# Logits are of size 2 to 6; adding differences of taps rounds otherwise than the backbone's own sums, and the random
# layers magnify that. A wrong layer, tap or mask is off by more than 0.1.
FP32_TOLERANCE = 1e-3
# The same operations in the same order, but for a mask given instead of a flag.
SAME_TOLERANCE = 2e-4

LAYOUTS = [("uniform", None), ("uniform", 1), ("uniform", 3), ("top", 1), ("top", 3), ("top", None)]


@pytest.mark.parametrize("family", VARIANTS)
def test_the_reference_is_the_family(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            Reference(model).logits(tokens).float(), model(tokens).logits, atol=FP32_TOLERANCE, rtol=0
        )


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize(("layout", "num_layers"), LAYOUTS)
def test_untrained_without_memory_is_the_backbone(family: str, layout: str, num_layers: int | None) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    with torch.no_grad():
        expected = model(tokens).logits
    side = TinyLongMem(model, sidenet={"layout": layout, "num_layers": num_layers, "memory_layers": "all"})
    torch.testing.assert_close(side.logits(tokens, memory=False), expected, atol=FP32_TOLERANCE, rtol=0)
    # An empty memory is no memory, to the last bit.
    assert torch.equal(side.logits(tokens, start=0), side.logits(tokens, memory=False))


def test_a_wrong_final_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(FAMILIES["gpt_neox"], norm="emb_dropout")
    monkeypatch.setattr(backbone_module, "family_of", lambda config: entry)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_untrained_without_memory_is_the_backbone("gpt_neox", "top", None)


@pytest.mark.parametrize(("scaling", "is_seen"), [(1.0, False), (3.0, True)])
def test_logits_that_are_scaled_are_seen(scaling: float, is_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits; its factors on embeddings and residuals lie inside the layers and need no word."""
    monkeypatch.setattr(backbone_module, "family_of", lambda config: Family())
    factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
    model = drawn(GraniteConfig(**GATED, **factors, num_hidden_layers=4, logits_scaling=scaling))
    tokens = tiny_tokens((2, 16))
    with torch.no_grad():
        found, expected = TinyLongMem(model).logits(tokens, memory=False), model(tokens).logits
    assert torch.allclose(found, expected, atol=FP32_TOLERANCE, rtol=0) != is_seen


@pytest.mark.parametrize("family", VARIANTS)
def test_eager_attention_too(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens).logits
    side = TinyLongMem(model)
    torch.testing.assert_close(side.logits(tokens, memory=False), expected, atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize(
    ("layout", "num_layers", "boundaries"),
    [("uniform", 2, (0, 2, 4)), ("top", 3, (1, 2, 3, 4)), ("uniform", 1, (0, 4))],
)
def test_paper_form_is_its_formula(family: str, layout: str, num_layers: int, boundaries: tuple[int, ...]) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    side = TinyLongMem(model, sidenet={"layout": layout, "num_layers": num_layers, "residual": "paper"})
    expected = ReferenceSideNet(model, boundaries, residual="paper").logits(tokens).detach()
    torch.testing.assert_close(
        side.logits(tokens, memory=False), expected.float(), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE
    )
    with torch.no_grad():  # it counts layers twice: it is not the backbone
        assert (expected - model(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", VARIANTS)
def test_documents_of_a_segment_are_read_alone(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 18))
    documents = torch.tensor([[3] * 7 + [4] * 11, [8] * 1 + [9] * 12 + [10] * 5])
    side = TinyLongMem(model, memory={"scope": "document"})
    found = side.logits(tokens, documents=documents)
    pieces = [(0, 0, 7), (0, 7, 18), (1, 0, 1), (1, 1, 13), (1, 13, 18)]
    with torch.no_grad():
        for row, first, last in pieces:
            alone = model(tokens[row : row + 1, first:last]).logits[0]
            torch.testing.assert_close(found[row, first:last], alone, atol=FP32_TOLERANCE, rtol=0)
    # Under scope `lane` attention crosses them.
    crossing = TinyLongMem(model).logits(tokens, documents=documents)
    assert (crossing[0, 7:] - found[0, 7:]).abs().max() > 0.1


@pytest.mark.parametrize("family", VARIANTS)
def test_backbone_losses_are_the_models_own(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    targets = tiny_tokens((2, 16), seed=1)
    targets[0, 3] = -100
    longmem = TinyLongMem(model).longmem
    losses = longmem.backbone_losses(longmem.encode(tokens, torch.zeros_like(tokens)), targets)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=SAME_TOLERANCE, rtol=0)
