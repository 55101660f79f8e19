"""metrics.jsonl holds every step once, in full; TensorBoard holds the same."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import DataError
from pipeline.metrics.record import METRICS_NAME, TENSORBOARD_NAME, MetricsWriter, read_metrics, tag_of


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS_NAME).read_text().splitlines()]


def tensorboard_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / TENSORBOARD_NAME))
    events.Reload()
    return events


def write_steps(folder: Path, first: int, last: int) -> None:
    with MetricsWriter(folder) as writer:
        for step in range(first, last + 1):
            writer.write(step, {"loss": float(step)})


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"loss": 1 / 3, "learning_rate": 2e-4 * (1 - 1e-16), "grad_norm": 5e-324, "tokens": 2**53 + 1}
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(7, values, phases={"backbone": 0.1, "optimizer": 0.2})
    assert read_metrics(tmp_path / "run") == [{"step": 7, **values, "phase_backbone_s": 0.1, "phase_optimizer_s": 0.2}]


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
        assert (tmp_path / METRICS_NAME).read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value})
    assert (tmp_path / METRICS_NAME).read_text() == '{"step": 1, "loss": null}\n'


def test_truncation_keeps_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    kept = (tmp_path / METRICS_NAME).read_text().splitlines()[:3]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(3)
        assert steps_of(tmp_path) == [1, 2, 3]
        writer.write(4, {"loss": 40.0})
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / METRICS_NAME).read_text().splitlines()[:3] == kept
    assert [(e.step, e.value) for e in tensorboard_of(tmp_path).Scalars("loss/train_nats")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_truncation_while_the_file_is_open(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
        writer.truncate_after(1)
        writer.write(2, {"loss": 3.0})
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 3.0]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(5)
        writer.write(2, {"loss": 2.0})
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize("line", ["not json", "[1]", "5", '{"loss": 1.0}', '{"step": "one"}'])
def test_a_foreign_line_is_named_and_kept(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    (tmp_path / METRICS_NAME).write_text(text)
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 is not a record of a step.*repair the line"):
        MetricsWriter(tmp_path).truncate_after(2)
    assert (tmp_path / METRICS_NAME).read_text() == text


def test_a_disabled_writer_writes_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    before = sorted(tmp_path.rglob("*"))
    with MetricsWriter(tmp_path, enabled=False) as writer:
        writer.truncate_after(0)
        writer.write(3, {"loss": 1.0})
        writer.histogram("memory/gate", torch.ones(2), step=3)
    assert steps_of(tmp_path) == [1, 2]
    assert sorted(tmp_path.rglob("*")) == before


def test_tags_are_group_slash_name_unit() -> None:
    assert tag_of("loss") == "loss/train_nats"
    assert tag_of("phase_retrieve_read_s") == "phase/retrieve_read_s"
    assert tag_of("source_books_fraction") == "source/books_fraction"
    assert tag_of("evaluation/loss_nats") == "evaluation/loss_nats"
    assert tag_of("skipped") == "step/skipped"


def test_tensorboard_holds_numbers_and_histograms(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(4, {"tokens": 512, "note": "text stays out"}, phases={"data": 0.5})
        writer.histogram("memory/age_tokens", torch.tensor([1.0, math.nan, 3.0], dtype=torch.bfloat16), step=4)
        writer.histogram("memory/empty", torch.tensor([]), step=4)
    events = tensorboard_of(tmp_path)
    assert events.Tags()["scalars"] == ["throughput/tokens", "phase/data_s"]
    assert events.Tags()["histograms"] == ["memory/age_tokens"]
    histogram = events.Histograms("memory/age_tokens")[0]
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (4, 2, 4)


@pytest.mark.parametrize(
    "content", [b"\xff\n", b"[" * 100_000 + b"\n", b"1" * 5000 + b"\n", b"\x00\n", b'{"step": "1"}\n']
)
def test_a_damaged_record_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METRICS_NAME).write_bytes(content)
    for read in (lambda: read_metrics(tmp_path), lambda: MetricsWriter(tmp_path).truncate_after(3)):
        with pytest.raises(
            DataError, match="metrics.jsonl (cannot be read|line 1 is not a record of a step); .*do: rep"
        ):
            read()
    assert (tmp_path / METRICS_NAME).read_bytes() == content


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / METRICS_NAME)
    with pytest.raises(DataError, match="metrics.jsonl cannot be read; got: .*Not a plain file"):
        read_metrics(tmp_path)
