"""Taps, calls and identity of the frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pipeline.backbone.backbone import Backbone, identity
from tests.reference_lm import Reference
from tests.tiny_longmem import tiny_tokens
from tests.tiny_models import VARIANTS, tiny_model

FP32_TOLERANCE = 2e-4  # a residual stream of size 4 after four random layers


@pytest.mark.parametrize("family", VARIANTS)
def test_taps_are_the_residual_stream_before_the_final_norm(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
        exact = Reference(model).taps(tokens)
    backbone = Backbone(model, taps=[0, 1, 2, 3, 4])
    taps = backbone(tokens).taps
    assert sorted(taps) == [0, 1, 2, 3, 4]
    for number in range(5):
        torch.testing.assert_close(taps[number].double(), exact[number], atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
        if number < 4:
            torch.testing.assert_close(taps[number], hidden[number])
    torch.testing.assert_close(backbone.norm(taps[4]), hidden[4])


@pytest.mark.parametrize("family", VARIANTS)
def test_documents_begin_anew(family: str) -> None:
    model, tokens = tiny_model(family), tiny_tokens((2, 16))
    documents = torch.tensor([[1] * 5 + [2] * 11, [7] * 16])
    found = Backbone(model, taps=[4], memory_layers=[4])(tokens, documents)
    with torch.no_grad():
        exact = Reference(model).taps(tokens, documents)
    torch.testing.assert_close(found.taps[4].double(), exact[4], atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)
    assert found.documents is documents


def test_only_what_is_asked_for_is_kept() -> None:
    backbone = Backbone(tiny_model("llama"), taps=[2, 2, 0], calls=[3], memory_layers=[4, 1])
    encoding = backbone(tiny_tokens((1, 4)))
    assert sorted(encoding.taps) == [0, 2]
    assert list(encoding.calls) == [3]
    assert len(encoding.memory) == 2
    other = Backbone(tiny_model("llama"), memory_layers=[1, 4])(tiny_tokens((1, 4)))
    assert torch.equal(encoding.memory[0].key, other.memory[1].key)  # in the order asked for
    assert encoding.documents is None


def test_frozen_means_frozen() -> None:
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    backbone = Backbone(model, taps=[4], memory_layers=[4])
    encoding = backbone(tiny_tokens((1, 4)))
    backbone.train()  # asked by a wrapper: there is no dropout all the same
    assert torch.equal(backbone(tiny_tokens((1, 4))).taps[4], encoding.taps[4])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not encoding.taps[4].requires_grad
    assert not encoding.memory[0].key.requires_grad


def test_identity_is_of_names_shapes_and_bytes() -> None:
    first = identity(tiny_model("llama"))
    assert len(first) == 64
    assert first == identity(tiny_model("llama"))
    assert first != identity(tiny_model("llama", seed=1))
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-6
    assert first != identity(model)


def test_partitioned_parameters_are_gathered_one_by_one_for_identity() -> None:
    model = tiny_model("gpt2", layers=1)
    seen: list[nn.Parameter] = []

    @contextmanager
    def made_whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        seen.extend(parameters)
        yield

    assert identity(model, made_whole=made_whole) == identity(model)
    assert [id(p) for p in seen] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("family", VARIANTS)
def test_the_head_alone_is_made_whole(family: str) -> None:
    model = tiny_model(family, layers=1)
    seen: list[int] = []

    @contextmanager
    def made_whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        seen.extend(id(parameter) for parameter in parameters)
        yield

    backbone = Backbone(model, made_whole=made_whole)
    with backbone.head_parameters() as (weight, bias):
        assert weight is model.get_output_embeddings().weight
        assert bias is model.get_output_embeddings().bias
    assert seen == [id(part) for part in (weight, bias) if part is not None]
