"""Every family, position rule and fusion with memory: logits and gradients against the slow reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from pipeline.memory import read as memory_read
from pipeline.sidenet.fusion import MemoryFusion
from tests.reference import ReferenceSideNet
from tests.tiny_longmem import TinyLongMem, tiny_tokens
from tests.tiny_models import VARIANTS, tiny_model

# fp32 against float64 over four random layers that magnify rounding; a wrong rule is off by more than 0.05.
LOGITS_TOLERANCE = 1e-3
# Of the norm of each parameter's gradient.
GRADIENT_TOLERANCE = 1e-3

SEGMENT = 12
ALL = 80.0  # a gate that leaves nothing to the other side, however far apart the logits are
RULES = ["none", "true", "fixed:9", "clamp:14"]  # 14 falls inside a chunk for most queries
WITHOUT_WINDOW_OR_LEARNED_POSITIONS = [
    name for name in VARIANTS if not name.endswith("-window") and not name.startswith(("gemma3_text", "gpt2", "opt"))
]


def make(
    family: str,
    *,
    position: str,
    fusion: str,
    memory_layers: list[int],
    scope: str = "lane",
    memory: Mapping[str, object] | None = None,
    backbone: Mapping[str, object] | None = None,
    **sidenet: object,
) -> tuple[TinyLongMem, ReferenceSideNet]:
    """A `uniform` SideNet of two layers over four, which remembers 16 tokens and reads 8 of them."""
    model = tiny_model(family)
    fast = TinyLongMem(
        model,
        memory={"tokens": 16, "top_k_tokens": 8, "position": position, "scope": scope, **(memory or {})},
        sidenet={
            "num_layers": 2,
            "memory_layers": memory_layers,
            "fusion": fusion,
            "gate_init": -0.3,
            **sidenet,
        },
        train={"segment_tokens": SEGMENT},
        backbone=backbone or {},
    )
    return fast, fast.reference(model, (0, 2, 4))


def read_on(fast: TinyLongMem, slow: ReferenceSideNet | None, documents: Tensor | None = None) -> Tensor:
    """Remembers three segments (more than there is room for) and gives the third, which is still to be predicted."""
    tokens = tiny_tokens((2, 3 * SEGMENT))
    documents = torch.zeros_like(tokens) if documents is None else documents
    for start in range(0, 3 * SEGMENT, SEGMENT):
        segment = tokens[:, start : start + SEGMENT]
        of_segment = documents[:, start : start + SEGMENT]
        fast.remember(segment, start=start, documents=of_segment)
        if slow is not None:
            slow.remember(segment, start=start, documents=of_segment)
    return tokens[:, -SEGMENT:]


def memory_share(fast: TinyLongMem) -> Tensor:
    """Mean weight of memory in each head of the second side layer, at the last read."""
    fusion = fast.longmem.sidenet.memory["2"]
    assert isinstance(fusion, MemoryFusion)
    assert fusion.memory_share is not None
    return fusion.memory_share


def compare_gradients(fast: TinyLongMem, slow: ReferenceSideNet) -> None:
    """Those of every trained parameter, after the backward pass of both."""
    side = fast.longmem.sidenet
    pairs = [(side.get_parameter(f"memory.{n}.gate"), gate) for n, gate in slow.gates.items()]
    for layer, module in slow.layers.items():
        theirs = dict(module.named_parameters())
        pairs += [(p, theirs[n]) for n, p in side.layers[layer - 1].named_parameters()]
    pairs += list(zip(side.norm.parameters(), slow.norm.parameters(), strict=True))
    assert len(pairs) == len(slow.trained)
    for found, wanted in pairs:
        assert found.grad is not None
        assert wanted.grad is not None
        largest = wanted.grad.norm()
        # A key's bias moves all logits of a query alike under `gate`, which a softmax does not see: only noise there.
        assert (found.grad - wanted.grad).norm() <= GRADIENT_TOLERANCE * max(float(largest), 0.1)


RECENT: dict[str, dict[str, object]] = {
    "sink": {"sink": True},
    "window": {"window_tokens": 8},
    "window of everything": {"window_tokens": 16},
    "kv_head": {"retrieve_for": "kv_head"},
    "all": {"sink": True, "window_tokens": 8, "retrieve_for": "kv_head"},
}


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize(
    ("recent", "position", "fusion"),
    [
        ("sink", "none", "gate"),
        ("sink", "true", "joint"),
        ("window", "clamp:14", "gate"),
        ("window of everything", "none", "joint"),
        ("kv_head", "clamp:14", "joint"),
        ("all", "clamp:14", "joint"),
        ("all", "true", "gate"),
    ],
)
def test_sink_window_and_shared_retrieval(family: str, recent: str, position: str, fusion: str) -> None:
    fast, slow = make(family, position=position, fusion=fusion, memory_layers=[1, 2], memory=RECENT[recent])
    segment = read_on(fast, slow)
    expected = slow.logits(segment, start=2 * SEGMENT)
    torch.testing.assert_close(
        fast.logits(segment, start=2 * SEGMENT).double(), expected, atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE
    )
    plain, _ = make(family, position=position, fusion=fusion, memory_layers=[1, 2])
    read_on(plain, None)
    differs = not torch.allclose(plain.logits(segment, start=2 * SEGMENT), expected.float(), atol=0.01)
    backbone = fast.longmem.backbone
    assert differs == (recent != "kv_head" or backbone.num_heads > backbone.num_kv_heads)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("scope", ["lane", "document"])
def test_left_context(family: str, scope: str) -> None:
    """Segments are encoded with ten tokens before them: of those nothing is kept, and what is kept knows of them."""
    count = 10
    fast, slow = make(
        family,
        position="clamp:14",
        fusion="joint",
        memory_layers=[1, 2],
        scope=scope,
        memory=RECENT["all"],
        backbone={"context_tokens": count},
    )
    tokens, documents = tiny_tokens((2, 3 * SEGMENT)), torch.tensor([[1] * 20 + [2] * 16, [4] * 29 + [5] * 7])
    for start in range(0, 3 * SEGMENT, SEGMENT):
        before = min(count, start)
        piece = slice(start - before, start + SEGMENT)
        for one in (fast, slow):
            one.remember(tokens[:, piece], start=start, documents=documents[:, piece], num_context=before)
    arguments: dict[str, Any] = {"start": 2 * SEGMENT, "documents": documents[:, piece], "num_context": count}
    expected = slow.logits(tokens[:, piece], **arguments)
    found = fast.logits(tokens[:, piece], **arguments)
    torch.testing.assert_close(found.double(), expected, atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE)
    assert found.shape[1] == SEGMENT


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
@pytest.mark.parametrize("fusion", ["gate", "joint"])
@pytest.mark.parametrize("scope", ["lane", "document"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_sink_and_window(family: str, fusion: str, scope: str, checkpointing: bool) -> None:
    fast, slow = make(
        family,
        position="clamp:14",
        fusion=fusion,
        memory_layers=[1, 2],
        scope=scope,
        memory=RECENT["all"],
        activation_checkpointing=checkpointing,
    )
    documents = torch.tensor([0] * 14 + [1] * 22).expand(2, -1)
    segment, of_segment = read_on(fast, slow, documents), documents[:, -SEGMENT:]
    targets = tiny_tokens((2, SEGMENT), seed=7)
    fast.loss(segment, targets, start=2 * SEGMENT, documents=of_segment).backward()
    logits = slow.logits(segment, start=2 * SEGMENT, documents=of_segment)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    compare_gradients(fast, slow)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("position", RULES)
@pytest.mark.parametrize("fusion", ["gate", "joint"])
def test_logits(family: str, position: str, fusion: str) -> None:
    fast, slow = make(family, position=position, fusion=fusion, memory_layers=[2])
    tokens = read_on(fast, slow)
    found, expected = fast.logits(tokens, start=2 * SEGMENT), slow.logits(tokens, start=2 * SEGMENT).detach()
    torch.testing.assert_close(found, expected.float(), atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE)
    assert (found - fast.logits(tokens, memory=False)).abs().max() > 0.05  # memory says something


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2", "bloom"])
@pytest.mark.parametrize("scope", ["document", "group"])
@pytest.mark.parametrize(("fusion", "residual"), [("gate", "paper"), ("joint", "interleaved")])
def test_scopes(family: str, scope: str, fusion: str, residual: str) -> None:
    """Documents end inside the remembered past, inside a chunk, and inside the segment that reads."""
    fast, slow = make(family, position="clamp:14", fusion=fusion, memory_layers=[1, 2], scope=scope, residual=residual)
    documents = torch.tensor([[1] * 18 + [2] * 13 + [3] * 5, [4] * 29 + [5] * 7])
    tokens, last = read_on(fast, slow, documents), documents[:, -SEGMENT:]
    found = fast.logits(tokens, start=2 * SEGMENT, documents=last)
    expected = slow.logits(tokens, start=2 * SEGMENT, documents=last).detach()
    torch.testing.assert_close(found, expected.float(), atol=LOGITS_TOLERANCE, rtol=LOGITS_TOLERANCE)
    assert (found - fast.logits(tokens, documents=last, memory=False)).abs().max() > 0.05


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize(("position", "fusion"), [("clamp:14", "joint"), ("none", "gate")])
def test_gradients(family: str, position: str, fusion: str) -> None:
    """Both memory layers read, so that gradients go through the query of one layer into the layers below."""
    fast, slow = make(family, position=position, fusion=fusion, memory_layers=[1, 2])
    tokens = read_on(fast, slow)
    targets = tiny_tokens((2, SEGMENT), seed=5)
    targets[0, 2] = -100
    loss = fast.loss(tokens, targets, start=2 * SEGMENT)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(
        slow.logits(tokens, start=2 * SEGMENT).transpose(1, 2), targets, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=LOGITS_TOLERANCE)
    compare_gradients(fast, slow)
    assert all(parameter.grad is None for parameter in fast.longmem.backbone.parameters())


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("fusion", ["gate", "joint"])
def test_activation_checkpointing_changes_no_gradient_and_searches_once(
    family: str, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, searched = [], Mock(wraps=memory_read.search)
    monkeypatch.setattr(memory_read, "search", searched)
    searches = []
    for checkpointing in (False, True):
        fast, _ = make(
            family, position="clamp:14", fusion=fusion, memory_layers=[1, 2], activation_checkpointing=checkpointing
        )
        tokens = read_on(fast, None)
        fast.loss(tokens, tokens.roll(-1, 1), start=2 * SEGMENT).backward()
        gradients.append([parameter.grad for parameter in fast.longmem.sidenet.parameters()])
        searches.append(searched.call_count)
    assert searches[1] == 2 * searches[0] > 0  # of both passes together
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert recomputed is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("family", WITHOUT_WINDOW_OR_LEARNED_POSITIONS)
@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_one_layer_that_reads_all_its_past_is_the_model_over_all_of_it(family: str, chunk_size: int) -> None:
    """What a first layer stores depends on the token alone: with `joint` and `true`, memory is a longer window.

    Nothing but Hugging Face's own logits is compared with here.
    """
    model, tokens = tiny_model(family, layers=1), tiny_tokens((2, 3 * SEGMENT))
    fast = TinyLongMem(
        model,
        memory={"tokens": 24, "chunk_size": chunk_size, "top_k_tokens": 24, "position": "true"},
        sidenet={"layout": "top", "memory_layers": [1], "fusion": "joint"},
        train={"segment_tokens": SEGMENT},
    )
    with torch.no_grad():
        expected = model(tokens).logits
    for start in range(0, 3 * SEGMENT, SEGMENT):
        segment = tokens[:, start : start + SEGMENT]
        fast.remember(segment, start=start)
        torch.testing.assert_close(
            fast.logits(segment, start=start),
            expected[:, start : start + SEGMENT],
            atol=LOGITS_TOLERANCE,
            rtol=LOGITS_TOLERANCE,
        )


def test_all_memory_within_a_clamp_is_read_at_its_true_distance() -> None:
    found = {}
    for position in ("true", "clamp:28", "clamp:20"):  # no token lies more than 27 back
        fast, _ = make("llama", position=position, fusion="joint", memory_layers=[2])
        tokens = read_on(fast, None)
        found[position] = fast.logits(tokens, start=2 * SEGMENT)
    assert torch.equal(found["true"], found["clamp:28"])
    assert not torch.equal(found["true"], found["clamp:20"])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_ignore_the_rule(family: str) -> None:
    found = []
    for position in RULES:
        fast, _ = make(family, position=position, fusion="joint", memory_layers=[2])
        found.append(fast.logits(read_on(fast, None), start=2 * SEGMENT))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("fusion", ["gate", "joint"])
def test_the_gate_is_the_share_that_it_says(fusion: str) -> None:
    """`gate`: sigmoid(g) is the weight of local attention. `joint`: a larger g gives memory more."""
    fast, _ = make("llama", position="none", fusion=fusion, memory_layers=[2])
    tokens = read_on(fast, None)
    shares = {}
    for gate in (-ALL, 0.0, ALL):
        fast.set_gates(gate)
        logits = fast.logits(tokens, start=2 * SEGMENT)
        share = memory_share(fast)
        assert share.shape == (4,)
        shares[gate] = share
        if gate == (ALL if fusion == "gate" else -ALL):
            torch.testing.assert_close(logits, fast.logits(tokens, memory=False), atol=1e-5, rtol=0)
    low, high = (shares[ALL], shares[-ALL]) if fusion == "gate" else (shares[-ALL], shares[ALL])
    torch.testing.assert_close(low, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(high, torch.ones(4), atol=1e-6, rtol=0)
    if fusion == "gate":
        torch.testing.assert_close(shares[0.0], torch.full((4,), 0.5), atol=1e-6, rtol=0)


def test_without_visible_memory_the_share_is_zero() -> None:
    fast, _ = make("llama", position="none", fusion="gate", memory_layers=[2])
    fast.logits(tiny_tokens((2, SEGMENT)))
    assert torch.equal(memory_share(fast), torch.zeros(4))
