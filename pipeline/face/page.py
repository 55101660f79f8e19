"""An inspection as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from heapq import nlargest
from pathlib import Path
from string import Template

from pipeline.errors import DataError
from pipeline.face.inspection import Inspection, LayerGates, ReadChunk, SeenToken

CHUNKS_PER_TOKEN = 32
_DIGITS = 4
"""Significant ones of numbers in the page, which shows three."""
_ROUNDING = 1e-4
"""What a share or a weight may exceed 1 by: it is a sum of rounded probabilities."""
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render(inspection: Inspection, *, chunks_per_token: int = CHUNKS_PER_TOKEN) -> str:
    """The page, to be written as UTF-8.

    Args:
        inspection: What to show. Its texts may hold anything; the page shows them as text.
        chunks_per_token: How many chunks of a token are kept, those of the largest share; the page counts the others.

    Returns:
        HTML with its style, script and data in it, and a policy that lets it load nothing.

    Raises:
        DataError: There is no token, a number is not finite or out of its range, or two do not fit each other.
    """
    if chunks_per_token < 1:
        raise DataError("No chunk would be kept", got=chunks_per_token, expected="chunks_per_token of at least 1")
    if not inspection.tokens:
        raise DataError("There is nothing to inspect", got="a prompt without tokens", do="give a longer prompt")
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_fingerprint(style)}'; script-src '{_fingerprint(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=html.escape(inspection.title.encode(errors="replace").decode()),  # no half characters of a command line
        style=style,
        script=script,
        data=_safe_json(_packed(inspection, chunks_per_token)),
    )


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _fingerprint(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _safe_json(value: object) -> str:
    """JSON that stays data between `<script>` and `</script>`, whatever its strings say."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Table:
    """Each different value once, in the order of first use."""

    def __init__(self) -> None:
        self._places: dict[object, int] = {}

    def place(self, value: object) -> int:
        return self._places.setdefault(value, len(self._places))

    def values(self) -> list[object]:
        return list(self._places)


def _packed(inspection: Inspection, chunks_per_token: int) -> dict[str, object]:
    """What page.js reads. A token's chunks are one flat list of numbers, seven a chunk; texts are places in a table."""
    strings, heads = _Table(), _Table()
    tokens = [
        _packed_token(number, token, chunks_per_token, strings, heads)
        for number, token in enumerate(inspection.tokens, start=1)
    ]
    perplexities = (inspection.perplexity_with, inspection.perplexity_without)
    _check_pair("The perplexity of the prompt", *perplexities)
    return {
        "title": inspection.title,
        "model": inspection.model,
        "fusion": inspection.fusion,
        "memory": {
            "names": list(inspection.memory.names),
            "documents": [[document.name, document.tokens] for document in inspection.memory.documents],
        },
        "perplexity": [_short(value) for value in perplexities],
        "tokens": tokens,
        "gates": [_packed_gates(gates) for gates in inspection.gates],
        "strings": strings.values(),
        "heads": heads.values(),
    }


def _packed_token(number: int, token: SeenToken, most: int, strings: _Table, heads: _Table) -> list[object]:
    _check_pair(f"The loss of token {number}", token.loss_with, token.loss_without)
    kept = best_chunks(token.chunks, most)
    reads: list[object] = []
    for chunk in kept:
        _check_number(f"The share of a chunk that token {number} read", chunk.share, most=1.0)
        _check_number(f"The score of a chunk that token {number} read", chunk.score, least=-math.inf)
        reads += [
            strings.place(chunk.text),
            strings.place(chunk.document),
            chunk.distance,
            _short(chunk.score),
            _short(chunk.share),
            chunk.layer,
            heads.place(tuple(chunk.heads)),
        ]
    left_out = token.left_out + len(token.chunks) - len(kept)
    return [token.text, _short(token.loss_with), _short(token.loss_without), left_out, reads]


def best_chunks(chunks: Iterable[ReadChunk], most: int = CHUNKS_PER_TOKEN) -> list[ReadChunk]:
    """Those of the largest share, the largest first; of equal ones, those that came first."""
    return nlargest(most, chunks, key=lambda chunk: chunk.share)


def _packed_gates(gates: LayerGates) -> list[object]:
    if len(gates.weights) != len(gates.learnt):
        raise DataError(
            f"The gates of layer {gates.layer} do not belong together",
            got=f"{len(gates.weights)} weights and {len(gates.learnt)} learnt numbers",
            expected="one of each for every query head",
        )
    for weight, learnt in zip(gates.weights, gates.learnt, strict=True):
        _check_number(f"The weight of memory in layer {gates.layer}", weight, most=1.0)
        _check_number(f"What a gate of layer {gates.layer} has learnt", learnt, least=-math.inf)
    return [gates.layer, [_short(weight) for weight in gates.weights], [_short(learnt) for learnt in gates.learnt]]


def _check_pair(what: str, with_memory: float | None, without: float | None) -> None:
    if (with_memory is None) != (without is None):
        raise DataError(f"{what} is known once only", got=f"{with_memory} with memory, {without} without")
    for value in (with_memory, without):
        if value is not None:
            _check_number(what, value)


def _check_number(what: str, value: float, *, least: float = 0.0, most: float = math.inf) -> None:
    if not (math.isfinite(value) and least <= value <= most + _ROUNDING):
        expected = "a finite number" if math.isinf(least) else f"a finite number from {least:g} to {most:g}"
        raise DataError(f"{what} cannot be shown", got=value, expected=expected)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")
