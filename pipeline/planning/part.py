"""One line of a plan: something that takes memory, where and when."""

from __future__ import annotations

from dataclasses import dataclass

EVALUATION = "evaluation"
ALWAYS = ("backbone", "sidenet", "loss", "backward", "optimizer", EVALUATION)
"""The phases of a step, and the evaluation of held-out documents between two steps."""


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: What.
        num_bytes: How much.
        how: The formula, in words.
        phases: When it is there, of ALWAYS.
        place: `accelerator`, `host` or `disk`.
        remedy: What makes it smaller; empty: nothing.
    """

    name: str
    num_bytes: int
    how: str
    phases: tuple[str, ...] = ALWAYS
    place: str = "accelerator"
    remedy: str = ""
