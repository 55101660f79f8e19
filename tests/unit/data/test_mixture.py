"""Lanes of several sources, against a slow schedule. A token says where it is from: source, document, position."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.deal import deal
from pipeline.data.lanes import Lanes
from pipeline.errors import DataError

ROUNDING = 1e-6  # of sums of shares in float64, tokens


class Documents:
    def __init__(self, source, lengths):
        self.source = source
        self.lengths = np.array(lengths, dtype=np.int64)

    def tokens(self, document, start=0, stop=None):
        whole = np.arange(self.lengths[document], dtype=np.int64)
        return (self.source * 10**6 + document * 1000 + whole)[start:stop]


def make(sources, weights, *, num_lanes=1, lanes=None, segment_tokens=5, seed=7, context_tokens=0):
    return Lanes(
        [Documents(number, lengths) for number, lengths in enumerate(sources)],
        weights=weights,
        num_lanes=num_lanes,
        lanes=range(num_lanes) if lanes is None else lanes,
        segment_tokens=segment_tokens,
        seed=seed,
        context_tokens=context_tokens,
    )


def slow_schedule(sources, weights, *, num_lanes, lane, seed, tokens):
    """(source, document) one after another: always the source whose next document is due first."""
    dealt = [deal(one, num_lanes=num_lanes, seed=seed, source=number)[lane] for number, one in enumerate(sources)]
    shares = [weight / sum(weights) for weight in weights]
    fractions = np.random.default_rng([seed, 3, lane]).random(len(sources))
    waiting: list[list[int]] = [[] for _ in sources]
    read, epochs, order = [0] * len(sources), [0] * len(sources), []
    while sum(read) < tokens:
        for number, documents in enumerate(waiting):
            if not documents:
                seeds = [seed, 2, lane, epochs[number]] + [number] * (number > 0)
                documents += np.random.default_rng(seeds).permutation(dealt[number]).tolist()
                epochs[number] += 1
        nexts = [sources[number][documents[0]] for number, documents in enumerate(waiting)]
        due = [(read[s] + fractions[s] * nexts[s]) / shares[s] for s in range(len(sources))]
        first = due.index(min(due))
        order.append((first, waiting[first].pop(0)))
        read[first] += nexts[first]
    return order, shares, fractions


@st.composite
def jobs(draw):
    num_sources = draw(st.integers(1, 4))
    lengths = st.one_of(st.integers(1, 20), st.integers(1, 90))
    sources = [draw(st.lists(lengths, min_size=3, max_size=9)) for _ in range(num_sources)]
    weights = [draw(st.sampled_from([1e-2, 0.3, 1, 1, 2, 3.7, 40])) for _ in sources]
    return {
        "sources": sources,
        "weights": weights,
        "num_lanes": draw(st.integers(1, 3)),
        "segment_tokens": draw(st.integers(1, 40)),
        "seed": draw(st.sampled_from([0, 1, 7, 2**40])),
    }


def rows_of(segments, name):
    return np.concatenate([getattr(segment, name) for segment in segments], axis=1)


def assert_equal(left, right):
    for name in ("tokens", "targets", "documents", "context_tokens", "context_documents", "start"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(job=jobs())
def test_a_lane_reads_what_is_due_first_whole_documents_each_with_a_number_of_its_own(job):
    lanes = make(**job)
    num_tokens = 600
    segments = [lanes.next_segment() for _ in range(-(-num_tokens // job["segment_tokens"]))]
    tokens, documents, targets = (rows_of(segments, name) for name in ("tokens", "documents", "targets"))
    seen = set()
    for lane in range(job["num_lanes"]):
        order, _, _ = slow_schedule(
            job["sources"], job["weights"], num_lanes=job["num_lanes"], lane=lane, seed=job["seed"], tokens=num_tokens
        )
        place = 0
        for ordinal, (source, document) in enumerate(order):
            length = min(job["sources"][source][document], tokens.shape[1] - place)
            expected = source * 10**6 + document * 1000 + np.arange(job["sources"][source][document])
            here = slice(place, place + length)
            np.testing.assert_array_equal(tokens[lane, here], expected[:length])
            np.testing.assert_array_equal(targets[lane, here], np.append(expected[1:], -100)[:length])
            number = ordinal * job["num_lanes"] + lane
            assert (documents[lane, here] == number).all() and number not in seen
            seen.add(number)
            place += length


@settings(max_examples=40, deadline=None)
@given(job=jobs(), data=st.data())
def test_shares_are_kept_over_any_stretch(job, data):
    """To the bounds that `mixture.py` gives, at the ends of documents; twice that between two of them."""
    job["num_lanes"], num_tokens = 1, 4000
    order, shares, fractions = slow_schedule(
        job["sources"], job["weights"], num_lanes=1, lane=0, seed=job["seed"], tokens=num_tokens
    )
    read = np.zeros((len(order) + 1, len(shares)))
    for at, (source, document) in enumerate(order):
        read[at + 1] = read[at]
        read[at + 1, source] += job["sources"][source][document]
    ahead = read - read.sum(axis=1, keepdims=True) * shares
    share, longest = np.array(shares), np.array([max(lengths) for lengths in job["sources"]], dtype=float)

    def bound(fraction):
        others = ((1 - fraction) * longest).sum() - (1 - fraction) * longest
        return (1 - share) * fraction * longest + share * others + ROUNDING

    behind_bound, ahead_bound = bound(fractions), bound(1 - fractions)
    assert (-ahead <= behind_bound).all() and (ahead <= ahead_bound).all()
    first, last = sorted(data.draw(st.lists(st.integers(0, len(order)), min_size=2, max_size=2)))
    assert (abs(ahead[last] - ahead[first]) <= behind_bound + ahead_bound).all()


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [1, 1, 2]])
def test_no_source_is_much_more_than_its_longest_document_behind(weights):
    random = np.random.default_rng(0)
    sources = [random.integers(10, 100, 40).tolist() for _ in weights]
    shares = np.array(weights) / sum(weights)
    lanes = make(sources, weights, num_lanes=4, segment_tokens=64)
    apart = [make(sources, weights, num_lanes=4, lanes=[lane], segment_tokens=64) for lane in range(4)]
    for _ in range(200):
        lanes.next_segment()
        for one in apart:
            one.skip(1)
            read = np.array(one.tokens_of_sources())
            assert (read.sum() * shares - read <= 1.5 * 100).all()
        assert lanes.tokens_of_sources() == np.sum([one.tokens_of_sources() for one in apart], axis=0).tolist()


def test_lanes_do_not_all_begin_with_the_same_source():
    sources = [[10] * 64, [10] * 64]
    for weights, least in (([1, 1], 20), ([3, 1], 4)):
        lanes = make(sources, weights, num_lanes=64, segment_tokens=1)
        firsts = lanes.next_segment().tokens[:, 0] // 10**6
        assert least <= firsts.sum() <= 44, weights


@settings(max_examples=40, deadline=None)
@given(job=jobs(), context_tokens=st.integers(0, 60), moves=st.lists(st.integers(-80, 80), max_size=8))
def test_wherever_lanes_are_put_they_read_what_reading_on_would(job, context_tokens, moves):
    """On and back by skips, and by states as JSON, across sources and epochs; context is what came before."""
    unbroken = make(**job)
    segments = [unbroken.next_segment() for _ in range(100)]
    tokens, documents = rows_of(segments, "tokens"), rows_of(segments, "documents")
    lanes, length = make(**job, context_tokens=context_tokens), job["segment_tokens"]
    for move in moves:
        lanes.skip(min(max(-lanes.index, move), 98 - lanes.index))
        other = make(**job, context_tokens=context_tokens)
        other.load_state_dict(json.loads(json.dumps(lanes.state_dict())))
        assert other.tokens_of_sources() == lanes.tokens_of_sources()
        assert sum(lanes.tokens_of_sources()) == lanes.index * length * job["num_lanes"]
        start = lanes.index * length
        found = lanes.next_segment()
        assert_equal(found, other.next_segment())
        before = slice(max(0, start - context_tokens), start)
        np.testing.assert_array_equal(found.tokens, tokens[:, start : start + length])
        np.testing.assert_array_equal(found.documents, documents[:, start : start + length])
        np.testing.assert_array_equal(found.context_tokens, tokens[:, before])
        np.testing.assert_array_equal(found.context_documents, documents[:, before])


def test_lanes_go_far_without_what_lies_between():
    job = {"sources": [[9, 30, 4, 11] * 50, [3, 5], [100, 1000]], "weights": [5, 2, 3], "num_lanes": 2}
    lanes = make(**job)
    lanes.skip(10**9)
    read = lanes.tokens_of_sources()
    assert sum(read) == 2 * 5 * 10**9
    np.testing.assert_allclose(np.array(read) / sum(read), [0.5, 0.2, 0.3], atol=1e-6)
    again = make(**job)
    again.load_state_dict(lanes.state_dict())
    assert_equal(again.next_segment(), lanes.next_segment())
    again.skip(-(10**9) - 1)
    assert_equal(again.next_segment(), make(**job).next_segment())


def test_splitting_lanes_over_ranks_changes_nothing_and_states_join():
    job = {"sources": [[9, 3, 14, 2, 5, 8, 1], [40, 60, 50], [7] * 5], "weights": [1, 2, 0.5], "num_lanes": 3}
    together, apart = make(**job), [make(**job, lanes=[lane]) for lane in range(3)]
    for _ in range(80):
        whole = together.next_segment()
        for lane, own in enumerate(apart):
            part = own.next_segment()
            for name in ("tokens", "targets", "documents"):
                np.testing.assert_array_equal(getattr(part, name)[0], getattr(whole, name)[lane])
    states = [own.state_dict() for own in apart]
    joined = {**states[0], "lanes": {key: mark for state in states for key, mark in state["lanes"].items()}}
    assert joined == together.state_dict()
    fresh = make(**job, lanes=[1, 2])
    fresh.load_state_dict(joined)
    np.testing.assert_array_equal(fresh.next_segment().tokens, together.next_segment().tokens[1:])


DOCUMENTS = "3dec028ff53eb2f5ea60f73f1851b742ac0588001b0cf0435b49ef56436a3119"


@pytest.mark.parametrize(
    ("seed", "digest", "last_offset"),
    [
        (7, "6d30f9567236639cfe159b1c126bf1c6afa3ba438d46596fd9e0810e2699c810", 1),
        (2**40 + 3, "70a1f9f189458797d0e707a1f0e8866edcabbcb25b6cddc7050e24d313b69fe9", 5),
    ],
)
def test_one_source_is_read_as_before_there_were_mixtures(seed, digest, last_offset):
    """What was recorded with the lanes of one source that version 0.1.0 began with: streams, and a state."""
    lengths = [9, 3, 14, 2, 5, 8, 1, 30, 7, 12, 4]
    lanes = make([lengths], None, num_lanes=3, segment_tokens=7, seed=seed, context_tokens=11)
    found = hashlib.sha256()
    for _ in range(60):
        segment = lanes.next_segment()
        for name in ("tokens", "targets", "documents", "context_tokens", "context_documents"):
            found.update(getattr(segment, name).astype("<i8").tobytes())
    assert found.hexdigest() == digest
    lanes.skip(-19)
    marks = [(17, 29), (44, 13), (37, last_offset)]
    assert lanes.state_dict() == {
        "index": 41,
        "lanes": {str(lane): {"ordinal": mark[0], "offset": mark[1]} for lane, mark in enumerate(marks)},
        "fingerprint": {"num_lanes": 3, "segment_tokens": 7, "seed": seed, "documents": DOCUMENTS},
    }


def test_weights_count_against_each_other():
    job = {"sources": [[9, 3, 5], [4, 4]]}
    by_three, by_six = make(**job, weights=[3, 1]), make(**job, weights=[6, 2])
    assert by_three.state_dict() == by_six.state_dict()
    assert make(**job, weights=None).state_dict() == make(**job, weights=[2, 2]).state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [2, 1]},
        {"sources": [[9, 3, 5], [4, 5]]},
        {"sources": [[4, 4], [9, 3, 5]]},
        {"sources": [[9, 3, 5]], "weights": [1]},
        {"sources": [[9, 3, 5], [4, 4], [4, 4]], "weights": [1, 1, 1]},
    ],
)
def test_a_state_of_other_sources_or_weights_is_an_error(change):
    job = {"sources": [[9, 3, 5], [4, 4]], "weights": [1, 1]}
    for first, second in ((job, job | change), (job | change, job)):
        with pytest.raises(DataError, match="comes from other data or settings.*documents.*use the data.path .or data"):
            make(**first).load_state_dict(make(**second).state_dict())


def test_a_state_outside_of_all_documents_is_an_error():
    lanes = make([[9, 3, 5], [4, 4]], [1, 2])
    for ordinal, offset in ((3, 9), (2**53, 9), (-1, 0), (0, -1)):
        state = lanes.state_dict() | {"lanes": {"0": {"ordinal": ordinal, "offset": offset}}}
        with pytest.raises(DataError, match=f"outside a document.*lane 0, document {ordinal}, token {offset}"):
            lanes.load_state_dict(state)


def test_every_source_needs_as_many_documents_as_there_are_lanes():
    with pytest.raises(DataError, match="more lanes than documents.*data.lanes 3, 2 documents"):
        make([[9, 3, 5], [4, 4]], [1, 1], num_lanes=3)
