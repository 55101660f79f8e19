"""Block boundaries, memory layers and taps, by hand."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.sidenet.layout import Layout


def build(
    num_backbone_layers: int,
    layout: str = "uniform",
    num_layers: int | None = None,
    memory_layers: str | list[int] | None = None,
    residual: str = "interleaved",
) -> Layout:
    return Layout.build(
        num_backbone_layers, layout=layout, num_layers=num_layers, memory_layers=memory_layers, residual=residual
    )


def test_the_paper() -> None:
    """24 layers: 12 side layers, the ninth reads layer 18."""
    layout = build(24)
    assert layout.boundaries == tuple(range(0, 25, 2))
    assert layout.memory_layers == (9,)
    assert layout.memory_sources == (18,)
    assert layout.source_layers == tuple(range(2, 25, 2))


@pytest.mark.parametrize(
    ("kind", "num_layers", "boundaries"),
    [
        ("uniform", 1, (0, 6)),
        ("uniform", 4, (0, 2, 3, 4, 6)),  # 1.5 and 4.5 go to the even number
        ("uniform", 6, (0, 1, 2, 3, 4, 5, 6)),
        ("uniform", None, (0, 2, 4, 6)),
        ("top", 2, (4, 5, 6)),
        ("top", None, (0, 1, 2, 3, 4, 5, 6)),
    ],
)
def test_boundaries_of_six_layers(kind: str, num_layers: int | None, boundaries: tuple[int, ...]) -> None:
    assert build(6, kind, num_layers).boundaries == boundaries


@pytest.mark.parametrize("num_backbone_layers", range(1, 40))
def test_boundaries_always_rise(num_backbone_layers: int) -> None:
    for kind in ("uniform", "top"):
        for num_layers in range(1, num_backbone_layers + 1):
            found = build(num_backbone_layers, kind, num_layers).boundaries
            assert len(found) == num_layers + 1
            assert list(found) == sorted(set(found))
            assert found[-1] == num_backbone_layers


def test_differences_and_taps() -> None:
    layout = build(6, "uniform", 3)
    assert [layout.difference(layer) for layer in (1, 2, 3)] == [(1, 0), (3, 2), (5, 4)]
    assert layout.taps == (0, 1, 2, 3, 4, 5)
    paper = build(6, "uniform", 3, residual="paper")
    assert [paper.difference(layer) for layer in (1, 2, 3)] == [(2, 0), (4, 2), (6, 4)]
    assert paper.taps == (0, 2, 4, 6)
    normed = build(6, "uniform", 3, residual="paper_normed")  # tap 7 is that after the final norm
    assert [normed.difference(layer) for layer in (1, 2, 3)] == [(2, 0), (4, 2), (7, 4)]
    assert normed.taps == (0, 2, 4, 7)
    top = build(6, "top", 2)  # a block of one layer carries nothing past it
    assert [top.difference(layer) for layer in (1, 2)] == [None, None]
    assert top.taps == (4,)


def test_memory_layers() -> None:
    assert build(6, memory_layers="all").memory_layers == (1, 2, 3)
    assert build(6, memory_layers=[3, 1]).memory_layers == (1, 3)
    assert build(6, memory_layers=[3, 1]).memory_sources == (2, 6)
    assert build(1).memory_layers == (1,)


@pytest.mark.parametrize("num_layers", [0, 7])
def test_too_many_or_no_side_layers_are_refused(num_layers: int) -> None:
    with pytest.raises(ConfigError, match=f"sidenet.num_layers is {num_layers}; the backbone allows 1 to 6"):
        build(6, num_layers=num_layers, memory_layers=[1])


@pytest.mark.parametrize("memory_layers", [[0], [4], [1, 1], []])
def test_memory_layers_out_of_range_are_refused(memory_layers: list[int]) -> None:
    with pytest.raises(
        ConfigError, match=r"sidenet.memory_layers is \[.*\]; expected different SideNet layers from 1 to 3"
    ):
        build(6, memory_layers=memory_layers)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problem"):
        build(6, num_layers=7, memory_layers=[8])
