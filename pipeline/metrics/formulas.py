"""Throughput and floating-point operations, by formula.

One multiplication with one addition counts as two operations. Counted are the matrix products; norms, activations,
softmax and rotary embedding are left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StackShape:
    """The sizes of a stack of decoder layers that decide its cost.

    Args:
        num_layers: Decoder layers.
        layer_weights: Weights of one layer's matrices, all of which each token is multiplied with.
        num_heads: Query heads.
        head_size: Numbers in a head.
    """

    num_layers: int
    layer_weights: int
    num_heads: int
    head_size: int


def tokens_per_second(num_tokens: int, seconds: float) -> float:
    """Throughput of a step.

    Args:
        num_tokens: Tokens of the step, over all ranks.
        seconds: What the step took; greater than 0.

    Returns:
        Tokens per second.
    """
    return num_tokens / seconds


def forward_flops_per_token(stack: StackShape, *, attended_tokens: float, head_weights: int = 0) -> float:
    """Operations of one token's way forward through a stack: twice its weights, and attention.

    Attention multiplies each query with the keys and the weights with the values: `2 * 2 * heads * head size`
    operations a layer for each attended token.

    Args:
        stack: The layers.
        attended_tokens: Tokens that a token attends to, on average: `(T + 1) / 2` in a causal segment of `T`.
        head_weights: Weights of the output matrix (hidden size times vocabulary), or 0 if no logits are computed.

    Returns:
        Operations per token.
    """
    attention = 4 * stack.num_heads * stack.head_size * attended_tokens
    return stack.num_layers * (2 * stack.layer_weights + attention) + 2 * head_weights


def memory_flops_per_token(
    *, num_memory_layers: int, num_heads: int, head_size: int, num_chunks: int, top_k_tokens: int
) -> float:
    """Operations of one token's exact search in memory and of its attention over what was found, forward.

    Args:
        num_memory_layers: SideNet layers that read memory.
        num_heads: Query heads; each searches for itself.
        head_size: Numbers in a head.
        num_chunks: Chunks that are scored, one chunk key each.
        top_k_tokens: Tokens retrieved for each query.

    Returns:
        Operations per token.
    """
    search = 2 * head_size * num_chunks
    read = 4 * head_size * top_k_tokens
    return num_memory_layers * num_heads * (search + read)


def training_flops_per_token(
    *, backbone: StackShape, sidenet: StackShape, attended_tokens: float, head_weights: int, memory_flops: float = 0.0
) -> float:
    """Operations of one trained token: the backbone forward, the SideNet forward and backward, the shared head.

    The SideNet's way back costs twice its way forward: once for the gradients of its inputs, once for those of its
    weights. The head is frozen, so its way back is the inputs' part only. The backbone has no way back.
    Re-computation of activations and the memory's way back are not counted.

    Args:
        backbone: The frozen layers; they compute no logits.
        sidenet: The trained layers.
        attended_tokens: Tokens that a token attends to locally, on average.
        head_weights: Weights of the output matrix.
        memory_flops: What `memory_flops_per_token` says.

    Returns:
        Operations per token.
    """
    backbone_forward = forward_flops_per_token(backbone, attended_tokens=attended_tokens)
    sidenet_forward = forward_flops_per_token(sidenet, attended_tokens=attended_tokens)
    head = 2 * 2 * head_weights
    return backbone_forward + 3 * sidenet_forward + head + memory_flops
