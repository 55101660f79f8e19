"""What a SideNet's layers do otherwise than those that they are copies of, against the slow reference."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from pipeline.backbone.backbone import Backbone
from pipeline.errors import BackboneError
from pipeline.sidenet.copies import Habits, trainable_copy
from tests.reference import ReferenceSideNet
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import FAMILIES, tiny_model

EPSILON = 0.25
ACTIVATION_OF: Mapping[str, str] = {
    "gpt2": "mlp.act",
    "gpt_neox": "mlp.act",
    "longmem_gpt": "mlp.act",
    "bloom": "mlp.gelu_impl",
    "phi3": "mlp.activation_fn",
    "opt": "activation_fn",  # of which the reference knows that it is relu
}


def change(module: nn.Module) -> None:
    """Gives every norm in a module another epsilon."""
    for part in module.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(part, name):
                setattr(part, name, EPSILON)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_activations(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 12))
    layout = {"layout": "uniform", "num_layers": 2, "memory_layers": [1]}
    side = TinyLongMem(model, sidenet={**layout, "norm_epsilon": EPSILON, "activation": "relu"})
    slow = ReferenceSideNet(model, (0, 2, 4))
    unchanged = slow.logits(tokens).detach()
    for layer in slow.layers.values():
        change(layer)
        layer.set_submodule(ACTIVATION_OF.get(family, "mlp.act_fn"), nn.ReLU())
    change(slow.norm)
    expected = slow.logits(tokens).detach()
    found = side.logits(tokens, memory=False)
    assert float((expected - unchanged).abs().max()) > 1e-2, "else nothing was changed"
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # The backbone's own layers are as they were.
    taps = side.longmem.backbone(tokens).taps[4]
    torch.testing.assert_close(taps.double(), slow.lm.taps(tokens)[-1].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "longmem_gpt"])
@pytest.mark.parametrize(("layout", "boundaries"), [("uniform", (0, 2, 4)), ("top", (2, 3, 4))])
def test_the_last_difference_is_that_of_the_normed_state(family: str, layout: str, boundaries: tuple[int, ...]) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 12))
    side = TinyLongMem(model, sidenet={"layout": layout, "num_layers": 2, "residual": "paper_normed"})
    expected = ReferenceSideNet(model, boundaries, residual="paper_normed").logits(tokens).detach()
    torch.testing.assert_close(side.logits(tokens, memory=False).double(), expected, rtol=1e-4, atol=1e-4)
    plain = ReferenceSideNet(model, boundaries, residual="paper").logits(tokens).detach()
    assert float((expected - plain).abs().max()) > 1e-2


def test_a_habit_that_a_module_cannot_have_is_refused() -> None:
    backbone = Backbone(tiny_model("llama"))
    with pytest.raises(BackboneError, match="in the layers of llama there is nothing that sidenet.activation could be"):
        trainable_copy(backbone.norm, backbone, Habits(activation="relu"))
