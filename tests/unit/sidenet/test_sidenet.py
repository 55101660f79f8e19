"""What the SideNet is made of; its arithmetic is in tests/unit/model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pipeline.backbone.backbone import Backbone
from pipeline.sidenet.layout import Layout
from pipeline.sidenet.sidenet import SideNet
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import VARIANTS, tiny_model


def make(family: str) -> tuple[Backbone, SideNet]:
    layout = Layout.build(4, layout="uniform", num_layers=2, memory_layers=[1], residual="interleaved")
    backbone = Backbone(tiny_model(family), taps=layout.taps, calls=layout.source_layers, memory_layers=[2])
    return backbone, SideNet(backbone, layout, fusion="gate", gate_init=0.25)


@pytest.mark.parametrize("family", VARIANTS)
def test_layers_are_trained_copies(family: str) -> None:
    backbone, side = make(family)
    for layer, source in zip(side.layers, (2, 4), strict=True):
        theirs = dict(backbone.layers[source - 1].named_parameters())
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, theirs[name])
            assert parameter.data_ptr() != theirs[name].data_ptr()
            assert parameter.requires_grad
    gates = [parameter for name, parameter in side.named_parameters() if name.endswith("gate")]
    assert [gate.tolist() for gate in gates] == [[0.25] * backbone.num_heads]
    # Neither embeddings nor LM head are its own.
    assert not any(isinstance(module, nn.Embedding) for module in side.modules())


def test_it_has_no_dropout_whatever_is_asked() -> None:
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    side = TinyLongMem(model)
    tokens = tiny_tokens((2, 8))
    expected = side.logits(tokens)
    side.longmem.sidenet.train()
    assert not any(module.training for module in side.longmem.sidenet.modules())
    assert torch.equal(side.logits(tokens), expected)


def test_the_reader_is_lent_for_one_call_only() -> None:
    side = TinyLongMem(tiny_model("llama"))
    tokens = tiny_tokens((2, 16))
    side.remember(tokens, start=0)
    side.hidden(tokens, start=16)
    for fusion in side.longmem.sidenet.memory.values():
        assert fusion.reader is None
        assert fusion.documents is None
        assert not fusion._outputs


def test_an_error_while_reading_gives_the_reader_back() -> None:
    class Broken:
        def read(self, layer: int, query: torch.Tensor) -> None:
            raise RuntimeError("broken")

    side = TinyLongMem(tiny_model("llama"))
    encoding = side.longmem.encode(tiny_tokens((2, 16)), torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="broken"):
        side.longmem.sidenet(encoding, Broken())
    assert all(fusion.reader is None for fusion in side.longmem.sidenet.memory.values())


def test_the_backbone_does_not_hear_of_its_copies() -> None:
    """Hooks of the backbone stay off the copies, and the other way round."""
    backbone, side = make("llama")
    tokens = tiny_tokens((1, 8))
    encoding = backbone(tokens)
    before = {number: tap.clone() for number, tap in encoding.taps.items()}
    with torch.no_grad():
        for parameter in side.parameters():
            parameter.mul_(1.5)
    side(encoding)
    assert not backbone._projected
    again = backbone(tokens)
    assert all(torch.equal(again.taps[number], tap) for number, tap in before.items())


@pytest.mark.parametrize("weight", [0.001, 0.01, 0.3])
def test_a_small_weight_of_memory_is_not_rounded_away_in_bf16(weight: float) -> None:
    """Local attention gives 0 and memory 1: what comes out is memory's weight, to the precision of one bf16 number."""

    @dataclass(frozen=True)
    class Read:
        values: torch.Tensor
        log_sum_exp: torch.Tensor
        window: None = None

    class Ones:
        def read(self, index: int, query: torch.Tensor) -> Read:
            return Read(torch.ones(query.shape), torch.zeros(query.shape[:-1]))

    _, side = make("llama")
    fusion = side.fusions[1]
    with torch.no_grad():
        fusion.gate.fill_(math.log(1 / weight - 1))
    local = torch.zeros(1, 4, 3, fusion.head_dim, dtype=torch.bfloat16)
    found = fusion.fuse(local, local, local[:, :2], Ones())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), torch.full(found.shape, weight), atol=0, rtol=2**-8)


def test_a_copied_layer_does_not_bring_the_backbone_with_it(monkeypatch):
    """Hooks on the original hold the backbone: copied with every layer, it would be there dozens of times."""

    def copied(self, memo):
        raise AssertionError("the backbone was copied")

    monkeypatch.setattr(Backbone, "__deepcopy__", copied, raising=False)
    tiny = TinyLongMem(tiny_model("llama"), sidenet={"layout": "top", "memory_layers": "all"})
    assert len(tiny.longmem.sidenet.layers) == len(tiny.longmem.backbone.layers), "every layer was copied"
