"""Build a Config from defaults, a YAML file and the command line, in this order; report all problems at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.fields import Setting, all_settings, nearest_setting, section_models
from pipeline.config.model import dotted
from pipeline.config.output import readers_may_leave
from pipeline.config.reference import help_text
from pipeline.config.rules import rule_problems
from pipeline.config.schema import Config
from pipeline.config.shipped import find_file, looked_in
from pipeline.config.untrusted import read_small, short, shown
from pipeline.config.yaml_text import read_yaml, write_yaml
from pipeline.errors import ConfigError

Sections = dict[str, dict[str, Any]]
_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class CommandLine:
    """What stood on the command line.

    Attributes:
        config_path: The value of `--config`; None where it is missing.
        overrides: The arguments that set single fields, as they came.
        wants_help: Whether `--help` or `-h` was given.
    """

    config_path: str | None
    overrides: tuple[str, ...]
    wants_help: bool


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and lay single settings over it.

    Args:
        path: YAML file; a relative one is looked for in the working folder, then among the shipped ones.
        overrides: `--section.key value` or `--section.key=value`, in any number; the last one of a field counts.

    Returns:
        The settings, validated.

    Raises:
        ConfigError: The file cannot be read, or anything in it or in the overrides is wrong; names all problems.
    """
    return make_config(_read_mapping(find_file(path) or Path(path)), overrides, source=str(path))


def make_config(raw: Mapping[Any, Any], overrides: Sequence[str] = (), *, source: str) -> Config:
    """Lay single settings over sections that are there already.

    Args:
        raw: Section to its keys, as a configuration file has them.
        overrides: As in `load_config`.
        source: Where the sections came from.

    Returns:
        The settings, validated.

    Raises:
        ConfigError: Something in them is wrong; names all problems.
    """
    problems: list[str] = []
    sections, broken_sections = _known_sections(raw, problems)
    _apply_overrides(sections, overrides, problems)
    config = _validate(sections, broken_sections, problems)
    if config is None or problems:
        raise ConfigError(problems, source=f"{source} with the command line" if overrides else source)
    return config


def load_from_command_line(argv: Sequence[str]) -> Config:
    """Read the settings that the command line asks for.

    Args:
        argv: Arguments without the program's name. `--local_rank`, which the deepspeed launcher adds, is ignored.

    Returns:
        The settings, validated.

    Raises:
        SystemExit: After `--help`.
        ConfigError: `--config` is missing, or something is wrong with the settings.
    """
    line = parse_command_line(argv)
    if line.wants_help:
        with readers_may_leave():
            sys.stdout.write(help_text())
        raise SystemExit(0)
    if line.config_path is None:
        raise ConfigError(["--config FILE is required; do: name one of configs/*.yaml"], source="command line")
    return load_config(line.config_path, line.overrides)


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Take the arguments apart without looking at the fields that they set.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The parts. Mistakes in the overrides are left for `load_config`, which reports them with all others.
    """
    config_path: str | None = None
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "--local_rank", "--local-rank"):
            value = value if equals else (rest.pop(0) if rest else "")
            config_path = (value or None) if name == "--config" else config_path
        elif argument not in ("-h", "--help"):
            overrides.append(argument)
    return CommandLine(config_path, tuple(overrides), wants_help="-h" in argv or "--help" in argv)


def dump_config(config: Config) -> str:
    """All settings, defaults included, as YAML that loads back equal."""
    return write_yaml(config.model_dump(mode="json"))


def _read_mapping(path: Path) -> dict[Any, Any]:
    def refuse(problem: str) -> ConfigError:
        return ConfigError([problem], source=short(str(path)))

    advice = "; expected: a file of YAML; do: check --config, configs/ holds examples"

    try:
        value = read_yaml(read_small(path, limit=_FILE_BYTES, may_be_pipe=True))
    except FileNotFoundError:
        raise refuse(f"the file does not exist{looked_in(path)}; do: check --config, configs/ holds examples") from None
    except OSError as error:
        raise refuse(f"the file cannot be read: {error.strerror}{advice}") from None
    except UnicodeDecodeError as error:
        raise refuse(f"the file is not UTF-8 text: byte {error.start} is not valid{advice}") from None
    except yaml.YAMLError as error:
        raise refuse(f"the file is not valid YAML: {short(' '.join(str(error).split()))}") from None
    except ValueError as error:
        raise refuse(f"the file cannot be read: {error}{advice}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(f"the file is not a mapping; got: {type(value).__name__}; expected: sections such as `run:`")
    return value


def _known_sections(raw: Mapping[Any, Any], problems: list[str]) -> tuple[Sections, set[str]]:
    sections: Sections = {name: {} for name in section_models()}
    broken: set[str] = set()
    for name, keys in raw.items():
        if name not in sections:
            problems.append(_unknown(short(name), is_section=isinstance(keys, dict)))
        elif isinstance(keys, dict):
            for key, value in keys.items():
                _set_known(sections, f"{name}.{short(key)}", value, problems)
        elif keys is not None:
            broken.add(name)
            problems.append(
                f"{name} is not a section; got: {shown(keys)}; expected: its keys, indented below `{name}:`"
            )
    return sections, broken


def _set_known(sections: Sections, name: str, value: Any, problems: list[str]) -> None:
    if name in all_settings():
        section, _, key = name.partition(".")
        sections[section][key] = value
    else:
        problems.append(_unknown(name, is_section=False))


def _unknown(name: str, *, is_section: bool) -> str:
    if is_section:
        return f"unknown section {name}; expected one of: {', '.join(section_models())}"
    section, _, key = name.partition(".")
    if name in all_settings():
        return f"{name} is not a section; do: write `{key}:` below `{section}:`"
    nearest = nearest_setting(name)
    return f"unknown key {name}; " + (f"nearest known: {nearest}" if nearest else "do: see --help for all keys")


def _apply_overrides(sections: Sections, overrides: Sequence[str], problems: list[str]) -> None:
    rest = list(overrides)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        name = short(name)
        if not name.startswith("--"):
            problems.append(f"unexpected argument {shown(argument)}; expected: --section.key value")
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"{name} has no value; expected: {name} VALUE")
            continue
        text = text if equals else rest.pop(0)
        setting = all_settings().get(name[2:])
        try:
            value = _value(setting, text)
        except yaml.YAMLError:
            problems.append(f"{name[2:]} on the command line is not valid YAML; got: {shown(text)}")
            continue
        _set_known(sections, name[2:], value, problems)


def _value(setting: Setting | None, text: str) -> Any:
    if setting is None or not setting.takes_text:
        return text if setting is None else read_yaml(text)
    return None if text == "null" and setting.default is None and not setting.required else text


def _validate(sections: Sections, broken_sections: set[str], problems: list[str]) -> Config | None:
    try:
        return Config.model_validate(sections)
    except ConfigError as error:
        problems.extend(error.problems)
    except ValidationError as error:
        broken = {".".join(str(part) for part in entry["loc"][:2]): entry for entry in error.errors()}
        problems.extend(
            _field_problem(name, entry["loc"][2:], missing=entry["type"] == "missing", got=entry["input"])
            for name, entry in broken.items()
            if name.partition(".")[0] not in broken_sections
        )
        # Pydantic stops before the rules when a field is wrong; the rules between the sound fields are still worth
        # reporting. The values are strict, so those that passed are what the Config would hold.
        sound = {name: setting.default for name, setting in all_settings().items()} | dotted(sections)
        problems.extend(
            rule_problems(
                {
                    name: value
                    for name, value in sound.items()
                    if name not in broken and name.partition(".")[0] not in broken_sections
                }
            )
        )
    return None


def _field_problem(name: str, inside: Sequence[int | str], *, missing: bool, got: object) -> str:
    """What is wrong with a setting, or with something `inside` of it."""
    kind = all_settings()[name].kind
    section, _, key = name.partition(".")
    if missing and not inside:
        return f"{name} is required and missing; expected: {kind}; do: write `{key}: ...` below `{section}:`"
    where = "".join(f"[{short(part)}]" for part in inside)
    return f"{name}{where} is not valid; got: {shown(got)}; expected: {kind}"
