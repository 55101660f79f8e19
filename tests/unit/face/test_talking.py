"""Turns and answers are one stream: what was said before is read, or remembered, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from pipeline.errors import DataError, LongMemMemoryError
from pipeline.face import LongMemForCausalLM
from pipeline.face.given import texts_of_files
from pipeline.face.talking import Talk
from tests.tiny_models import GATED, drawn
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.unit.face.models import SEGMENT, tiny_face

VOCABULARY, END = 300, 0
GREEDY: Mapping[str, Any] = {"do_sample": False, "max_new_tokens": 2 * SEGMENT + 3}
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Kept(BaseStreamer):
    """What a streamer is given: the prompt, then token by token."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def face(seed: int = 0) -> LongMemForCausalLM:
    return tiny_face(backbone=drawn(LlamaConfig(**{**GATED, "vocab_size": VOCABULARY}, num_hidden_layers=4), seed=seed))


@pytest.fixture(scope="module")
def model() -> LongMemForCausalLM:
    return face()


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return save_tiny_tokenizer(tmp_path)


def said(talk: Talk, text: str, **kwargs: Any) -> list[int]:
    """The ids that the model is given for a turn, and its answer's."""
    kept = Kept()
    talk.answer(text, streamer=kept, **{"way": GREEDY, **kwargs})
    return kept.ids


def test_turns_are_one_stream_behind_the_memory(model, tokenizer):
    memory = model.memorize("The clocks of the old town. " * 4, tokenizer=tokenizer, names="town", progress=False)
    talk = Talk(model, tokenizer, [memory])
    stream: list[int] = []
    for text in ("What had the captain said?", "And the other ship?", "Why"):
        given = said(talk, text)
        stream += given if not stream else given[1:]  # the last token of the answer before comes first
        with torch.no_grad():
            likeliest = model(torch.tensor([stream]), memory=memory, use_cache=False).logits[0].argmax(-1).tolist()
        num_new = GREEDY["max_new_tokens"]
        assert stream[-num_new:] == likeliest[-num_new - 1 : -1]


def test_lines_without_a_template_follow_answers_in_lines_of_their_own(model, tokenizer):
    talk = Talk(model, tokenizer)
    first, second = said(talk, "One"), said(talk, "Two", way={"max_new_tokens": 1})
    assert tokenizer.decode(first).startswith("One")
    assert tokenizer.decode(second[1:-1]) == "\nTwo" and second[0] == first[-1]


@pytest.mark.parametrize("is_ended", [True, False])
def test_a_template_says_how_turns_follow_each_other(model, tokenizer, is_ended, monkeypatch):
    tokenizer.chat_template = TEMPLATE
    talk = Talk(model, tokenizer)
    ids = said(talk, "One", way={"max_new_tokens": 1})
    assert tokenizer.decode(ids[:-1]) == "[user]One<|endoftext|>\n[assistant]"
    talk._unread = [END] if is_ended else [17]  # as if the answer had ended so
    ids = said(talk, "Two", way={"max_new_tokens": 1})
    assert ids[0] == (END if is_ended else 17)
    assert (
        tokenizer.decode(ids[1:-1]) == ("" if is_ended else "<|endoftext|>") + "\n[user]Two<|endoftext|>\n[assistant]"
    )
    plain = said(Talk(model, tokenizer, is_plain=True), "One", way={"max_new_tokens": 1})
    assert tokenizer.decode(plain[:-1]) == "One"


def test_an_answer_ends_when_it_is_asked_to_and_the_dialogue_goes_on(model, tokenizer):
    asked, talk = [], Talk(model, tokenizer)

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    given = len(tokenizer("One")["input_ids"])
    first = said(talk, "One", is_stopped=is_stopped)
    assert len(first) == given + 3
    whole = Talk(model, tokenizer)
    assert said(whole, "One")[: given + 3] == first
    assert len(said(talk, "Two")) == 1 + len(tokenizer("\nTwo")["input_ids"]) + GREEDY["max_new_tokens"]


def test_what_an_answer_looked_up_is_of_what_was_remembered(model, tokenizer):
    text = "She remembered the letter, and the long road over the hills. " * 2
    memory = model.memorize(text, names="letter", tokenizer=tokenizer, progress=False)
    talk = Talk(model, tokenizer, [memory])
    talk.answer("The letter", way={"max_new_tokens": 4})
    assert talk.looked_up(3) == []
    talk.answer("The letter", way={"max_new_tokens": 40}, watch=True)
    shown = talk.looked_up(1000)
    assert {one.document for one in shown} == {"letter", "this dialogue"}
    assert all(one.text in f"{text}The letter" for one in shown if one.document == "letter")  # it goes on there
    assert [one.share for one in shown] == sorted((one.share for one in shown), reverse=True)
    assert all(0 < one.share <= 1 and one.layer in (1, 2, 3, 4) for one in shown)
    assert len({(one.document, one.distance) for one in shown}) == len(shown)
    assert talk.looked_up(2) == shown[:2]
    assert all(fusion.observe is None for fusion in model.longmem.sidenet.fusions.values())


def test_without_memory_nothing_is_looked_up(model, tokenizer):
    talk = Talk(model, tokenizer, reads_memory=False)
    ids = said(talk, "The letter", watch=True)
    given = len(tokenizer("The letter")["input_ids"])
    assert talk.looked_up(5) == []
    alone = model.generate(
        torch.tensor([ids[:given]]), attention_mask=torch.ones(1, given), memory=False, pad_token_id=END, **GREEDY
    )
    assert alone[0].tolist() == ids


def test_bad_input_is_told_in_words(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match="the prompt is empty; got: ' '"):
        Talk(model, tokenizer).answer(" ", way=GREEDY)
    foreign = face(seed=1).memorize("The other ship.", tokenizer=tokenizer, progress=False)
    with pytest.raises(LongMemMemoryError, match="the memory has another backbone"):
        Talk(model, tokenizer, [foreign])


def test_files_are_texts_by_their_names(tmp_path):
    (tmp_path / "other").mkdir()
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "other" / "a.txt"]
    for file, text in zip(files, (b"\xef\xbb\xbfone\r\ntwo\n", b"b", b"other"), strict=True):
        file.write_bytes(text)
    assert texts_of_files(files) == {str(files[0]): "one\ntwo\n", "b.txt": "b", str(files[2]): "other"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "a file cannot be read; got: .*text.txt .No such file"),
        (b" \n", "a file is empty; got: .*text.txt"),
        (b"caf\xe9 au lait", "an input is not UTF-8; got: .*text.txt, byte offset 3"),
    ],
)
def test_a_file_that_is_no_text_is_told_in_words(content, words, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        texts_of_files([file])
    (tmp_path / "a").write_text("a")
    with pytest.raises(DataError, match="a file is named twice"):
        texts_of_files([tmp_path / "a", tmp_path / "a"])
