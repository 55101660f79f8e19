"""Lanes against documents whose tokens say where they come from: token = document * 1000 + position."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.deal import check_documents, deal
from pipeline.data.lanes import IGNORED_TARGET, Lanes, Segment
from pipeline.errors import DataError


class Documents:
    """Documents in memory that count how many tokens were asked for."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.num_read = 0

    def tokens(self, document, start=0, stop=None):
        whole = document * 1000 + np.arange(self.lengths[document], dtype=np.int64)
        self.num_read += len(whole[start:stop])
        return whole[start:stop]


def make(lengths, *, num_lanes=1, lanes=None, segment_tokens=4, seed=7, context_tokens=0):
    chosen = range(num_lanes) if lanes is None else lanes
    return Lanes(
        [Documents(lengths)],
        num_lanes=num_lanes,
        lanes=chosen,
        segment_tokens=segment_tokens,
        seed=seed,
        context_tokens=context_tokens,
    )


def assert_equal(left: Segment, right: Segment):
    assert left.start == right.start
    for name in ("tokens", "targets", "documents"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


JOBS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 20), min_size=3, max_size=9),
        "num_lanes": st.integers(1, 3),
        "segment_tokens": st.integers(1, 13),
        "seed": st.integers(0, 5),
    }
)


@settings(max_examples=40, deadline=None)
@given(job=JOBS, context_tokens=st.integers(1, 30), size=st.integers(1, 3))
def test_context_is_what_came_before_in_the_lane_whoever_read_it(job, context_tokens, size):
    """Ranks of a group read segments in turn; each is given the tokens before its own, over documents and epochs."""
    length = job["segment_tokens"]
    plain = make(**job)
    segments = [plain.next_segment() for _ in range(12)]
    tokens, documents = (
        np.concatenate([getattr(segment, name) for segment in segments], axis=1) for name in ("tokens", "documents")
    )
    for rank in range(size):
        lanes = make(**job, context_tokens=context_tokens)
        for index in range(rank, 12, size):
            found = lanes.next_of_group(rank, size)
            assert_equal(found, segments[index])
            before = slice(max(0, index * length - context_tokens), index * length)
            np.testing.assert_array_equal(found.context_tokens, tokens[:, before])
            np.testing.assert_array_equal(found.context_documents, documents[:, before])


@settings(max_examples=60, deadline=None)
@given(job=JOBS)
def test_a_lane_is_its_documents_whole_and_in_order_epoch_after_epoch(job):
    lengths, num_lanes = job["lengths"], job["num_lanes"]
    lanes = make(**job)
    num_segments = 3 * sum(lengths) // job["segment_tokens"] + 2  # every lane ends its second epoch
    segments = [lanes.next_segment() for _ in range(num_segments)]
    dealt = deal(lengths, num_lanes=num_lanes, seed=job["seed"])
    assert sorted(document for documents in dealt for document in documents) == list(range(len(lengths)))
    for lane in range(num_lanes):
        stream = [
            entry
            for segment in segments
            for entry in zip(
                segment.tokens[lane].tolist(),
                segment.targets[lane].tolist(),
                segment.documents[lane].tolist(),
                strict=True,
            )
        ]
        read: list[int] = []
        place = 0
        while place < len(stream):
            document = stream[place][0] // 1000
            for position in range(lengths[document]):
                if place == len(stream):
                    break
                token = document * 1000 + position
                target = token + 1 if position + 1 < lengths[document] else IGNORED_TARGET
                assert stream[place] == (token, target, len(read) * num_lanes + lane)
                place += 1
            read.append(document)
        num_own = len(dealt[lane])
        assert len(read) > 2 * num_own
        for epoch in range(2):
            assert sorted(read[epoch * num_own : (epoch + 1) * num_own]) == dealt[lane].tolist()


@settings(max_examples=40, deadline=None)
@given(job=JOBS, before=st.integers(0, 12), after=st.integers(1, 6))
def test_resuming_from_the_state_as_json_equals_not_stopping(job, before, after):
    unbroken = make(**job)
    for _ in range(before):
        unbroken.next_segment()
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = make(**job)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(after):
        assert_equal(resumed.next_segment(), unbroken.next_segment())


@settings(max_examples=40, deadline=None)
@given(job=JOBS, before=st.integers(0, 5), skipped=st.integers(0, 60))
def test_skipping_equals_reading_and_reads_no_token(job, before, skipped):
    read, skipping = make(**job), make(**job)
    for _ in range(before + skipped):
        read.next_segment()
    for _ in range(before):
        skipping.next_segment()
    num_read = skipping._rows[0]._sources[0].num_read
    skipping.skip(skipped)
    assert skipping._rows[0]._sources[0].num_read == num_read
    assert skipping.state_dict() == read.state_dict()
    assert_equal(skipping.next_segment(), read.next_segment())


@settings(max_examples=40, deadline=None)
@given(job=JOBS, before=st.integers(0, 60), back=st.integers(0, 60))
def test_going_back_is_undone_by_reading_again_and_reads_no_token(job, before, back):
    back = min(back, before)
    lanes, unbroken = make(**job), make(**job)
    lanes.skip(before)
    lanes.skip(-back)
    assert lanes._rows[0]._sources[0].num_read == 0
    for _ in range(before - back):
        unbroken.next_segment()
    assert lanes.index == before - back
    assert lanes.state_dict() == unbroken.state_dict()
    assert_equal(lanes.next_segment(), unbroken.next_segment())


def test_the_ranks_of_a_group_read_consecutive_segments():
    ranks, alone = [make([9, 3, 14, 2]) for _ in range(3)], make([9, 3, 14, 2])
    for _ in range(2):
        for rank, lanes in enumerate(ranks):
            assert_equal(lanes.next_of_group(rank, 3), alone.next_segment())
    assert all(lanes.state_dict() == alone.state_dict() for lanes in ranks)


def test_splitting_lanes_over_ranks_changes_nothing():
    lengths = [9, 3, 14, 2, 5, 8, 1]
    together = make(lengths, num_lanes=3)
    apart = [make(lengths, num_lanes=3, lanes=[lane]) for lane in range(3)]
    for _ in range(40):
        whole = together.next_segment()
        for lane, own in enumerate(apart):
            part = own.next_segment()
            for name in ("tokens", "targets", "documents"):
                np.testing.assert_array_equal(getattr(part, name)[0], getattr(whole, name)[lane])


def test_states_of_ranks_join_to_the_state_of_one_rank():
    lengths = [9, 3, 14, 2, 5, 8, 1]
    together = make(lengths, num_lanes=2)
    apart = [make(lengths, num_lanes=2, lanes=[lane]) for lane in range(2)]
    for lanes in (together, *apart):
        lanes.skip(5)
    states = [lanes.state_dict() for lanes in apart]
    joined = {**states[0], "lanes": {**states[0]["lanes"], **states[1]["lanes"]}}
    assert joined == together.state_dict()
    fresh = make(lengths, num_lanes=2, lanes=[1])
    fresh.load_state_dict(together.state_dict())
    assert_equal(fresh.next_segment(), apart[1].next_segment())


def test_a_segment_by_hand():
    lanes = make([3, 2], segment_tokens=4)
    segment = lanes.next_segment()
    first = int(segment.tokens[0, 0] // 1000)
    expected = {
        0: ([0, 1, 2, 1000], [1, 2, -100, 1001], [0, 0, 0, 1]),
        1: ([1000, 1001, 0, 1], [1001, -100, 1, 2], [0, 0, 1, 1]),
    }[first]
    got = (segment.tokens, segment.targets, segment.documents)
    assert tuple(array[0].tolist() for array in got) == expected
    assert all(array.dtype == np.int64 and array.shape == (1, 4) for array in got)
    assert (segment.start, lanes.next_segment().start) == (0, 4)


def test_every_epoch_and_every_seed_has_its_own_order():
    def order(lanes):
        return lanes.next_segment().tokens[0].tolist()  # documents of one token: a segment of 12 is an epoch

    lanes = make([1] * 12, segment_tokens=12)
    orders = [order(lanes), order(lanes), order(make([1] * 12, segment_tokens=12, seed=8))]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert order(make([1] * 12, segment_tokens=12)) == orders[0]


def test_the_deal_by_hand():
    # 5 to lane 0, 4 to lane 1, a 3 to lane 1 (7), a 3 to lane 0 (8), the last 3 to lane 1 (10).
    for seed in range(8):
        dealt = deal([3, 5, 3, 4, 3], num_lanes=2, seed=seed)
        assert [1 in dealt[0], 3 in dealt[1]] == [True, True]
        assert [len(documents) for documents in dealt] == [2, 3]


def test_the_seed_decides_between_documents_of_equal_length():
    first, second = (deal([7] * 20, num_lanes=4, seed=seed) for seed in (0, 1))
    assert [documents.tolist() for documents in first] != [documents.tolist() for documents in second]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 500), min_size=4, max_size=40), num_lanes=st.integers(1, 4))
def test_the_deal_is_balanced_to_one_document(lengths, num_lanes):
    fills = [sum(lengths[document] for document in own) for own in deal(lengths, num_lanes=num_lanes, seed=3)]
    assert max(fills) - min(fills) <= max(lengths)
    assert min(fills) > 0


def test_more_lanes_than_documents_is_an_error():
    message = "more lanes than documents.*data.lanes 3, 2 documents.*lower data.lanes to at most 2"
    with pytest.raises(DataError, match=message):
        make([5, 6], num_lanes=3)
    with pytest.raises(DataError, match=message):
        check_documents(np.array([5, 6]), name="data/books", chunk_size=4, num_lanes=3)


def test_documents_shorter_than_a_chunk_are_an_error():
    check_documents(np.array([4, 9]), name="data/books", chunk_size=4, num_lanes=2)
    message = "2 of 3 documents are shorter than a chunk.*data/books, the shortest has 1 tokens.*--min-tokens 4"
    with pytest.raises(DataError, match=message):
        check_documents(np.array([3, 9, 1]), name="data/books", chunk_size=4, num_lanes=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "'seed': 8.*'seed': 7"),
        ({"num_lanes": 2, "lanes": [0]}, "num_lanes"),
        ({"segment_tokens": 8}, "segment_tokens"),
        ({"lengths": [9, 3, 4]}, "documents"),
    ],
)
def test_a_state_of_other_data_or_settings_is_an_error(change, named):
    job = {"lengths": [9, 3, 5]}
    with pytest.raises(DataError, match=f"comes from other data or settings.*{named}"):
        make(**job).load_state_dict(make(**(job | change)).state_dict())


def test_a_malformed_state_is_an_error():
    lanes = make([9, 3, 5], num_lanes=2)
    state = lanes.state_dict()
    one_lane = {"0": {"ordinal": 0, "offset": 0}}
    for broken in (dict[str, object](), state | {"index": None}, state | {"lanes": one_lane}):
        with pytest.raises(DataError, match="malformed or lacks a lane"):
            lanes.load_state_dict(broken)
    for ordinal, offset in ((0, 99), (-1, 0), (0, -1)):
        outside = state | {"lanes": state["lanes"] | {"0": {"ordinal": ordinal, "offset": offset}}}
        with pytest.raises(DataError, match=f"outside a document.*lane 0, document {ordinal}, token {offset}"):
            lanes.load_state_dict(outside)
