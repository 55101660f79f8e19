"""The page of an inspection: all of it is there, and nothing in it is anything but text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import pipeline.face.page
from pipeline.errors import DataError
from pipeline.face.inspection import LayerGates, ReadChunk, SeenToken
from pipeline.face.page import best_chunks, render
from tests.made_up_inspection import inspection_of, made_up_inspection

ASSETS = Path(pipeline.face.page.__file__).parent
READABLE, DISTINCT = 4.5, 3.0  # WCAG 2.2, level AA: text (1.4.3); lines and marks (1.4.11)
ROUNDED = 5e-4  # relative, of four significant digits
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.hacked = 1'>",
    "]]>&lt;b&gt;&amp;",
    "$data $policy ${script}",
    "\u2028\u2029\u202e\x00\x7f\ufeff",
    "\ud800",
    "__proto__",
)


class Parts(HTMLParser):
    """What a browser takes for scripts, for the style and for tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._within = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._within = str(attributes.get("id") or tag) if tag in ("script", "style", "title") else ""

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[self._within] = self.texts.get(self._within, "") + data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Parts(page).texts["data"])


def read(**changes: Any) -> ReadChunk:
    plain = ReadChunk(text=" a b", document="book", distance=9, score=1.5, share=0.25, layer=3, heads=(0, 2))
    return replace(plain, **changes)


def seen(*chunks: ReadChunk, **changes: Any) -> SeenToken:
    return replace(SeenToken(" word", 1.0, 2.0, list(chunks)), **changes)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_data_and_nothing_else(text: str) -> None:
    chunk = read(text=text, document=f"{text}.txt")
    page = render(inspection_of([seen(chunk, text=text)], title=text, document=text))
    plain, parts = Parts(render(made_up_inspection())), Parts(page)
    assert [tag for tag, _ in parts.tags] == [tag for tag, _ in plain.tags]
    data = data_of(page)
    assert data["tokens"][0][0] == text
    assert data["strings"] == [text, f"{text}.txt"]
    assert data["memory"]["documents"][0][0] == text
    (packed,) = re.findall('id="data">(.*?)</script>', page, re.DOTALL)
    assert not set(packed) & set("<>&\u2028\u2029\ud800")
    page.encode()  # half a character would not be written


def test_the_page_asks_for_nothing() -> None:
    parts = Parts(render(made_up_inspection()))
    attributes = {name for _, found in parts.tags for name in found}
    assert not attributes & {"src", "href", "srcset", "action", "style"}
    assert not {tag for tag, _ in parts.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    assert "url(" not in parts.texts["style"] and "@import" not in parts.texts["style"]


def test_the_policy_allows_this_style_and_this_script_only() -> None:
    parts = Parts(render(made_up_inspection()))
    (policy,) = [found["content"] for _, found in parts.tags if found.get("http-equiv") == "Content-Security-Policy"]

    def fingerprint(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": fingerprint(parts.texts["style"]),
        "script-src": fingerprint(parts.texts["script"]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_everything_that_was_seen_is_in_the_page() -> None:
    inspection = made_up_inspection()
    data = data_of(render(inspection))
    assert len(data["tokens"]) == len(inspection.tokens)
    for token, (text, with_memory, without, left_out, flat) in zip(inspection.tokens, data["tokens"], strict=True):
        assert (text, left_out) == (token.text, 0)
        assert with_memory == (token.loss_with and pytest.approx(token.loss_with, rel=ROUNDED))
        assert without == (token.loss_without and pytest.approx(token.loss_without, rel=ROUNDED))
        rows = [flat[start : start + 7] for start in range(0, len(flat), 7)]
        expected = sorted(token.chunks, key=lambda chunk: -chunk.share)
        assert [
            (data["strings"][text], data["strings"][document], distance, layer, tuple(data["heads"][heads]))
            for text, document, distance, _, _, layer, heads in rows
        ] == [(chunk.text, chunk.document, chunk.distance, chunk.layer, chunk.heads) for chunk in expected]
        assert [row[3] for row in rows] == pytest.approx([chunk.score for chunk in expected], rel=ROUNDED)
        assert [row[4] for row in rows] == pytest.approx([chunk.share for chunk in expected], rel=ROUNDED)
    assert data["gates"] == [[gates.layer, gates.weights, gates.learnt] for gates in inspection.gates]
    assert data["memory"]["names"] == inspection.memory.names
    assert data["memory"]["documents"] == [[book.name, book.tokens] for book in inspection.memory.documents]
    assert data["perplexity"] == [
        pytest.approx(inspection.perplexity_with, rel=ROUNDED),
        pytest.approx(inspection.perplexity_without, rel=ROUNDED),
    ]
    assert (data["model"], data["fusion"]) == (inspection.model, inspection.fusion)


def test_only_the_best_chunks_of_a_token_are_kept_and_the_others_counted() -> None:
    shares = (0.1, 0.4, 0.2, 0.4, 0.3)
    chunks = [read(share=share, layer=layer) for layer, share in enumerate(shares)]
    assert [chunk.layer for chunk in best_chunks(chunks, 3)] == [1, 3, 4]
    data = data_of(render(inspection_of([seen(*chunks, left_out=10)]), chunks_per_token=3))
    _, _, _, left_out, flat = data["tokens"][0]
    assert (left_out, flat[5::7]) == (12, [1, 3, 4])


def test_a_text_that_comes_back_is_stored_once() -> None:
    page = render(inspection_of([seen(read(text="once upon"), read(text="once upon", layer=4)) for _ in range(9)]))
    assert page.count("once upon") == 1


def test_a_prompt_of_one_token_has_no_perplexity() -> None:
    only = SeenToken("Once", None, None, [])
    assert data_of(render(inspection_of([only], perplexity_with=None, perplexity_without=None)))["perplexity"] == [
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            seen(loss_with=float("nan")),
            r"The loss of token 2 cannot be shown; got: nan; expected: a finite number from 0",
        ),
        (seen(loss_without=-0.5), "The loss of token 2 cannot be shown; got: -0.5"),
        (seen(loss_without=None), r"The loss of token 2 is known once only; got: 1.0 with memory, None without"),
        (seen(read(share=1.5)), "The share of a chunk that token 2 read cannot be shown; got: 1.5; expected: .* to 1$"),
        (seen(read(score=float("inf"))), "The score of a chunk that token 2 read cannot be shown; got: inf"),
    ],
)
def test_numbers_that_cannot_be_are_refused(token: SeenToken, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(inspection_of([seen(), token]))


def test_gates_that_cannot_be_are_refused() -> None:
    plain = inspection_of([seen()])
    with pytest.raises(DataError, match=r"gates of layer 5 do not belong together; got: 2 weights and 1 learnt"):
        render(replace(plain, gates=[LayerGates(5, [0.1, 0.2], [0.3])]))
    with pytest.raises(DataError, match=r"weight of memory in layer 5 cannot be shown; got: -0.1"):
        render(replace(plain, gates=[LayerGates(5, [-0.1], [0.3])]))
    with pytest.raises(
        DataError, match=r"gate of layer 5 has learnt cannot be shown; got: nan; expected: a finite number$"
    ):
        render(replace(plain, gates=[LayerGates(5, [0.1], [float("nan")])]))


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to inspect; got: a prompt without tokens; do: give a longer prompt"):
        render(inspection_of([]))
    with pytest.raises(DataError, match="No chunk would be kept; got: 0"):
        render(inspection_of([seen()]), chunks_per_token=0)


def palette(dark: bool) -> dict[str, tuple[int, int, int]]:
    """The colours by name."""
    blocks = re.findall(r":root \{(.*?)\}", (ASSETS / "page.css").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    colours = re.findall(r"--([\w-]+): #(\w\w)(\w\w)(\w\w);", blocks[dark])
    return {name: (int(red, 16), int(green, 16), int(blue, 16)) for name, red, green, blue in colours}


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Of two colours, 1 to 21, by the formula of WCAG 2.2."""

    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.005)  # the grey that just passes


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_contrast(dark: bool) -> None:
    colours = palette(dark)
    levels = [f"{side}{level}" for side in ("helped", "hurt") for level in (1, 2, 3, 4)]
    texts = [(f"on-{level}", level) for level in levels]
    texts += [(text, ground) for text in ("text", "quiet") for ground in ("page", "card")]
    marks = [(mark, ground) for mark in ("focus", "bar", "helped-line", "hurt-line") for ground in ("page", "card")]
    for text, ground in texts:
        assert contrast(colours[text], colours[ground]) >= READABLE, (text, ground)
    for mark, ground in marks:
        assert contrast(colours[mark], colours[ground]) >= DISTINCT, (mark, ground)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_colours_tell_helped_from_hurt_for_the_colour_blind(level: int, dark: bool) -> None:
    colours = palette(dark)
    (red, green, blue), (other_red, other_green, other_blue) = colours[f"helped{level}"], colours[f"hurt{level}"]
    # Without red or green cones blue against yellow is left, without blue ones red against green.
    assert blue > (red + green) / 2 and other_blue < (other_red + other_green) / 2
    assert red < green and other_red > other_green
