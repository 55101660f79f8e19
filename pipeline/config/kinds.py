"""What the settings are made of: kinds of numbers and texts with their ranges, and the base of every section."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_STEPS = 10**9
MOST_TOKENS = 10**10
"""In a memory, in a context: more than any host holds, and far from where numbers of 64 bits end."""


def _nameable(text: str) -> str:
    if "\0" in text:
        raise ValueError("no file has such a name")
    return text


def _in_home(text: str) -> str:
    """`~` and `~name` at the start stand for a home folder, as in a shell."""
    path = os.path.expanduser(text)
    if path.startswith("~") or not path.strip() or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError("no file has such a name, or there is no such home folder")
    return path


# Generous, and safe: everything that is worked out of numbers within these ranges fits the types of torch and numpy.
Count = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
StepsOrZero = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
TokensOrZero = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_nameable)]
_PATH = "text: a path, each part at most 255 bytes; `~` is the home folder"
Folder = Annotated[Text, AfterValidator(_in_home), Field(json_schema_extra={"kind": _PATH})]
FolderOrNone = Annotated[Folder | None, Field(json_schema_extra={"kind": f"{_PATH}; or null"})]
Factor = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16", "fp16"]


class Section(BaseModel):
    """Base of all settings: frozen, strict (no text where a number belongs), unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
