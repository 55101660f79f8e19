"""Dealing whole documents to lanes."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from pipeline.data.mixture import Int64Array
from pipeline.errors import DataError

_DEAL_STREAM = 1  # keeps the seeds of the deal apart from those of mixture.py


def deal(lengths: npt.ArrayLike, *, num_lanes: int, seed: int, source: int = 0) -> list[Int64Array]:
    """Deal whole documents of a source to lanes, balanced by tokens: the longest first, each to the least full lane.

    Args:
        lengths: Tokens of each document, ``[num_documents]``, at least 1 each.
        num_lanes: Number of lanes of the whole job.
        seed: Decides between documents of equal length.
        source: Number of the source; the first is dealt as if it were alone.

    Returns:
        For each lane its document numbers, int64, ascending.

    Raises:
        DataError: There are more lanes than documents.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    _check_enough(len(counts), num_lanes)
    seeds = [seed, _DEAL_STREAM, *([source] if source else [])]
    shuffled = np.random.default_rng(seeds).permutation(len(counts))
    longest_first = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    fill = [(0, lane) for lane in range(num_lanes)]
    dealt: list[list[int]] = [[] for _ in range(num_lanes)]
    for document in longest_first.tolist():
        tokens, lane = fill[0]
        dealt[lane].append(document)
        heapq.heapreplace(fill, (tokens + int(counts[document]), lane))
    return [np.array(sorted(documents), dtype=np.int64) for documents in dealt]


def check_documents(lengths: Int64Array, *, name: str, chunk_size: int, num_lanes: int) -> None:
    """Check that the documents of a source can be dealt to lanes and remembered.

    Args:
        lengths: Tokens of each document of a source.
        name: What to call the source.
        chunk_size: Tokens of a chunk of memory.
        num_lanes: Number of lanes of the whole job.

    Raises:
        DataError: A document is shorter than a chunk, or there are fewer documents than lanes.
    """
    num_short = int((lengths < chunk_size).sum())
    if num_short:
        raise DataError(
            f"{num_short} of {len(lengths)} documents are shorter than a chunk of memory",
            got=f"{name}, the shortest has {lengths.min()} tokens",
            expected=f"at least memory.chunk_size, {chunk_size} tokens",
            do=f"prepare the data again with --min-tokens {chunk_size}",
        )
    _check_enough(len(lengths), num_lanes, f" of {name}")


def _check_enough(num_documents: int, num_lanes: int, of: str = "") -> None:
    if num_documents < num_lanes:
        raise DataError(
            "there are more lanes than documents to deal to them",
            got=f"data.lanes {num_lanes}, {num_documents} documents{of}",
            do=f"lower data.lanes to at most {num_documents}, or prepare more documents",
        )
