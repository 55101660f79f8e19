"""The task that docs/evaluation.md shows is one: found, scored and reported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from eval import tasks
from eval.runner import EvaluationError
from eval.task import Given, TaskOptions
from eval.tasks import all_tasks
from tests.oracle_scorer import OracleScorer
from tests.tiny_config import tiny_config
from tests.tiny_tokenizer import save_tiny_tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"


@pytest.fixture
def last_word(tmp_path, monkeypatch):
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    code = found[1]
    assert sum(bool(line.strip()) for line in code.splitlines()) < 40
    (tmp_path / "last_word.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    task = all_tasks()["last_word"]
    assert importlib.util.find_spec(task.__module__)
    return lambda *data: task(TaskOptions(data=data), Given(save_tiny_tokenizer(tmp_path), tiny_config(), 128))


def test_it_is_found_scored_and_reported(last_word, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("It was a bright cold day in the harbour\nThe clocks were striking one after another\n", "utf-8")
    task = last_word(str(path))
    scorer = OracleScorer(lambda before, token, condition: 2.0 if condition == "memory_off" else 1.0)
    items = task.items()
    scores = {item.name: task.score(item, scorer) for item in items}
    lengths = [len(task.given.tokens(word)) for word in (" harbour", " another")]
    assert [one["memory_on"] for one in scores.values()] == lengths
    section = task.report(scores)
    assert section.figures["means"]["memory_off"]["mean"] == pytest.approx(2 * np.mean(lengths))
    assert section.missing == ["(d) memory of another document"]


def test_a_file_without_lines_is_refused(last_word, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(EvaluationError, match="no lines"):
        last_word(str(tmp_path / "empty.txt")).items()
