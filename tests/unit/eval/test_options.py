"""What a command line asks of tasks."""

from __future__ import annotations

import pytest

from eval.options import choose, help_text, take_options
from eval.tasks import all_tasks
from pipeline.errors import ConfigError

PERPLEXITY = choose("perplexity")


def taken(*rest, tasks=PERPLEXITY, data=(), limit=None):
    options, left = take_options(tasks, rest, data=data, limit=limit)
    return options["perplexity"], left


def test_all_names_all_tasks_and_every_task_has_its_help():
    assert [task.name for task in choose("all")] == list(all_tasks())
    words = help_text()
    for name, task in all_tasks().items():
        assert f"{name}: " in words
        assert all(f"--{name}.{key}" in words for key in task.options_class.model_fields)


def test_a_misspelt_task_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean perplexity"):
        choose("perplexty")


def test_options_of_a_task_are_told_from_settings_of_the_run():
    options, left = taken("--perplexity.documents", "3", "--memory.tokens", "64", "--perplexity.scored_tokens=null")
    assert (options.documents, options.scored_tokens) == (3, None)
    assert left == ["--memory.tokens", "64"]


@pytest.mark.parametrize("written", ["0,1024,4096", "[0, 1024, 4096]"])
def test_several_values(written):
    assert taken("--perplexity.memory_tokens", written)[0].memory_tokens == (0, 1024, 4096)
    assert taken("--memory-tokens", written)[0].memory_tokens == (0, 1024, 4096)
    assert taken("--memory-tokens", "64")[0].memory_tokens == (64,)


def test_limits():
    assert taken(limit="3")[0].limit == 3
    small = taken(limit="small")[0]
    assert small.limit is None and small.documents == PERPLEXITY[0].small["documents"]
    assert taken("--perplexity.documents", "7", limit="small")[0].documents == 7


def test_data():
    assert taken(data=["a", "b"])[0].data == ("a", "b")
    assert taken(data=["perplexity=a"])[0].data == ("a",)


@pytest.mark.parametrize(
    ("rest", "keywords", "words"),
    [
        (["--perplexity.documents", "none"], {}, "--perplexity.documents"),
        (["--perplexity.dokuments", "3"], {}, "--perplexity.dokuments"),
        ([], {"limit": "few"}, "--perplexity.limit"),
    ],
)
def test_what_is_wrong_is_named(rest, keywords, words):
    with pytest.raises(ConfigError, match=words):
        taken(*rest, **keywords)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as error:
        taken("--perplexity.documents", "none", "--perplexity.context_tokens", "-1")
    assert "documents" in str(error.value) and "context_tokens" in str(error.value)
