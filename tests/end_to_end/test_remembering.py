"""From a text file to answers and to the page that shows what was read: the programs, on a tiny saved model."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from selenium.webdriver.common.by import By

from launch.failing import explained
from launch.generate import main as generate
from launch.inspect_memory import main as inspect_memory
from pipeline.backbone.load import load_backbone
from pipeline.data.tokenizer import load_tokenizer
from pipeline.face import LongMemForCausalLM, Memory
from tests.browser import chromium, complaints, look_like, missing, requested
from tests.tiny_run import save_backbone
from tests.unit.face.models import DEEP, SEGMENT, tiny_face

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
TEXT = "It was a bright cold day in the harbour, and the clocks of the old town were striking. " * 2
Capture = pytest.CaptureFixture[str]


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """A LongMem beside its backbone, with a tokenizer; the likeliest token is never the one that ends an answer."""
    backbone = str(save_backbone(folder / "backbone", seed=seed))
    causal_lm = load_backbone(backbone, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        causal_lm.get_input_embeddings().weight[load_tokenizer(backbone).eos_token_id] = 0.0  # the head's, too
    causal_lm.save_pretrained(backbone)
    tiny_face(backbone=causal_lm, name=backbone, settings=DEEP).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("saved")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def memory(model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "harbour.safetensors"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    generate(["--model", model, "--remember", str(text), "--save-memory", str(path)])
    return path


def test_files_are_remembered_saved_and_read_again(model: str, text: Path, memory: Path, capsys: Capture) -> None:
    saved = Memory.load(memory)
    assert [document.name for document in saved.documents()] == ["harbour.txt"]
    of_model = ["--model", model, "--prompt", "The clocks", "--max-new-tokens", str(2 * SEGMENT)]
    answers = []
    for more in (["--remember", str(text)], ["--memory", str(memory)], [], ["--no-memory"]):
        capsys.readouterr()
        generate([*of_model, *more])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    assert len(set(answers)) == 3


def test_what_an_answer_looked_up_is_printed(model: str, memory: Path, capsys: Capture) -> None:
    generate(["--model", model, "--memory", str(memory), "--prompt", "The", "--max-new-tokens", "9", "--show"])
    answer, _, shown = capsys.readouterr().out.partition("\nlooked up:\n")
    lines = shown.splitlines()
    assert answer and 1 <= len([line for line in lines if line]) <= 5
    assert all(
        re.fullmatch(r" +\d+%  harbour\.txt, [\d,]+ tokens back, layer [1-4]: '.+'", line) for line in lines if line
    )


def test_samples_are_the_same_with_the_same_seed(model: str, capsys: Capture) -> None:
    found = []
    for seed in ("1", "1", "2"):
        sampled = ["--sample", "--temperature", "0.9", "--top-p", "0.95", "--seed", seed]
        generate(["--model", model, "--prompt", "The", "--max-new-tokens", "20", *sampled])
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_a_dialogue_is_read_line_by_line(
    model: str, memory: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_model = ["--model", model, "--memory", str(memory), "--max-new-tokens", "12"]
    outputs = []
    for lines in ("The clocks\n\n  \nAnd the ship?\n", "The clocks\n", "And the ship?\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        generate(of_model)
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith(outputs[1])
    assert outputs[0] != outputs[1] + outputs[2]  # the second turn is answered after the first


def test_control_c_ends_an_answer_and_control_d_the_dialogue(model: str) -> None:
    """In a terminal, as a user has it."""
    main_end, terminal = pty.openpty()
    command = [sys.executable, "launch/generate.py", "--model", model, "--max-new-tokens", "100000"]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
    ) as process:
        os.close(terminal)
        try:
            read_until(main_end, b"> ")
            os.write(main_end, b"The clocks\n")
            read_until(main_end, b"The clocks\r\n")
            assert len(os.read(main_end, 1)) == 1  # it has begun to answer, and would go on for hours
            process.send_signal(signal.SIGINT)
            read_until(main_end, b"\n> ")
            press_control_c(process, main_end)  # there is no answer to end
            read_until(main_end, b"\n> ")
            os.write(main_end, b"\x04")
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()
            os.close(main_end)


def press_control_c(process: subprocess.Popen[bytes], terminal: int) -> None:
    """Until something happens: readline misses a signal between its prompt and its wait for the next key."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        if select.select([terminal], [], [], TIMEOUT_S / 10)[0]:
            return


def read_until(terminal: int, wanted: bytes) -> None:
    found = b""
    while not found.endswith(wanted):
        ready, _, _ = select.select([terminal], [], [], TIMEOUT_S)
        assert ready, found
        found += os.read(terminal, 1)


def test_the_page_shows_the_prompt_and_what_it_read(model: str, memory: Path, tmp_path: Path, capsys: Capture) -> None:
    if missing() is not None:
        pytest.skip(str(missing()))
    page, prompt = tmp_path / "page.html", tmp_path / "prompt.txt"
    prompt.write_text("The clocks of the old town </script>", encoding="utf-8")
    options = ["--model", model, "--memory", str(memory), "--output", str(page)]
    inspect_memory([*options, "--prompt-file", str(prompt), "--chunks-per-token", "5", "--layers", "2", "4"])
    told = capsys.readouterr().out
    perplexities = re.search(r"perplexity ([\d.]+) without memory, ([\d.]+) with -> ", told)
    assert perplexities is not None and told.endswith(f"{page}\n")
    with chromium(tmp_path / "browser") as browser:
        look_like(browser, width=1100)
        browser.get("about:blank")
        requested(browser)
        browser.get(page.as_uri() + "#token-3")
        tokens = browser.find_elements(By.CSS_SELECTOR, ".token")
        assert "".join(token.text.strip("·") for token in tokens) == "Theclocksoftheoldtown</script>"
        without, with_memory = map(float, perplexities.groups())
        shown = browser.find_element(By.ID, "figures").text.split("\n")[1]
        assert [float(number) for number in shown.split(" → ")] == pytest.approx([without, with_memory], rel=0.01)
        rows = browser.find_elements(By.CSS_SELECTOR, "#chunks tbody tr")
        assert len(rows) == 5
        for row in rows:
            cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
            assert cells[2] == "harbour.txt" and cells[4] in ("2", "4")
            assert cells[1].replace("·", " ") in TEXT
        assert len(browser.find_elements(By.CSS_SELECTOR, "#gates tbody tr")) == 2
        assert complaints(browser) == [] and set(requested(browser)) == {page.as_uri()}


def failing(main: object, arguments: Sequence[str], capsys: Capture) -> str:
    with pytest.raises(SystemExit) as ended, explained():
        main(list(arguments))  # type: ignore[operator]
    assert ended.value.code != 0
    return capsys.readouterr().err


def test_bad_input_is_told_in_words(model: str, memory: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Mühle".encode("latin-1"))
    foreign = tmp_path / "foreign.safetensors"
    other = LongMemForCausalLM.from_pretrained(save_model(tmp_path / "other", seed=1))
    other.memorize(TEXT, names="other", progress=False).save(foreign)
    of_model, inspected = ["--model", model], ["--model", model, "--memory", str(memory)]
    for arguments, words in (
        ([*of_model, "--remember", str(tmp_path / "none.txt")], "a file cannot be read; got: .*none.txt"),
        ([*of_model, "--remember", str(latin)], "an input is not UTF-8; got: .*latin.txt.*iconv"),
        ([*of_model, "--memory", str(tmp_path / "none"), "--prompt", "a"], "the memory cannot be read; got: .*none"),
        ([*of_model, "--memory", str(foreign), "--prompt", "a"], "the memory has another backbone"),
        ([*of_model, "--memory", str(text), "--prompt", "a"], "the file is damaged, or no memory"),
        ([*of_model, "--prompt", " "], "the prompt is empty"),
        ([*of_model, "--prompt", "a", "--top-p", "0.5"], "--top-p: means nothing without --sample"),
        ([*of_model, "--prompt", "a", "--sample", "--top-p", "1.5"], "1.5 is not above 0 and at most 1"),
        ([*of_model, "--prompt", "a", "--max-new-tokens", "0"], "0 is less than 1"),
        ([*of_model, "--no-memory", "--show"], "--no-memory: there is nothing to read or to show"),
        ([*of_model, "--save-memory", "x"], "--save-memory: give --remember or --memory"),
        (["--model", str(tmp_path / "nowhere"), "--prompt", "a"], "the folder holds no LongMem"),
    ):
        assert re.search(words, failing(generate, arguments, capsys), re.DOTALL), words
    for arguments, words in (
        ([*inspected, "--prompt", " \n"], "the prompt is empty"),
        ([*inspected, "--prompt-file", str(latin)], "an input is not UTF-8"),
        ([*inspected, "--prompt", "a", "--layers", "9"], "the model reads no memory in a layer; got: 9"),
        ([*inspected, "--prompt", "a", "--chunks-per-token", "0"], "--chunks-per-token: 0 is less than 1"),
        ([*of_model, "--memory", str(foreign), "--prompt", "a"], "the memory has another backbone"),
        ([*inspected, "--prompt", "a", "--output", str(tmp_path / "no" / "page.html")], "the page cannot be written"),
    ):
        assert re.search(words, failing(inspect_memory, arguments, capsys), re.DOTALL), words
