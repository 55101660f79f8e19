"""Writes the tables and the example of docs/plan.md: `python -m tools.write_plan_docs`.

A table stands behind the command that it is made with, one row a world; the example behind its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.plan import main as plan_main
from pipeline.config.load import load_config
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.shapes import known_shape
from pipeline.planning.text import in_words

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plan.md"
COLUMNS = {
    "backbone": ("backbone partition", "backbone kept whole"),
    "gathered": ("backbone gathered",),
    "SideNet": ("SideNet",),
    "gradients, buckets": ("gradients", "reduce buckets"),
    "optimizer": ("optimizer",),
    "bank": ("memory bank",),
    "evaluation's bank": ("evaluation's memory",),
    "a read": ("backward of one read", "what reads keep"),
    "activations": ("activations", "activations of one layer", "one layer's work", "backbone's taps"),
    "loss": ("LM head gathered", "logits of a piece", "gradient of the hidden states"),
}
WORLDS = {  # of a section of the page: nodes, GPUs of each, lanes, group size
    "GPT-2-medium, profile `paper`": [(1, 1, 8, 1), (1, 8, 64, 1), (1, 8, 8, 8), (8, 8, 64, 8), (64, 8, 512, 8)],
    "Llama-3-8B, profile `deep`": [(1, 1, 2, 1), (1, 8, 16, 1), (1, 8, 8, 8), (8, 8, 64, 8), (64, 8, 512, 8)],
    "Llama-3-70B, its layers kept in host memory": [(1, 1, 4, 1), (1, 8, 32, 1), (1, 8, 8, 8)],
    "Llama-3-70B, its layers on the accelerators": [(1, 8, 32, 1), (4, 8, 128, 1), (8, 8, 64, 8), (64, 8, 512, 8)],
}


def page(text: str) -> str:
    """The page with its example and tables made anew, everything else as it was."""
    example = re.search(r"    \$ (python launch/plan\.py (?:.*\\\n)*.*\n)((?:    .*\n|\n)*)", text)
    assert example is not None
    printed = "".join(f"    {line}".rstrip() + "\n" for line in _run(_words(example[1])).splitlines())
    text = text.replace(example[2], f"{printed}\n")
    for title, worlds in WORLDS.items():
        section = text[text.index(f"### {title}") :]
        command = re.search(r"    (python launch/plan\.py (?:.*\\\n)*.*\n)", section)
        table = re.search(r"(?:\|.*\n)+", section)
        assert command is not None and table is not None
        text = text.replace(table[0], "".join(f"| {' | '.join(row)} |\n" for row in _rows(_words(command[1]), worlds)))
    return text


def _words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))[2:]


@contextlib.contextmanager
def _at_root() -> Iterator[None]:
    """The commands of the page are for the repository's root."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


def _run(words: Sequence[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, _at_root():
        plan_main(words)
    return printed.getvalue()


def _rows(words: Sequence[str], worlds: Sequence[tuple[int, int, int, int]]) -> Iterator[list[str]]:
    yield ["N x P", "data.lanes", "memory.group_size", *COLUMNS, "most at once", "sent by reads", "sent by engines"]
    yield ["---"] * (len(COLUMNS) + 6)
    for nodes, gpus, lanes, group_size in worlds:
        filled = [{"N": str(nodes), "P": str(gpus), "LANES": str(lanes), "G": str(group_size)}.get(w, w) for w in words]
        options = dict(zip(filled[::2], filled[1::2], strict=True))
        shape = known_shape(options.pop("--shape"))
        world_size = int(options.pop("--nodes")) * int(options.pop("--gpus-per-node"))
        with _at_root():
            config = load_config(options.pop("--config"), [word for pair in options.items() for word in pair])
            plan = make_plan(config, shape, world_size=world_size)
        yield [f"{nodes} x {gpus}", str(lanes), str(group_size), *_cells(plan)]


def _cells(plan: Plan) -> Iterator[str]:
    sizes = {part.name: part.num_bytes for part in plan.parts}
    for names in COLUMNS.values():
        yield in_words(sum(sizes.get(name, 0) for name in names))
    yield f"**{in_words(plan.peak())}** ({plan.fullest()})"
    for of_engine in (False, True):
        sent = [t for t in plan.traffic if t.purpose.startswith(("backbone", "SideNet")) == of_engine]
        yield in_words(sum(t.num_bytes for t in sent))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
