"""What stands in a file or on a command line may be anything: read with bounds, checked by types, shown short."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

SMALL_BYTES = 16 << 20
"""More than any file holds that a person or a run writes to say something about a run."""
_SHOWN = 200
_SHOWN_DIGITS = 40
_DEEP = 100


class Typed(BaseModel):
    """Base of what is read from a file: strict, and fields that a later version adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class _Short(reprlib.Repr):
    """As `repr`, but of a bounded length, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, _SHOWN, _SHOWN
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 40

    def repr_int(self, x: int, level: int) -> str:
        """Python itself refuses to write more than 4,300 digits."""
        if abs(x) < 10**_SHOWN_DIGITS:
            return repr(x)
        return f"a whole number of about {int(x.bit_length() * 0.30103) + 1:,} digits"


def shown(value: object) -> str:
    """Anything that came from outside as a message shows it: its `repr`, cut where it is long."""
    text = _Short().repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


def read_small(path: Path, *, limit: int = SMALL_BYTES, may_be_pipe: bool = False) -> str:
    """Reads a text file that should be small.

    Args:
        path: The file.
        limit: Bytes that it may have.
        may_be_pipe: Whether a person named it, who may have written `<(...)`.

    Returns:
        Its text.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe or a device, which might never end.
        ValueError: It is larger, or not UTF-8.
    """
    # Opening a pipe would wait for somebody who writes into it.
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with open(os.open(path, os.O_RDONLY | (0 if may_be_pipe else os.O_NONBLOCK)), "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) and not may_be_pipe:
            raise OSError(errno.EINVAL, "Not a plain file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content.decode("utf-8")


def parse_json(text: str, **kwargs: Any) -> Any:
    """Parses JSON; ValueError where it is malformed, nested too deep, or holds a number of thousands of digits."""
    try:
        value = json.loads(text, **kwargs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(_DEEP):
        if not level:
            return value
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    raise ValueError("it is nested too deep")  # for what goes through it by calling itself


def short(text: object) -> str:
    """A name as a message writes it: as it is, cut where it is long."""
    if not isinstance(text, str):
        return shown(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def what_is_wrong(error: ValidationError) -> str:
    """What pydantic found, in one line, such as `step is 'x' (Input should be ...)`; the first three problems."""
    problems = []
    for entry in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in entry["loc"])[:_SHOWN]
        if entry["type"] == "missing":
            problems.append(f"{name} is missing")
        else:
            problems.append(f"{name} is {shown(entry['input'])} ({entry['msg']})" if name else entry["msg"])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
