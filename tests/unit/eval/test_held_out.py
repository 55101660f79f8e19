"""Statistics against figures worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from eval.held_out import DocumentLosses, summarise

EXACT = 1e-12  # float64


def document(number, *, counts=None, **losses):
    arrays = {name: np.array(values, dtype=np.float64) for name, values in losses.items()}
    length = len(next(iter(arrays.values())))
    return DocumentLosses(number, arrays, np.array(counts or [1] * length, dtype=np.float64))


def report(*documents, **settings):
    return summarise(documents, **{"context_tokens": 6, "segment_tokens": 2, "seconds": 4.0, **settings})


def test_documents_of_equal_size():
    found = report(document(0, memory_off=[1, 3]), document(1, memory_off=[3, 5]), document(2, memory_off=[5, 7]))
    result = found.conditions["memory_off"]
    # Means of the documents 2, 4, 6: standard deviation 2.
    assert result.loss_nats == 4.0
    assert result.loss_standard_error == pytest.approx(2 / math.sqrt(3), rel=EXACT)
    assert result.perplexity == pytest.approx(math.exp(4), rel=EXACT)
    assert result.perplexity_standard_error == pytest.approx(math.exp(4) * 2 / math.sqrt(3), rel=EXACT)
    assert (found.unit, found.num_documents, found.num_tokens, found.context_tokens) == ("document", 3, 6, 6)
    assert found.tokens_per_second == 3 * (6 + 2) / 4.0


def test_a_token_without_a_target_does_not_count():
    found = report(document(0, memory_off=[2, 4]), document(1, counts=[1, 0], memory_off=[6, 0]))
    # Sums 6 and 6 of 2 and 1 tokens: mean 4; residuals 6 - 8 and 6 - 4; sqrt(2 / 1 * (4 + 4)) / 3.
    result = found.conditions["memory_off"]
    assert result.loss_nats == 4.0 and found.num_tokens == 3
    assert result.loss_standard_error == pytest.approx(4 / 3, rel=EXACT)


def test_differences_are_paired_by_document():
    found = report(
        document(0, backbone=[9, 9], memory_off=[2, 2], memory_on=[1, 2], other_memory=[2, 2]),
        document(1, backbone=[5, 5], memory_off=[8, 8], memory_on=[6.5, 8], other_memory=[8, 8]),
    )
    assert [(pair.first, pair.second) for pair in found.differences] == [
        ("memory_on", "memory_off"),
        ("memory_on", "backbone"),
        ("memory_on", "other_memory"),
    ]
    pair = found.differences[0]
    # By document -0.5 and -0.75; its error is far below those of the two conditions, which are 3 and about 2.9.
    assert pair.loss_nats == -0.625
    assert pair.loss_standard_error == pytest.approx(0.125, rel=EXACT)
    assert pair.perplexity_ratio == pytest.approx(math.exp(-0.625), rel=EXACT)
    assert pair.perplexity_ratio_standard_error == pytest.approx(math.exp(-0.625) * 0.125, rel=EXACT)
    ratio = found.conditions["memory_on"].perplexity / found.conditions["memory_off"].perplexity
    assert pair.perplexity_ratio == pytest.approx(ratio, rel=EXACT)
    # By document (3 - 18) / 2 and (14.5 - 10) / 2: -7.5 and 2.25.
    assert found.differences[1].loss_nats == -2.625
    assert found.differences[1].loss_standard_error == pytest.approx(9.75 / 2, rel=EXACT)


def test_one_document_falls_back_to_its_segments_and_says_so():
    found = report(document(7, memory_off=[1, 3, 3, 5]))
    assert found.unit == "segment" and found.num_documents == 1
    assert found.conditions["memory_off"].loss_standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2), rel=EXACT)
    assert "standard errors by segment" in found.table()


def test_one_segment_has_no_standard_error():
    found = report(document(7, memory_off=[1, 3], memory_on=[1, 1]))
    assert found.conditions["memory_off"].loss_standard_error is None
    assert found.to_dict()["conditions"]["memory_off"]["perplexity_standard_error"] is None
    row = next(line for line in found.table().splitlines() if line.startswith("(b)"))
    assert row.split()[-4:] == ["2.0000", "-", "7.39", "-"]


def test_the_order_of_documents_changes_no_bit():
    random = np.random.default_rng(0)
    documents = [document(number, memory_on=random.random(50) * 10.0**number) for number in range(9)]
    assert report(*documents) == report(*documents[::-1])


def test_plain_json_even_of_a_diverged_model():
    found = report(document(0, memory_off=[1e4]), document(1, memory_off=[float("nan")]))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["conditions"]["memory_off"]["loss_nats"] is None
    found = report(document(0, memory_off=[1e4]), document(1, memory_off=[1e4]))
    assert found.conditions["memory_off"].perplexity == math.inf


DOCUMENTS = (
    document(0, backbone=[2.1, 2.1], memory_off=[2.0, 2.0], memory_on=[1.8, 1.8], other_memory=[2.0, 2.0]),
    document(1, backbone=[2.1, 2.1], memory_off=[2.0, 2.0], memory_on=[1.7, 1.7], other_memory=[1.9, 1.9]),
)

TEXT = """\
held-out tokens                  loss (nats)    s.e.  perplexity  s.e.
-------------------------------  -----------  ------  ----------  ----
(a) backbone alone, same window       2.1000  0.0000        8.17  0.00
(b) memory off                        2.0000  0.0000        7.39  0.00
(c) memory on                         1.7500  0.0500        5.75  0.29
(d) memory of another document        1.9500  0.0500        7.03  0.35

paired difference                loss (nats)    s.e.  perplexity  s.e.
-------------------------------  -----------  ------  ----------  ----
(c) - (b), perplexity as ratio       -0.2500  0.0500       77.9%  3.9%
(c) - (a), perplexity as ratio       -0.3500  0.0500       70.5%  3.5%
(c) - (d), perplexity as ratio       -0.2000  0.0000       81.9%  0.0%

2 documents, 4 tokens scored, each document after 6 tokens of context; standard errors by document; 4 tokens/s"""


def test_the_table_as_text():
    assert report(*DOCUMENTS).table() == TEXT


def test_the_table_as_markdown():
    lines = report(*DOCUMENTS).table(markdown=True).splitlines()
    assert lines[0] == "| held-out tokens                 | loss (nats) |   s.e. | perplexity | s.e. |"
    assert lines[1] == "| ------------------------------- | ----------: | -----: | ---------: | ---: |"
    assert lines[4] == "| (c) memory on                   |      1.7500 | 0.0500 |       5.75 | 0.29 |"
    assert lines[8] == lines[1] and lines[6] == ""


def test_a_table_without_pairs_has_one_block():
    only = [replace(one, losses={"memory_off": one.losses["memory_off"]}) for one in DOCUMENTS]
    assert "difference" not in report(*only).table()
