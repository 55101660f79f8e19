"""The record of a run: `metrics.jsonl`, one JSON object an optimizer step, and TensorBoard on top.

TensorBoard's tags are `group/name_unit`: a key of `TAGS` becomes the tag beside it, `phase_backbone_s` becomes
`phase/backbone_s` (likewise `traffic_` and `source_`), a key that holds a `/` is a tag already, and any other key goes
to `step/<key>`. A number that is not finite is null in JSON, which has no word for it.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.config.untrusted import parse_json
from pipeline.errors import DataError
from pipeline.files import write_text

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
TAGS = {
    "loss": "loss/train_nats",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens": "throughput/tokens",
    "tokens_per_second": "throughput/tokens_per_s",
    "seconds": "time/step_s",
    "memory_fill": "memory/fill_fraction",
    "gate_mean": "memory/gate_mean",
}
"""TensorBoard tag of each key of a step's record."""

Value = float | int | str | bool | None


def tag_of(key: str) -> str:
    """The TensorBoard tag, `group/name_unit`, of a key of the record."""
    if "/" in key:
        return key
    for kind in ("phase", "traffic", "source"):
        if key.startswith(f"{kind}_"):
            return f"{kind}/" + key.removeprefix(f"{kind}_")
    return TAGS.get(key, f"step/{key}")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl` in order, but for a last line that a crash cut short. Raises DataError."""
    path = folder / METRICS_NAME
    if not path.exists():
        return []
    return [record for _, record in _parse(path, _read(path))]


class MetricsWriter:
    """Writes the metrics of a run into its folder; a context manager, or call `close`.

    A process that resumes calls `truncate_after` before its first `write`.

    Args:
        folder: The run folder; made if missing.
        enabled: False on ranks that do not write: every call then does nothing.
    """

    def __init__(self, folder: Path, *, enabled: bool = True) -> None:
        self._folder = folder
        self._enabled = enabled
        self._purge_step: int | None = None
        self._lines: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def truncate_after(self, step: int) -> None:
        """Cuts off, in one atomic change, what was recorded for later steps; TensorBoard then hides them as well.

        Args:
            step: The last step that the checkpoint knows; 0 cuts off everything.

        Raises:
            DataError: A line of `metrics.jsonl` is not a JSON object with a step.
        """
        if not self._enabled:
            return
        self.close()
        self._purge_step = step + 1
        path = self._folder / METRICS_NAME
        if path.exists():
            parsed = _parse(path, _read(path))
            write_text(path, "".join(line for line, record in parsed if record["step"] <= step))

    def write(self, step: int, values: Mapping[str, Value], *, phases: Mapping[str, float] | None = None) -> None:
        """Records a step: one line, on disk when this returns, and TensorBoard scalars.

        Args:
            step: The optimizer step, counted from 1.
            values: What happened in it.
            phases: Seconds by phase, recorded as `phase_<name>_s`.
        """
        if not self._enabled:
            return
        timed = {f"phase_{name}_s": seconds for name, seconds in (phases or {}).items()}
        record: dict[str, Value] = {"step": step, **values, **timed}
        lines = self._open_lines()
        lines.write(json.dumps({key: _finite_or_null(value) for key, value in record.items()}, allow_nan=False) + "\n")
        lines.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._open_tensorboard().add_scalar(tag_of(key), value, step)

    def histogram(self, tag: str, values: torch.Tensor, *, step: int) -> None:
        """Records the finite numbers of a tensor for TensorBoard alone, if there are any."""
        if not self._enabled:
            return
        finite = values.detach().float().flatten()
        finite = finite[finite.isfinite()]
        if finite.numel() > 0:
            self._open_tensorboard().add_histogram(tag, finite, step)

    def close(self) -> None:
        """Writes out and closes both files; a later `write` opens them again."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _open_lines(self) -> TextIO:
        if self._lines is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = (self._folder / METRICS_NAME).open("a", encoding="utf-8")
        return self._lines

    def _open_tensorboard(self) -> SummaryWriter:
        if self._tensorboard is None:
            # Imported late: it costs a second or more, which ranks that do not write need not spend.
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder / TENSORBOARD_NAME), purge_step=self._purge_step)
            self._purge_step = None
        return self._tensorboard


def _finite_or_null(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> str:
    try:
        if not path.is_file():  # opening a pipe would wait for somebody who writes into it
            raise OSError(errno.EINVAL, "Not a plain file", str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read",
            got=error,
            expected="a JSON object a line, in UTF-8",
            do="repair it, or move it away",
        ) from error


def _parse(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return  # a crash cut this line short; the step will be written again
        try:
            record = parse_json(line)
            if not isinstance(record["step"], int):
                raise TypeError("step is not a whole number")
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError(
                f"{path} line {number} is not a record of a step",
                got=line.strip()[:80],
                expected='a JSON object with a whole number "step"',
                do="repair the line, or move the file away",
            ) from error
        yield line, record
