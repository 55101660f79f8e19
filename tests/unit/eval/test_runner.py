"""An evaluation that is killed goes on; one of other settings is refused."""

from __future__ import annotations

import json
from functools import partial

import pytest

from eval.runner import EvaluationError, Progress, check_same, run
from eval.task import Item

ITEMS = [Item(name, number) for number, name in enumerate("abcde")]


class Killed(Exception):
    """The end of a process."""


def score(item, *, seen, killed_at=None):
    if item.name == killed_at:
        raise Killed
    seen.append(item.name)
    return {"square": item.content**2, "bad": float("nan")}


def run_alone(folder, **kwargs):
    return run(ITEMS, partial(score, **kwargs), finish=lambda: None, progress=Progress(None), folder=folder)


def test_what_was_scored_is_not_scored_again(tmp_path):
    seen: list[str] = []
    with pytest.raises(Killed):
        run_alone(tmp_path, seen=seen, killed_at="d")
    assert seen == ["a", "b", "c"]
    found = run_alone(tmp_path, seen=seen)
    assert seen == ["a", "b", "c", "d", "e"]
    assert {name: one["square"] for name, one in found.items()} == {"a": 0, "b": 1, "c": 4, "d": 9, "e": 16}
    assert list(found) == list("abcde") and found["a"]["bad"] is None
    assert run_alone(tmp_path, seen=seen) == found and len(seen) == 5


def test_a_torn_line_is_scored_again_and_tears_no_other(tmp_path):
    seen: list[str] = []
    run_alone(tmp_path, seen=seen)
    path = tmp_path / "group0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'"square"')])
    again: list[str] = []
    found = run_alone(tmp_path, seen=again)
    assert again == ["e"] and found["e"]["square"] == 16
    third: list[str] = []
    assert run_alone(tmp_path, seen=third) == found and third == []


def test_items_of_other_runs_are_left_where_they_are(tmp_path):
    run_alone(tmp_path, seen=[])
    fewer = run(ITEMS[:2], partial(score, seen=[]), finish=lambda: None, progress=Progress(None), folder=tmp_path)
    assert list(fewer) == ["a", "b"]


def test_without_a_folder_nothing_is_written(tmp_path):
    assert len(run_alone(None, seen=[])) == 5
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_settings_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "task"
    check_same(folder, {"weights": "ab", "options": {"shots": (1, 2), "rule": "mean"}})
    check_same(folder, {"weights": "ab", "options": {"shots": [1, 2], "rule": "mean"}})
    before = (folder / "about.json").read_bytes()
    with pytest.raises(EvaluationError, match=r'options.rule was "mean", now "sum"') as error:
        check_same(folder, {"weights": "ab", "options": {"shots": (1, 2), "rule": "sum"}})
    assert "another --output" in str(error.value)
    assert (folder / "about.json").read_bytes() == before
    (folder / "about.json").write_text(json.dumps({"weights": "ab"})[:-3])
    with pytest.raises(EvaluationError, match="cannot be used"):
        check_same(folder, {"weights": "ab"})
