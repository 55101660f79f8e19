"""The whole command line of an evaluation on a tiny trained run: alone, on two ranks, killed, and with bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.evaluation import Asked, evaluate
from eval.report import Section
from eval.runner import EvaluationError
from eval.tasks import all_tasks
from launch.export import main as export
from pipeline.errors import CheckpointError, ConfigError, LongMemError
from pipeline.model.load import load_longmem
from tests.distributed.elastic_runs import logits_of
from tests.end_to_end.test_train import ROOT, TIMEOUT_S, command_line, launch
from tests.task_data import arguments
from tests.tiny_run import TinyRun, save_backbone

TOLERANCE = 1e-4  # float32 losses, added in another order


@pytest.fixture(scope="module")
def run_folder(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    yaml_file = tiny_run.write_config(folder / "run.yaml", folder / "run", train={"steps": 3})
    done = launch(["--config", str(yaml_file)], ranks=1)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments by task, of all tasks."""
    found = arguments(tmp_path_factory.mktemp("tasks"))
    assert found.keys() == all_tasks().keys(), "a task without tests/task_data"
    return found


def command(arguments: Sequence[str], *, ranks: int) -> tuple[list[str], dict[str, str]]:
    """How a user starts launch/evaluate.py."""
    whole, environment = command_line([], ranks=ranks)
    return [*whole[:-1], str(ROOT / "launch" / "evaluate.py"), *arguments], environment


def finished(arguments: Sequence[str], *, ranks: int) -> subprocess.CompletedProcess[str]:
    """Starts it and waits for its end."""
    whole, environment = command(arguments, ranks=ranks)
    return subprocess.run(
        whole, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, env=environment, check=False
    )


def everything(run_folder: Path, tasks: dict[str, list[str]], output: Path) -> list[str]:
    return ["--model", str(run_folder), "--output", str(output), *(one for own in tasks.values() for one in own)]


def report(folder: Path) -> dict[str, Any]:
    """What report.json says."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(run_folder: Path, tasks: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks by one process."""
    output = tmp_path_factory.mktemp("alone") / "evaluation"
    done = finished(everything(run_folder, tasks, output), ranks=1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (output / "report.md").read_text() in done.stdout
    return output


def test_a_report_has_all_tasks_their_items_and_their_pictures(alone):
    written, page = report(alone), (alone / "report.md").read_text()
    assert written["tasks"].keys() == all_tasks().keys()
    for name, task in written["tasks"].items():
        assert task["items"] and task["rule"] and task["figures"], name
        assert task["rule"] in page
    pictures = {path.name for path in alone.glob("*.png")}
    assert pictures and all(f"({name})" in page for name in pictures)
    assert page.count(".png)") == len(pictures)


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Places where two trees of scores are not the same."""
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            yield where
            return
        for key in expected:
            yield from differences(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], (dict, list, str)):
        if len(found) != len(expected):
            yield where
            return
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{where}/{number}")
    elif isinstance(expected, (list, float)) and not isinstance(expected, bool):
        if np.shape(found) != np.shape(expected) or not np.allclose(found, expected, atol=TOLERANCE, rtol=1e-4):
            yield f"{where}: {found} and {expected}"[:300]
    elif found != expected:
        yield f"{where}: {found} and {expected}"[:300]


@pytest.mark.parametrize("group_size", [1, 2])
def test_two_ranks_find_the_same(run_folder, tasks, alone, group_size, tmp_path):
    settings = ["--memory.group_size", str(group_size)]
    done = finished([*everything(run_folder, tasks, tmp_path / "out"), *settings], ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    found, expected = report(tmp_path / "out")["tasks"], report(alone)["tasks"]
    for name, task in all_tasks().items():
        if task.deterministic:
            assert list(differences(found[name]["items"], expected[name]["items"], name)) == []
        assert found[name]["items"].keys() == expected[name]["items"].keys()


def test_killed_and_started_again_it_goes_on(run_folder, tasks, alone, tmp_path):
    output = tmp_path / "out"
    arguments = everything(run_folder, tasks, output)
    whole, environment = command(arguments, ranks=1)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + TIMEOUT_S
    while not any(path.read_bytes().count(b"\n") for path in output.glob("*/group0.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in output.glob("*/group0.jsonl")}
    assert before and not (output / "report.json").exists()
    done = finished(arguments, ranks=1)
    assert done.returncode == 0, done.stderr[-4000:]
    for path, lines in before.items():
        assert path.read_bytes().startswith(lines[: lines.rfind(b"\n") + 1]), "an item was scored again"
    found, expected = report(output)["tasks"], report(alone)["tasks"]
    for name, task in all_tasks().items():
        assert found[name]["items"].keys() == expected[name]["items"].keys()
        if task.deterministic:
            assert list(differences(found[name]["items"], expected[name]["items"], name)) == []


def asked(model: Path, output: Path, **changes: Any) -> Asked:
    documents = ["--perplexity.documents", "2", "--perplexity.context_tokens", "32", "--perplexity.scored_tokens", "16"]
    whole: dict[str, Any] = {"backbone": None, "tasks": "perplexity", "data": [], "limit": None, "settings": documents}
    return Asked(model=model, output=output, **(whole | changes))


def perplexities(sections: dict[str, Section]) -> dict[str, float]:
    found: dict[str, float] = sections["perplexity"].figures["perplexity"]
    return found


def test_a_run_its_last_checkpoint_and_what_is_made_of_it_are_the_same_model(run_folder, tiny_run, tmp_path):
    checkpoint = max((run_folder / "checkpoints").glob("step_*"))
    export([str(checkpoint), "--output", str(tmp_path / "export")])
    AutoModelForCausalLM.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "saved")
    found = [
        perplexities(evaluate(asked(model, tmp_path / f"out{number}")))
        for number, model in enumerate((run_folder, checkpoint, tmp_path / "export"))
    ]
    settings = [*asked(run_folder, tmp_path).settings, "--data.path", str(tiny_run.data)]
    found.append(perplexities(evaluate(asked(tmp_path / "saved", tmp_path / "out3", settings=settings))))
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) > 4
    with pytest.raises(LongMemError, match="not known: the model was saved without its run"):
        evaluate(asked(tmp_path / "saved", tmp_path / "out4"))


def test_an_export_is_a_model_of_transformers_that_says_what_its_run_measured(run_folder, tmp_path):
    export([str(run_folder), "--output", str(tmp_path / "export")])
    assert (run_folder / "evaluation.txt").read_text().rstrip() in (tmp_path / "export" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = tokenizer("It was a bright cold day in the harbour, and the clocks struck.", return_tensors="pt").input_ids
    ids = ids.repeat(1, 40 // ids.shape[1] + 1)[:, :32]
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits[:, 16:], logits_of(load_longmem(run_folder), ids), atol=1e-5, rtol=0)
    assert model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None).shape == (1, 52)


def test_memory_may_be_larger_than_in_training(run_folder, tmp_path):
    sweep = ["--memory.tokens", "96", "--perplexity.memory_tokens", "0,16,96"]
    found = perplexities(
        evaluate(asked(run_folder, tmp_path / "out", settings=[*asked(run_folder, tmp_path).settings, *sweep]))
    )
    assert found["memory of 0"] == found["memory_off"] and found["memory of 96"] == found["memory_on"]
    assert found["memory of 16"] not in (found["memory_off"], found["memory_on"])


def test_the_backbone_is_tried_with_other_windows(run_folder, tmp_path):
    own = asked(run_folder, tmp_path).settings
    sections = evaluate(
        asked(run_folder, tmp_path / "out", settings=[*own, "--perplexity.backbone_windows", "16,32,128"])
    )
    found = perplexities(sections)
    assert found["backbone with 16"] == pytest.approx(found["backbone"], rel=1e-5)
    assert found["backbone with 128"] == pytest.approx(found["longest_window"], rel=1e-5)
    assert found["backbone with 32"] not in (found["backbone with 16"], found["backbone with 128"])
    (table,) = (one for one in sections["perplexity"].tables if one.title.startswith("The backbone alone, by"))
    assert [row[0] for row in table.rows] == [f"backbone with {size}" for size in (16, 32, 128)]
    steps = [float(row[3].split()[0]) for row in table.rows[1:]]
    nats = [float(row[1].split()[0]) for row in table.rows]
    assert steps == pytest.approx([nats[1] - nats[0], nats[2] - nats[1]], abs=2e-4)  # four digits each


def test_a_folder_of_text_is_read_like_a_store(run_folder, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"It was a bright cold day in the harbour {number}. " * 12)
    (tmp_path / "short.txt").write_text("Too short.")
    settings = ["--perplexity.context_tokens", "16", "--perplexity.scored_tokens", "null"]
    sections = evaluate(asked(run_folder, tmp_path / "out", data=[str(tmp_path)], settings=settings))
    figures = sections["perplexity"].figures
    assert figures["documents"] == 3
    items = [one for item in report(tmp_path / "out")["tasks"]["perplexity"]["items"].values() for one in item.values()]
    assert all(one["num_tokens"] == one["tokens_of_document"] - 1 - 16 for one in items)
    total = sum(sum(one["losses"]["memory_on"]["by_segment"]) for one in items)
    assert figures["word_perplexity"]["memory_on"] == pytest.approx(np.exp(total / figures["words"]))
    assert figures["bits_per_byte"]["memory_on"] == pytest.approx(total / figures["bytes"] / np.log(2))


def test_a_task_that_was_evaluated_before_stays_in_the_report(run_folder, tasks, tmp_path):
    output = tmp_path / "out"
    evaluate(asked(run_folder, output))
    evaluate(asked(run_folder, output, tasks="recall", settings=tasks["recall"]))
    assert report(output)["tasks"].keys() == {"perplexity", "recall"}
    page = (output / "report.md").read_text()
    assert page.count("# Evaluation") == 1 and "## Perplexity" in page and "## Recall" in page
    # Of a memory of another size the report would say what is not so.
    shutil.rmtree(output / "recall")
    evaluate(asked(run_folder, output, tasks="recall", settings=[*tasks["recall"], "--memory.tokens", "32"]))
    assert report(output)["tasks"].keys() == {"recall"}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tasks": "perplexty"}, ConfigError, "did you mean perplexity"),
        ({"settings": ["--memory.tokns", "3"]}, ConfigError, "tokns"),
        ({"settings": ["--perplexity.context_tokens", "30"]}, ConfigError, "16 or 32"),
        ({"settings": ["--perplexity.memory_tokens", "4096"]}, ConfigError, "add --memory.tokens 4096"),
        ({"settings": ["--perplexity.backbone_windows", "8"]}, ConfigError, "got: 8; expected: 16 to 128; do: leave 8"),
        ({"settings": ["--perplexity.backbone_windows", "32,256"]}, ConfigError, "got: 256; expected: 16 to 128"),
        ({"data": ["/nowhere/at/all"]}, LongMemError, "/nowhere/at/all"),
    ],
)
def test_bad_input_is_refused_before_any_weight_is_loaded(run_folder, tmp_path, changes, error, words):
    def load(trained: Any, backbone: Any) -> Any:
        raise AssertionError("weights were loaded")

    with pytest.raises(error, match=words):
        evaluate(asked(run_folder, tmp_path / "out", **changes), load)


def test_another_backbone_is_refused(run_folder, tmp_path):
    other = save_backbone(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="trained beside another backbone"):
        evaluate(asked(run_folder, tmp_path / "out", backbone=str(other)))


def test_a_folder_with_an_evaluation_of_other_settings_is_refused(run_folder, tmp_path):
    evaluate(asked(run_folder, tmp_path / "out"))
    with pytest.raises(EvaluationError, match="options.scored_tokens was 16, now 32"):
        evaluate(
            asked(
                run_folder,
                tmp_path / "out",
                settings=[
                    "--perplexity.context_tokens",
                    "32",
                    "--perplexity.scored_tokens",
                    "32",
                    "--perplexity.documents",
                    "2",
                ],
            )
        )


def test_without_a_model_the_command_says_how_it_is_used():
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--model" in done.stdout and "perplexity: " in done.stdout
