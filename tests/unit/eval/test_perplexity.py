"""Evaluation of a tiny random model against loops that read one document at a time."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch

from eval.scorer import CONDITIONS
from eval.while_training import evaluate, score
from pipeline.backbone.encoding import Encoding
from pipeline.data.store import STORE_FEATURES, TokenStore, write_store
from pipeline.data.tokenizer import TokenizerInfo
from pipeline.distributed.groups import MemoryGroup
from pipeline.errors import ConfigError, DataError
from pipeline.model.longmem import LongMem, build
from tests.shards import in_slot_order
from tests.tiny_config import tiny_config
from tests.tiny_longmem import reader_of
from tests.tiny_models import VOCABULARY, tiny_model

TOLERANCE = 2e-4  # float32 losses, summed in another order with another number of rows
LENGTHS = (41, 40, 39, 70, 55, 48)  # context and scored tokens are 40: one without a last target, one too short
DOCUMENTS = (0, 1, 3, 4, 5)
PARTNERS = {0: 1, 1: 0, 3: 4, 4: 3, 5: 0}
SEGMENT, CONTEXT, SCORED = 8, 24, 16
NO_WINDOW = tuple(name for name in CONDITIONS if name != "window_only")


def group_of_one(number=0, *, of=1):
    """A memory group of one rank."""
    return MemoryGroup(number, num_groups=of, rank=0, size=1, process_group=None)


def save(folder, documents):
    rows = {"tokens": documents, "source": ["test"] * len(documents)}
    write_store(
        folder,
        {"validation": datasets.Dataset.from_dict(rows, features=STORE_FEATURES)},
        tokenizer=TokenizerInfo(identity="ab" * 32, name="tiny", vocab_size=VOCABULARY),
    )
    return TokenStore.open(folder, "validation")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    random = np.random.default_rng(0)
    documents = [random.integers(1, VOCABULARY, length).tolist() for length in LENGTHS]
    return save(tmp_path_factory.mktemp("data") / "store", documents)


def config_for(*, documents=8, scope="lane", enabled=True, memory_tokens=32, memory=None, left=0, **evaluation):
    return tiny_config(
        backbone={"context_tokens": left},
        memory={
            "scope": scope,
            "enabled": enabled,
            "position": "clamp:12",
            "tokens": memory_tokens,
            **(memory or {}),
        },
        sidenet={"layout": "top", "memory_layers": "all", "fusion": "joint", "gate_init": 2.0},
        train={"segment_tokens": SEGMENT},
        evaluation={"documents": documents, "context_tokens": CONTEXT, "scored_tokens": SCORED, **evaluation},
    )


@pytest.fixture(scope="module")
def parts():
    return build(config_for().model, tiny_model("llama"))


@pytest.fixture
def make(parts):
    """Takes settings, gives configuration and model; backbone and SideNet are made once."""

    def made(**settings):
        config = config_for(**settings)
        return config, LongMem(config.model, *parts)

    return made


def by_document(scored):
    return {one.document: one for one in scored}


@pytest.fixture(scope="module")
def scored(parts, store):
    config = config_for()
    return by_document(score(LongMem(config.model, *parts), [store], config, group=group_of_one()))


def encodings(model, store, document) -> list[tuple[int, torch.Tensor, Encoding]]:
    tokens = torch.from_numpy(store.tokens(document, 0, CONTEXT + SCORED))[None]
    label = torch.full((1, SEGMENT), document)
    pieces = [(at, tokens[:, at : at + SEGMENT]) for at in range(0, CONTEXT + SCORED, SEGMENT)]
    return [(at, label, model.encode(piece, label)) for at, piece in pieces]


@torch.no_grad()
def loop(model, store, document, memory_of):
    """Losses of one document that reads the memory of `memory_of` (None: no memory), segment by segment."""
    whole = torch.from_numpy(store.tokens(document, 0, CONTEXT + SCORED + 1))
    bank, losses = model.bank(1), []
    past = encodings(model, store, document if memory_of is None else memory_of)
    for (start, label, encoding), (_, _, remembered) in zip(encodings(model, store, document), past, strict=True):
        if start >= CONTEXT:
            reader = None if memory_of is None else reader_of(model, bank, start=start, documents=label)
            logits = model.logits(model.hidden(encoding, reader))[0].double()
            targets = whole[start + 1 : start + SEGMENT + 1]
            chosen = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
            losses += (-chosen).tolist() + [0.0] * (SEGMENT - len(targets))
        model.append(bank, remembered, start=start, documents=label)  # labelled as the reader's own document
    return np.array(losses)


def test_the_documents_that_are_long_enough_are_scored_whole(scored):
    assert tuple(sorted(scored)) == DOCUMENTS
    for document, one in scored.items():
        assert tuple(one.losses) == NO_WINDOW
        assert one.counts.tolist() == [1.0] * 15 + [0.0 if document == 1 else 1.0]
        assert all(len(losses) == SCORED and losses.dtype == np.float64 for losses in one.losses.values())
        assert (one.losses["memory_on"][one.counts == 0] == 0).all()


def test_documents_of_several_stores_are_scored_each_with_a_number_of_its_own(make, store, scored, tmp_path):
    random = np.random.default_rng(5)
    other = save(tmp_path / "other", [random.integers(1, VOCABULARY, length).tolist() for length in (20, 50, 41)])
    config, model = make(documents=4)
    found = by_document(score(model, [store, other], config, group=group_of_one()))
    assert len(found) == 4 and set(found) & {7, 8} == {7, 8}  # in turn: two of each, counted through both
    for number, one in found.items():
        own = loop(model, *((other, number - 6, number - 6) if number > 5 else (store, number, number)))
        np.testing.assert_allclose(one.losses["memory_on"], own, atol=TOLERANCE)


def test_backbone_alone_is_the_model_of_transformers(scored, store):
    model = tiny_model("llama")
    for document in DOCUMENTS:
        tokens = torch.from_numpy(store.tokens(document, 0, CONTEXT + SCORED + 1))
        for start in (CONTEXT, CONTEXT + SEGMENT):
            targets = tokens[start + 1 : start + SEGMENT + 1]
            with torch.no_grad():
                logits = model(tokens[None, start : start + SEGMENT]).logits[0, : len(targets)]
            expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            found = scored[document].losses["backbone"][start - CONTEXT :][: len(targets)]
            np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 40, 33, 20, 0])
def test_the_longest_window_is_the_model_of_transformers_with_all_before_a_token(make, store, window):
    config, model = make(backbone_window_tokens=window)
    found = by_document(score(model, [store], config, group=group_of_one()))
    if window == 0:
        assert all("longest_window" not in one.losses for one in found.values())
        return
    plain, wanted = tiny_model("llama"), 96 if window is None else window
    for document in DOCUMENTS:
        tokens = torch.from_numpy(store.tokens(document, 0, CONTEXT + SCORED + 1))
        pieces = [(CONTEXT, CONTEXT + SCORED)]
        if wanted < CONTEXT + SCORED:  # then each segment has what fits before it
            pieces = [(start, start + SEGMENT) for start in range(CONTEXT, CONTEXT + SCORED, SEGMENT)]
        for start, stop in pieces:
            before, targets = max(0, stop - wanted), tokens[start + 1 : stop + 1]
            with torch.no_grad():
                logits = plain(tokens[None, before:stop]).logits[0, start - before :][: len(targets)]
            expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            got = found[document].losses["longest_window"][start - CONTEXT :][: len(targets)]
            np.testing.assert_allclose(got, expected.numpy(), atol=TOLERANCE)


def test_another_memory_leaves_a_row_its_own_window(make, store):
    """With a window of all that is remembered nothing is retrieved and nothing borrowed; with less, something is."""
    losses = {}
    for window in (8, 32):
        config, model = make(memory={"window_tokens": window, "sink": True}, left=5)
        losses[window] = by_document(score(model, [store], config, group=group_of_one()))
        assert tuple(losses[window][0].losses) == CONDITIONS
    for document in DOCUMENTS:
        all_of_it, some = losses[32][document].losses, losses[8][document].losses
        for name in ("other_memory", "window_only"):
            np.testing.assert_allclose(all_of_it[name], all_of_it["memory_on"], atol=TOLERANCE)
            assert abs(some[name] - some["memory_on"]).max() > 100 * TOLERANCE
        assert abs(some["window_only"] - all_of_it["window_only"]).max() > 100 * TOLERANCE
        assert abs(some["other_memory"] - some["window_only"]).max() > 100 * TOLERANCE
    # The same window is context and segment: the first scored segment by the model itself.
    tokens = torch.from_numpy(store.tokens(0, CONTEXT - 5, CONTEXT + SEGMENT + 1))
    with torch.no_grad():
        logits = tiny_model("llama")(tokens[None, :-1]).logits[0, 5:]
    expected = torch.nn.functional.cross_entropy(logits, tokens[6:], reduction="none")
    np.testing.assert_allclose(losses[8][0].losses["backbone"][:SEGMENT], expected.numpy(), atol=TOLERANCE)


def test_without_memory_an_untrained_sidenet_is_the_backbone(scored):
    for one in scored.values():
        np.testing.assert_allclose(one.losses["memory_off"], one.losses["backbone"], atol=TOLERANCE)


@pytest.mark.parametrize("scope", ["lane", "document", "group"])
def test_conditions_with_memory_equal_a_loop_over_single_documents(make, store, scope):
    config, model = make(scope=scope)
    found = by_document(score(model, [store], config, group=group_of_one()))
    for document in DOCUMENTS:
        own = loop(model, store, document, document)
        other = loop(model, store, document, PARTNERS[document])
        np.testing.assert_allclose(found[document].losses["memory_on"], own, atol=TOLERANCE)
        np.testing.assert_allclose(found[document].losses["other_memory"], other, atol=TOLERANCE)
        off = loop(model, store, document, None)
        np.testing.assert_allclose(found[document].losses["memory_off"], off, atol=TOLERANCE)
        pairs = ((own, other), (own, off), (other, off))
        assert min(abs(left - right).max() for left, right in pairs) > 100 * TOLERANCE


def test_memory_of_an_identical_document_is_as_good_as_its_own(make, tmp_path):
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (2, 41)).tolist()
    config, model = make()
    twins, strangers = (
        evaluate(model, [save(tmp_path / name, documents)], config, group=group_of_one())
        for name, documents in (("twins", [tokens[0], tokens[0]]), ("strangers", tokens))
    )
    assert abs(twins.differences[2].loss_nats) < TOLERANCE
    assert abs(strangers.differences[2].loss_nats) > 100 * TOLERANCE


def test_only_the_memory_that_the_settings_allow_is_read(make, store, scored):
    config, model = make(memory_tokens=8)
    short = by_document(score(model, [store], config, group=group_of_one()))
    for document in DOCUMENTS:
        np.testing.assert_allclose(
            short[document].losses["memory_on"], loop(model, store, document, document), atol=TOLERANCE
        )
    assert abs(short[0].losses["memory_on"] - scored[0].losses["memory_on"]).max() > 100 * TOLERANCE


def test_without_context_the_first_segment_has_no_memory(make, store):
    config, model = make(context_tokens=0)
    one = score(model, [store], config, group=group_of_one())[0]
    first, second = one.losses["memory_on"] - one.losses["memory_off"], slice(SEGMENT, None)
    assert abs(first[:SEGMENT]).max() < TOLERANCE < abs(first[second]).max()


def test_evaluating_changes_nothing_that_training_has(make, store):
    config, model = make()
    bank = model.bank(2)
    documents = torch.zeros(2, SEGMENT, dtype=torch.int64)
    model.append(bank, model.encode(torch.ones_like(documents), documents), start=0, documents=documents)
    tensors = {**in_slot_order(bank), **model.sidenet.state_dict(), **model.backbone.state_dict()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    random = torch.get_rng_state()
    evaluate(model, [store], config, group=group_of_one())
    after = {**in_slot_order(bank), **model.sidenet.state_dict(), **model.backbone.state_dict()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.sidenet.parameters())


def test_one_document_has_no_other_to_borrow_from(make, store, caplog):
    config, model = make(documents=1)
    with caplog.at_level(logging.WARNING):
        report = evaluate(model, [store], config, group=group_of_one())
    assert "only one held-out document" in caplog.text
    assert tuple(report.conditions) == ("backbone", "memory_off", "memory_on", "longest_window")
    assert len(report.differences) == 3
    assert report.unit == "segment"


def test_without_memory_only_what_needs_none_is_scored(make, store):
    config, model = make(enabled=False)
    report = evaluate(model, [store], config, group=group_of_one())
    assert tuple(report.conditions) == ("backbone", "memory_off", "longest_window") and report.differences == []


def test_conditions_can_be_chosen(make, store, scored):
    config, model = make()
    report = evaluate(model, [store], config, group=group_of_one(), conditions=["memory_on"])
    assert tuple(report.conditions) == ("memory_on",)
    expected = sum(one.losses["memory_on"].sum() for one in scored.values()) / (5 * SCORED - 1)
    assert report.conditions["memory_on"].loss_nats == pytest.approx(expected, abs=TOLERANCE)


def test_progress_counts_every_item(make, store, capsys):
    config, model = make()
    evaluate(model, [store], config, group=group_of_one(), conditions=["backbone"])
    assert capsys.readouterr().err == ""
    evaluate(model, [store], config, group=group_of_one(), conditions=["backbone"], progress=True)
    assert "2/2" in capsys.readouterr().err  # four documents, and the fifth one with one that lends


def test_tokens_that_are_not_whole_segments_are_refused_before_any_work(make, store):
    config, model = make(context_tokens=12, scored_tokens=5)
    with pytest.raises(
        ConfigError,
        match=r"(?s)evaluation.context_tokens is not a multiple of train.segment_tokens; got: 12 and 8; "
        r"do: set evaluation.context_tokens to 8 or 16\n.*evaluation.scored_tokens .* to 8$",
    ):
        evaluate(model, [store], config, group=group_of_one())


def test_too_short_documents_are_refused(make, store):
    config, model = make(context_tokens=800)
    with pytest.raises(DataError, match="no document of the split 'validation' is long enough"):
        evaluate(model, [store], config, group=group_of_one())
