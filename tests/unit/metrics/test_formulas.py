"""Throughput and operations against numbers worked out by hand."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.metrics.formulas import (
    StackShape,
    forward_flops_per_token,
    memory_flops_per_token,
    tokens_per_second,
    training_flops_per_token,
)

# Two layers of 100 weights; 2 heads of 5 numbers.
SMALL = StackShape(num_layers=2, layer_weights=100, num_heads=2, head_size=5)
# SmolLM2-135M: q and o 576 x 576, k and v 576 x 192, three matrices 576 x 1536.
SMOLLM2 = StackShape(num_layers=30, layer_weights=2 * 331_776 + 2 * 110_592 + 3 * 884_736, num_heads=9, head_size=64)


def test_tokens_per_second() -> None:
    assert tokens_per_second(1024, 0.5) == 2048.0


def test_forward() -> None:
    # A layer: 2 x 100 + 4 x 10 numbers x 8 attended tokens = 520. Two of them, and a head of 2 x 50.
    assert forward_flops_per_token(SMALL, attended_tokens=8) == 1040
    assert forward_flops_per_token(SMALL, attended_tokens=8, head_weights=50) == 1140


def test_forward_of_smollm2() -> None:
    # 106,168,320 weights of matrices and 28,311,552 of the head make 268,959,744; attention 30 x 4 x 576 x 512.5.
    assert (
        forward_flops_per_token(SMOLLM2, attended_tokens=512.5, head_weights=576 * 49_152) == 268_959_744 + 35_424_000
    )


def test_forward_agrees_with_counting_the_products_of_a_real_model() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",  # multiplies the whole square, so that every token attends to all 16
    )
    model = LlamaForCausalLM(config)
    num_tokens = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, num_tokens, dtype=torch.long))
    # q and o 32 x 32, k and v 32 x 16, three matrices 32 x 48.
    stack = StackShape(num_layers=3, layer_weights=2 * 1024 + 2 * 512 + 3 * 1536, num_heads=4, head_size=8)
    expected = num_tokens * (forward_flops_per_token(stack, attended_tokens=num_tokens, head_weights=32 * 64))
    assert counter.get_total_flops() == expected


def test_memory() -> None:
    # A head: 2 x 5 for each of 30 chunks, 4 x 5 for each of 12 tokens = 540; 2 heads, 3 layers.
    assert memory_flops_per_token(num_memory_layers=3, num_heads=2, head_size=5, num_chunks=30, top_k_tokens=12) == 3240


def test_training() -> None:
    # Backbone forward 1040; SideNet of one layer three times 520; head 4 x 50; memory 7.
    sidenet = StackShape(num_layers=1, layer_weights=100, num_heads=2, head_size=5)
    total = training_flops_per_token(
        backbone=SMALL, sidenet=sidenet, attended_tokens=8, head_weights=50, memory_flops=7
    )
    assert total == 1040 + 1560 + 200 + 7
