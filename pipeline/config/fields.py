"""The table of all settings, read from the schema: what loading, `--help` and the written reference have in common."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from pipeline.config.kinds import Section
from pipeline.config.schema import Config

PLAIN_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
BOUNDS = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: `section.key`.
        kind: What may stand there, in words, with its range.
        required: Whether it has no default.
        default: The default; None where there is none.
        text: What it means and in which unit.
        takes_text: Whether its value is text, or null by default, so that `--run.output_dir 2024` needs no quotes.
    """

    name: str
    kind: str
    required: bool
    default: Any
    text: str
    takes_text: bool


@lru_cache(maxsize=1)
def all_settings() -> dict[str, Setting]:
    """All settings by dotted name, in the order of the schema."""
    settings = (
        _setting(f"{section}.{key}", field)
        for section, model in section_models().items()
        for key, field in model.model_fields.items()
    )
    return {setting.name: setting for setting in settings}


def section_models() -> dict[str, type[Section]]:
    """The class of each section by its name, in the order of the schema."""
    models = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: model for name, model in models.items() if isinstance(model, type) and issubclass(model, Section)}


def nearest_setting(name: str) -> str | None:
    """The setting that was probably meant.

    Args:
        name: A dotted name, or a bare key, that does not exist.

    Returns:
        The nearest existing dotted name: the same key in another section, else the nearest spelling in this
        section, else the nearest spelling anywhere. None where nothing is near.
    """
    names = list(all_settings())
    section, _, key = name.rpartition(".")
    same_key = [candidate for candidate in names if candidate.endswith(f".{key}")]
    if same_key:
        return same_key[0]
    inside = [candidate for candidate in names if candidate.startswith(f"{section}.")]
    keys = {candidate.partition(".")[2]: candidate for candidate in inside or names}
    close = difflib.get_close_matches(key, keys, n=1)
    return keys[close[0]] if close else None


def _setting(name: str, field: FieldInfo) -> Setting:
    choices = _choices(field.annotation)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Setting(
        name=name,
        kind=str(extra.get("kind") or _kind(field, choices)),
        required=field.is_required(),
        default=None if field.is_required() else field.default,
        text=" ".join((field.description or "").split()),
        takes_text=_inner(field.annotation) is str or bool(choices),
    )


def _choices(annotation: Any) -> list[str]:
    inner = get_args(annotation)[0] if _is_union(annotation) else annotation
    return [str(choice) for choice in get_args(inner)] if get_origin(inner) is Literal else []


def _kind(field: FieldInfo, choices: list[str]) -> str:
    if choices:
        return " or ".join([f"`{choice}`" for choice in choices] + ["null"] * _is_union(field.annotation))
    # `Count | None` keeps its range inside the union, a plain `Count` in the field's metadata.
    is_union = _is_union(field.annotation)
    inner = get_args(field.annotation)[0] if is_union else field.annotation
    metadata = [*field.metadata, *getattr(inner, "__metadata__", ())]
    base = _inner(field.annotation)
    words = [PLAIN_KINDS[base], _range(metadata)] if base is not str else ["text"]
    return " ".join(word for word in words if word) + (" or null" if is_union else "")


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _inner(annotation: Any) -> Any:
    """The bare type of a value: `int` for `Count | None`."""
    inner = get_args(annotation)[0] if _is_union(annotation) else annotation
    return getattr(inner, "__origin__", inner)


def _range(metadata: list[Any]) -> str:
    flat = [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    bounds = [
        f"{sign} {_number(getattr(item, bound.__name__.lower()))}"
        for item in flat
        for bound, sign in BOUNDS.items()
        if isinstance(item, bound)
    ]
    return " and ".join(bounds)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
