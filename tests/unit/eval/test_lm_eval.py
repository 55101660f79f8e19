"""LongMem in lm-evaluation-harness: the rules with an oracle in the model's place, and a tiny model against `hf`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from eval.adapters.lm_eval import LongMemLM
from eval.adapters.loading import load, take_arguments
from eval.adapters.tasks import local
from eval.lm_eval import main
from eval.model_scorer import ModelScorer
from eval.runner import EvaluationError
from eval.scorer import BACKBONE, LONGEST_WINDOW, MEMORY_OFF, MEMORY_ON, WINDOW_ONLY, Row
from pipeline.backbone.backbone import identity
from pipeline.backbone.load import load_backbone
from pipeline.config.load import dump_config
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import ConfigError
from pipeline.model.longmem import build
from tests.oracle_scorer import OracleScorer
from tests.tiny_tokenizer import END_OF_TEXT

TOLERANCE = 1e-4  # float32 log-likelihoods of up to 120 tokens, summed in another order
SEGMENT, LONGEST = 16, 128
FOLDER = str(Path(local.__file__).parent)
BOOK = "It was a bright cold day in the harbour. She remembered the letter, the long road over the hills, and more. "


@pytest.fixture(scope="module")
def untrained(tiny_run, tmp_path_factory):
    """An export of a SideNet as it is before any training."""
    folder = tmp_path_factory.mktemp("lm_eval") / "export"
    folder.mkdir()
    config = tiny_run.config(folder)
    model = load_backbone(str(tiny_run.backbone), dtype=torch.float32, attention="sdpa")
    _, sidenet = build(config.model, model)
    save_file({name: one.detach().clone() for name, one in sidenet.named_parameters()}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "export.json").write_text(json.dumps({"backbone": identity(model)}))
    return folder


def requests_of(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def longmem(folder, **arguments):
    return get_model("longmem").create_from_arg_obj({"pretrained": str(folder), **arguments}, {"device": "cpu"})


def hf(tiny_run):
    return HFLM(pretrained=str(tiny_run.backbone), device="cpu", dtype="float32", batch_size=3)


# Short enough for a segment; some share a context, one has none, one ends in spaces, which go to the continuation.
SHORT = [
    ("It was a bright", " cold day"),
    ("It was a bright", " old town"),
    ("", "She remembered"),
    ("The letter  ", "of the ship"),
    ("day", " in the harbour."),
    ("It was a bright", "!"),
]
# No two may be one text that is cut at two places: hf (0.4.13) scores one of them with logits of wrong places.
LONG = [(BOOK[:90], BOOK[90:120]), (BOOK[:90], " and the ship"), (BOOK[:60], BOOK[60:99]), ("", BOOK[:100])]


@pytest.mark.parametrize(
    ("condition", "pairs"), [(MEMORY_OFF, SHORT), (BACKBONE, SHORT), (MEMORY_ON, SHORT), (LONGEST_WINDOW, SHORT + LONG)]
)
def test_likelihoods_are_those_of_hf_where_nothing_exceeds_the_window(untrained, tiny_run, condition, pairs):
    ours, theirs = longmem(untrained, condition=condition), hf(tiny_run)
    expected = theirs.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize(("condition", "longest"), [(MEMORY_OFF, 20), (BACKBONE, 20), (LONGEST_WINDOW, 150)])
def test_documents_are_those_of_hf_where_nothing_exceeds_the_window(untrained, tiny_run, condition, longest):
    texts = [(BOOK[:length],) for length in (longest, 3, longest // 2)] + [("",), (BOOK[40 : 40 + longest],)]
    assert len(load_tokenizer(tiny_run.backbone)(BOOK[:longest])["input_ids"]) <= (LONGEST if longest > 20 else SEGMENT)
    expected = hf(tiny_run).loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts), disable_tqdm=True)
    for size in (1, 3):
        ours = LongMemLM.create_from_arg_obj(
            {"pretrained": str(untrained), "condition": condition}, {"device": "cpu", "batch_size": size}
        )
        found = ours.loglikelihood_rolling(requests_of("loglikelihood_rolling", *texts), disable_tqdm=True)
        assert found == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("condition", "longest"), [(MEMORY_OFF, 18), (BACKBONE, 18), (LONGEST_WINDOW, 130)])
def test_texts_are_those_of_hf_where_nothing_exceeds_the_window(untrained, tiny_run, condition, longest):
    until = [BOOK[:longest], BOOK[10 : 10 + longest // 2], BOOK[:longest]]
    ways: list[dict[str, Any]] = [
        {"max_gen_toks": 9, "until": [" the", "\n\n"]},
        {"max_gen_toks": 5},
        {"max_gen_toks": 7, "until": "e"},
    ]
    asked = [(text, {"do_sample": False, **way}) for text, way in zip(until, ways, strict=True)]
    expected = hf(tiny_run).generate_until(requests_of("generate_until", *asked), disable_tqdm=True)
    found = longmem(untrained, condition=condition).generate_until(
        requests_of("generate_until", *asked), disable_tqdm=True
    )
    assert found == expected


def test_what_a_model_would_write_is_likeliest_and_nothing_else_is(untrained):
    scorer, _, _ = load(take_arguments({"pretrained": str(untrained)}))
    past = scorer.remember(np.arange(48))
    prompts = [np.array([5, 6, 7]), np.array([9])]
    texts = scorer.greedy(past, prompts, MEMORY_ON, max_tokens=4, is_done=lambda written: False)
    rows = [Row(np.array([*prompt, *text]), 4) for prompt, text in zip(prompts, texts, strict=True)]
    other = [Row(np.array([*row.tokens[:-1], (row.tokens[-1] + 1) % 300]), 4) for row in rows]
    found = scorer.likelihoods(past, rows + other, MEMORY_ON)
    assert [one.is_likeliest for one in found] == [True, True, False, False]
    for one, losses in zip(found, scorer.losses(past, rows + other, [MEMORY_ON])[MEMORY_ON], strict=True):
        assert one.losses == pytest.approx(losses, abs=1e-5)


def test_context_beyond_the_window_is_read_from_memory(untrained):
    asked = requests_of("loglikelihood", (BOOK * 2, " It was"))
    totals = {
        name: longmem(untrained, condition=name).loglikelihood(asked, disable_tqdm=True)[0][0]
        for name in (MEMORY_ON, MEMORY_OFF)
    }
    assert abs(totals[MEMORY_ON] - totals[MEMORY_OFF]) > 100 * TOLERANCE


def loss_by_length(before, token, condition):
    """Says how much text a token was predicted from: everything, whichever way it was given."""
    return float(len(before))


def test_a_continuation_is_scored_after_the_whole_context_once_for_all_that_share_it(tokenizer):
    scorer = OracleScorer(loss_by_length, segment_tokens=SEGMENT)
    model = LongMemLM(scorer, tokenizer)
    context, near, far = BOOK * 3, " harbour", " " + BOOK
    found = model.loglikelihood(requests_of("loglikelihood", (context, near), (context, far)), disable_tqdm=True)
    begin = len(tokenizer.encode(context.rstrip()))
    for (total, is_greedy), continuation in zip(found, (near, far), strict=True):
        length = len(tokenizer.encode(context + continuation)) - begin
        assert length > SEGMENT or continuation == near
        assert total == -sum(range(begin, begin + length))
        assert not is_greedy
    segments = -(-(len(tokenizer.encode(context + far)) - begin) // SEGMENT)
    assert scorer.num_remembered == segments  # one past for both first rows, one for each further row of the far one


def test_every_token_of_a_document_is_predicted_the_first_by_the_last_token_of_texts(tokenizer):
    seen = []

    def knows(before, token, condition):
        seen.append((before, token))
        return 1.0

    text = BOOK * 2
    model = LongMemLM(OracleScorer(knows, segment_tokens=SEGMENT), tokenizer, documents_at_once=2)
    found = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens = tokenizer.encode(text)
    assert found == [-len(tokens)]
    whole = [tokenizer.eos_token_id, *tokens]
    assert seen[: len(tokens)] == [(whole[: place + 1], whole[place + 1]) for place in range(len(tokens))]


def test_a_text_is_written_from_the_whole_context_up_to_the_first_end(tokenizer):
    heard = []

    def writes(before, condition):
        heard.append(len(before))
        answer = tokenizer.encode(" and" + " the ship" * 30 + " STOP here")
        return answer[len(before) - begin :]

    context = BOOK * 3
    begin = len(tokenizer.encode(context))
    model = LongMemLM(OracleScorer(writes=writes, segment_tokens=SEGMENT), tokenizer)
    for way, expected in [
        ({"until": ["STOP"], "max_gen_toks": 500}, " and" + " the ship" * 30 + " "),
        ({"until": ["ship", "STOP"]}, " and the "),
        ({"until": "", "max_gen_toks": 3}, tokenizer.decode(tokenizer.encode(" and the ship")[:3])),
    ]:
        heard.clear()
        found = model.generate_until(requests_of("generate_until", (context, way)), disable_tqdm=True)
        assert found == [expected]
        # What is longer than a segment is remembered in its turn: each turn begins where the last one ended.
        assert heard == [begin + turn * SEGMENT for turn in range(len(heard))]
    ended = OracleScorer(writes=lambda before, condition: [*tokenizer.encode(" day"), tokenizer.eos_token_id, 70])
    assert LongMemLM(ended, tokenizer).generate_until(
        requests_of("generate_until", ("A", {"until": []})), disable_tqdm=True
    ) == [" day"]


def test_special_tokens_are_those_of_hf(tokenizer):
    model = LongMemLM(OracleScorer(), tokenizer)
    assert model.prefix_token_id == model.eot_token_id == tokenizer.eos_token_id
    assert model.tok_encode(END_OF_TEXT + "day")[0] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "way", [{"do_sample": True, "temperature": 0.7}, {"temperature": 0.5}, {"num_beams": 4, "until": []}]
)
def test_what_is_not_greedy_is_refused_before_anything_is_read(tokenizer, way):
    scorer = OracleScorer()
    with pytest.raises(EvaluationError, match="does not write: it takes the likeliest token.*do: add --gen_kwargs"):
        LongMemLM(scorer, tokenizer).generate_until(
            requests_of("generate_until", ("A", {"until": []}), ("B", way)), disable_tqdm=True
        )
    assert scorer.num_remembered == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "pretrained is missing"),
        (
            {"pretrained": "x", "conditions": "memory_on"},
            "conditions is no argument of longmem.*did you mean condition",
        ),
        ({"pretrained": "x", "tokens_at_once": 0}, "tokens_at_once is no number of tokens; got: 0"),
        ({"pretrained": "x", "max_length": 9}, "max_length is no argument of longmem.*do: leave it out"),
    ],
)
def test_a_wrong_argument_is_named(given, words):
    with pytest.raises(ConfigError, match=words):
        take_arguments(given)


def test_settings_of_the_run_are_laid_over_it(untrained):
    model = LongMemLM.create_from_arg_string(f"pretrained={untrained},memory.tokens=32,memory.top_k_tokens=8")
    assert isinstance(model.scorer, ModelScorer)
    assert model.scorer.model.settings.memory.tokens == 32
    assert model.get_model_info()["longmem_memory"]["top_k_tokens"] == 8
    json.dumps(model.get_model_info())
    with pytest.raises(ConfigError, match="memory.token"):
        longmem(untrained, **{"memory.token": 32})


@pytest.mark.parametrize("condition", ["other_memory", WINDOW_ONLY, "on"])
def test_a_condition_that_there_is_not_is_refused(untrained, condition):
    with pytest.raises(EvaluationError, match=f"got: condition={condition}; expected: backbone, memory_off, memory_on"):
        longmem(untrained, condition=condition)


def test_ranks_are_refused(untrained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="drives one process.*got: 2 ranks"):
        longmem(untrained)


def test_a_context_longer_than_memory_is_told_of_once(untrained, caplog):
    model = longmem(untrained)
    asked = requests_of("loglikelihood", (BOOK * 3, " day"), (BOOK * 3, " ship"), (BOOK * 2, " day"))
    model.loglikelihood(asked, disable_tqdm=True)
    forgotten = (len(model.tok_encode((BOOK * 3).rstrip())) - 1) // SEGMENT * SEGMENT - 64
    told = [record.getMessage() for record in caplog.records if "forgotten" in record.getMessage()]
    assert len(told) == 1
    assert f"its first {forgotten} are forgotten" in told[0]


def test_the_harness_s_command_line_knows_longmem(untrained, tmp_path, monkeypatch, capsys):
    (tmp_path / "book.txt").write_text(BOOK)
    words = ["--model", "longmem", "--model_args", f"pretrained={untrained},condition=memory_off,memory.tokens=48"]
    words += ["--tasks", "longmem_books", "--include_path", FOLDER]
    words += ["--metadata", json.dumps({"books": str(tmp_path / "book.txt")}), "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["lm_eval", *words])
    main()
    assert "word_perplexity" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert (config["longmem_condition"], config["longmem_memory"]["tokens"]) == (MEMORY_OFF, 48)
    monkeypatch.setattr("sys.argv", ["lm_eval", *words, "--model_args", "conditions=memory_on"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "error: --model_args has 1 problem(s)" in capsys.readouterr().err


def test_without_the_harness_the_command_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match="lm_eval.*do: pip install -r requirements-lm-eval.txt"):
        main()


def test_tasks_of_ruler_run_without_network(untrained, monkeypatch):
    pytest.importorskip("wonderwords")
    from lm_eval.tasks.ruler import prepare_niah

    from bench.ruler import scores

    made = prepare_niah.generate_samples
    monkeypatch.setattr(prepare_niah, "generate_samples", lambda *args, **kw: made(*args, **{**kw, "num_samples": 2}))
    tasks = ["niah_single_1", "niah_multikey_3"]
    (found,) = scores([longmem(untrained)], tasks, length=1024, items=1, max_tokens=2)
    assert set(found) == {*tasks, "seconds"}
    assert all(0 <= found[task] <= 1 for task in tasks)  # one that was not scored is -1
