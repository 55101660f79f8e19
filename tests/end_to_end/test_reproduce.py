"""launch/reproduce.sh on a tiny backbone and made-up books: data, training, evaluation, reports; then nothing again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.metrics.record import read_metrics
from tests.tiny_run import save_backbone

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
SENTENCE = "In year {} the ship {} came home to the harbour, and captain {} wrote it into the book. "
TINY = {
    "backbone.context_tokens": 16,
    "memory.tokens": 64,
    "memory.top_k_tokens": 8,
    "memory.window_tokens": 16,
    "memory.position": "fixed:32",
    "train.segment_tokens": 32,
    "train.steps": 2,
    "train.warmup_steps": 0,
    "evaluation.documents": 2,
    "evaluation.context_tokens": 64,
    "evaluation.scored_tokens": 32,
}


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/reproduce.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def write_books(folder: Path) -> Path:
    for split, count, sentences in (("train", 4, 20), ("validation", 4, 120)):
        (folder / split).mkdir(parents=True)
        for book in range(count):
            lines = [SENTENCE.format(1700 + year, book, year % 7) for year in range(sentences)]
            (folder / split / f"book {book}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_a_recipe_is_trained_and_evaluated_and_not_twice(tmp_path: Path) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("launch/reproduce.sh uses .venv, and would install it")
    books, work, results = write_books(tmp_path / "some books"), tmp_path / "work", tmp_path / "results"
    work.mkdir()
    backbone = save_backbone(tmp_path / "backbone", seed=0)
    options = ["--novels", str(books), "--backbone", str(backbone), "--work", str(work), "--results", str(results)]
    settings = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    command = ["novels", *options, "--seeds", "7", "--limit", "small", *settings]
    first = started(*command)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    run = work / "runs" / "novels-7"
    assert [record["step"] for record in read_metrics(run)] == [1, 2]
    tasks = json.loads((run / "evaluation" / "report.json").read_text("utf-8"))["tasks"]
    assert set(tasks) == {"perplexity", "recall"}
    published = {path.name: path.read_bytes() for path in (results / "novels-7").iterdir()}
    assert {"report.md", "perplexity-by-memory.png", "recall-passkey-memory_on.png"} <= set(published)
    assert b"memory of 16,384" in published["report.md"]
    assert str(tmp_path).encode() not in published["report.md"]
    made = {
        path: path.stat().st_mtime_ns
        for path in sorted(work.rglob("group*.jsonl")) + sorted(work.rglob("manifest.json"))
    }
    assert len(made) >= 3
    again = started(*command)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert len(read_metrics(run)) == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {path.name: path.read_bytes() for path in (results / "novels-7").iterdir()} == published
    other = write_books(tmp_path / "other")
    refused = started(*[str(other) if word == str(books) else word for word in command])
    assert refused.returncode == 2 and "novels-data was made of other data" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["novels"], "novels wants --novels DIR with train/ and validation/"),
        (["novels", "--novels", "/nowhere"], "--novels /nowhere is not there"),
        (["icl", "--novels", "BOOKS"], "icl wants --in-context DIR, or hub"),
        (["novels", "code"], "one recipe, or all: got novels and code"),
        (["poems"], "unknown option poems"),
        (["code", "--seeds", "one"], '--seeds needs numbers, such as "1 2 3"'),
        (["code", "--train.steps"], "--train.steps needs a value"),
        (["code", "--run.seed", "3"], "--run.seed is set here: see --work, --seeds and --backbone"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(arguments: list[str], words: str, tmp_path: Path) -> None:
    books = str(write_books(tmp_path / "books"))
    found = started(*[books if word == "BOOKS" else word for word in arguments])
    assert found.returncode != 0 and words in found.stderr
    assert found.stdout == ""
