"""Masks by hand."""

from __future__ import annotations

import torch

from pipeline.backbone.masks import document_mask, visible_in_segment

CPU = torch.device("cpu")


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join(".x"[int(seen)] for seen in row) for row in mask.tolist()]


def test_causal() -> None:
    mask = visible_in_segment(slice(1, 4), 4, documents=None, window=None, device=CPU)
    assert rows(mask[0, 0]) == ["xx..", "xxx.", "xxxx"]


def test_a_window_counts_the_query_itself() -> None:
    mask = visible_in_segment(slice(0, 4), 4, documents=None, window=2, device=CPU)
    assert rows(mask[0, 0]) == ["x...", "xx..", ".xx.", "..xx"]


def test_documents() -> None:
    documents = torch.tensor([[1, 1, 2, 2], [3, 4, 4, 4]])
    mask = visible_in_segment(slice(0, 4), 4, documents=documents, window=None, device=CPU)
    assert rows(mask[0, 0]) == ["x...", "xx..", "..x.", "..xx"]
    assert rows(mask[1, 0]) == ["x...", ".x..", ".xx.", ".xxx"]


def test_the_additive_mask_is_finite() -> None:
    mask = document_mask(torch.tensor([[1, 2]]), dtype=torch.float16, window=None)
    assert mask.dtype == torch.float16
    assert mask.tolist() == [[[[0.0, -65504.0], [-65504.0, 0.0]]]]
