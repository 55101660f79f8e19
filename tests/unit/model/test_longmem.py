"""Joining backbone, SideNet and bank: sizes, timers, statistics, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pipeline.config.model import ModelSettings, SideNetConfig
from pipeline.errors import BackboneError, ConfigError
from pipeline.model.longmem import build, layout_of
from tests.tiny_longmem import TinyLongMem, reader_of, tiny_tokens
from tests.tiny_models import tiny_model

TWO_OF_FOUR = {"num_layers": 2, "memory_layers": "all"}


def test_the_bank_has_room_for_memory_and_one_segment() -> None:
    bank = TinyLongMem(tiny_model("qwen3"), lanes=3, sidenet=TWO_OF_FOUR).bank
    assert bank.shape.num_chunks == (32 + 16) // 4
    assert (bank.shape.num_layers, bank.shape.num_lanes) == (2, 3)
    assert (bank.shape.num_kv_heads, bank.shape.head_dim) == (2, 12)
    assert bank.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [("auto", "bf16", torch.bfloat16), ("fp16", "fp32", torch.float16), ("fp32", "bf16", torch.float32)],
)
def test_dtype_of_the_bank(dtype: str, precision: str, expected: torch.dtype) -> None:
    side = TinyLongMem(tiny_model("llama"), memory={"dtype": dtype}, train={"precision": precision})
    assert side.bank.dtype == expected


def test_a_bank_that_no_machine_holds_is_refused_before_it_is_allocated() -> None:
    # For a token and 2 layers, 3 lanes, 2 heads of 12 numbers: 1152 bytes of keys and values, 144 of chunk keys and 8
    # of marks, as a chunk has 4 tokens. Remembered are 10,000,000,000 and a segment of 16.
    words = "does not fit into host memory; got: 13,040,000,020,864 bytes for a rank.*launch/plan.py says what fits"
    with pytest.raises(ConfigError, match=words):
        TinyLongMem(tiny_model("qwen3"), lanes=3, sidenet=TWO_OF_FOUR, memory={"tokens": 10**10})


def test_layers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="sidenet.num_layers is 5; the backbone allows 1 to 4"):
        layout_of(SideNetConfig(num_layers=5), 4)
    with pytest.raises(ConfigError, match=r"sidenet.memory_layers is \[3\]; expected different SideNet layers from 1"):
        build(ModelSettings(sidenet=SideNetConfig(memory_layers=(3,))), tiny_model("llama"))


def test_an_unknown_family_is_refused() -> None:
    model = tiny_model("llama")
    model.config.model_type = "mamba"
    with pytest.raises(BackboneError, match="got: model_type 'mamba'"):
        build(ModelSettings(), model)


def test_ages_are_told_for_each_memory_layer() -> None:
    """Two chunks a head and token; the segment begins at 32 and the oldest chunk that is remembered at 0."""
    side, tokens = TinyLongMem(tiny_model("llama"), sidenet=TWO_OF_FOUR), tiny_tokens((2, 16))
    for start in (0, 16, 32):
        side.remember(tokens, start=start)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    side.hidden(tokens, start=32, observe_ages=lambda layer, ages: seen[layer].append(ages))
    for ages in seen.values():
        together = torch.cat(ages)
        assert len(together) == 2 * 4 * 16 * 2  # lanes, heads, tokens, chunks
        assert int(together.min()) >= 4  # first token of the nearest chunk
        assert int(together.max()) <= 32 + 15


def test_every_read_is_timed() -> None:
    side, tokens, running = TinyLongMem(tiny_model("llama"), sidenet=TWO_OF_FOUR), tiny_tokens((2, 16)), []

    @contextmanager
    def timed() -> Iterator[None]:
        running.append("begun")
        yield
        running.append("ended")

    documents = torch.zeros_like(tokens)
    reader = reader_of(side.longmem, side.bank, start=0, documents=documents, timed=timed)
    side.longmem.hidden(side.longmem.encode(tokens, documents), reader)
    assert running == ["begun", "ended"] * 2


def test_a_run_through_engines_is_the_same() -> None:
    """What is passed as `encode` and `run_sidenet` is what is called."""
    from pipeline.model.longmem import LongMem

    side, tokens, called = TinyLongMem(tiny_model("llama")), tiny_tokens((2, 16)), []
    plain = side.longmem

    def encode(*args: Tensor) -> object:
        called.append("encode")
        return plain.backbone(*args)

    def run_sidenet(*args: object) -> Tensor:
        called.append("sidenet")
        hidden: Tensor = plain.sidenet(*args)
        return hidden

    wrapped = LongMem(side.config.model, plain.backbone, plain.sidenet, encode=encode, run_sidenet=run_sidenet)
    documents = torch.zeros_like(tokens)
    found = wrapped.hidden(wrapped.encode(tokens, documents), None)
    assert torch.equal(found, plain.hidden(plain.encode(tokens, documents), None))
    assert called == ["encode", "sidenet"]


def test_losses_are_those_of_the_logits() -> None:
    side, tokens = TinyLongMem(tiny_model("gemma3_text")), tiny_tokens((2, 16))  # caps its final logits
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    losses = side.longmem.losses(side.hidden(tokens), targets)
    expected = torch.nn.functional.cross_entropy(side.logits(tokens).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses.shape == targets.shape
