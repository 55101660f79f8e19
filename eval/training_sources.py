"""What documents to train on are made of: demonstrations, without anything that evaluation asks about."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from eval.demonstrations import in_order, pool_of
from eval.labelled import Example, as_compared, as_compared_over_sets, read_set, sets_in
from eval.relabelled import KINDS, Kind
from eval.runner import EvaluationError
from eval.tasks.squad.file import answerable, of_articles, read_passages
from eval.tasks.squad.form import demonstrations_of
from eval.training_documents import ROUNDING, TRAIN, VALIDATION, Answered, Labelled

logger = logging.getLogger(__name__)


def labelled_sources(
    data: Sequence[str],
    names: Sequence[str],
    *,
    held_out: float,
    seed: int,
    relabel: float = 0.0,
    kinds: Sequence[Kind] = KINDS,
) -> Mapping[str, Sequence[Labelled]]:
    """The sets of in-context learning, without test items: their own, and those of every other set in the data.

    Args:
        data: As for `read_set`.
        names: The sets.
        held_out: Share of the sentences that only documents to validate with have; 0: there are none.
        seed: Chooses these.
        relabel: Share of the documents whose labels are other words.
        kinds: Which, in turns.

    Returns:
        Sources by split.

    Raises:
        LongMemError: A set cannot be read, or nothing is left of it.
    """
    found = {name: read_set(name, data) for name in dict.fromkeys([*names, *sets_in(data)])}
    tested = {as_compared_over_sets(one.text) for labelled in found.values() for one in labelled.test}
    pools: dict[str, list[Example]] = {}
    for name in names:
        pool = pool_of(found[name], refuse=False)
        pools[name] = [one for one in pool.examples if as_compared_over_sets(one.text) not in tested]
        if not pools[name]:
            raise EvaluationError(
                f"nothing is left of {name} to train on",
                got=f"{len(pool.examples)} sentences, all of them test items of a set in the data",
                do=f"leave {name} out of --sets",
            )
        if also := len(pool.examples) - len(pools[name]):
            logger.info("%s: %d more are test items of other sets, or in other writing, and were left out", name, also)
    apart = _chosen((as_compared_over_sets(one.text) for left in pools.values() for one in left), held_out, seed)
    splits: dict[str, list[Labelled]] = {TRAIN: [], VALIDATION: []} if held_out else {TRAIN: []}
    for split, sources in splits.items():
        for name, left in pools.items():
            own = [one for one in left if (as_compared_over_sets(one.text) in apart) == (split == VALIDATION)]
            sources.append(Labelled(name, found[name].form, own, relabel, kinds))
    return splits


def squad_sources(
    path: str,
    *,
    tested: str | None,
    articles: Sequence[str],
    held_out: float,
    seed: int,
    with_unanswerable: bool = True,
    passages_first: float = 0.0,
) -> Mapping[str, Sequence[Answered]]:
    """Questions of SQuAD on articles that evaluation does not ask about.

    Args:
        path: The file.
        tested: The file that evaluation asks about, no article or passage of which is taken; None: all other articles
            of the same file.
        articles: Titles of the articles that are taken; none: all.
        held_out: Share of the passages that only documents to validate with have; 0: there are none.
        seed: Chooses these.
        with_unanswerable: Whether questions without answer are taken.
        passages_first: Share of the documents whose passages all stand before all questions.

    Returns:
        Sources by split.

    Raises:
        LongMemError: A file cannot be read, has no such article, or nothing is left.
    """
    every = read_passages(path)
    chosen = of_articles(every, articles) if articles else every
    taken_titles = {one.title for one in chosen}
    asked = read_passages(tested) if tested else [one for one in every if one.title not in taken_titles]
    titles, texts = {one.title for one in asked if one.title}, {as_compared(one.text) for one in asked}
    left = [one for one in chosen if one.title not in titles and as_compared(one.text) not in texts]
    left = left if with_unanswerable else answerable(left)
    if not left:
        raise EvaluationError(
            f"no passage of {path} is left to train on",
            got=f"{len(chosen)} passages of {len(taken_titles)} articles, all of which evaluation asks about"
            + ("" if with_unanswerable else ", or without an answer"),
            do="name a file of other articles, or with --squad-articles some that evaluation leaves out",
        )
    apart = _chosen((as_compared(one.text) for one in left), held_out, seed)
    splits: dict[str, list[Answered]] = {}
    for split in (TRAIN, VALIDATION) if held_out else (TRAIN,):
        own = [one for one in left if (as_compared(one.text) in apart) == (split == VALIDATION)]
        splits[split] = [Answered(demonstrations_of(own), passages_first)]
    return splits


def _chosen(texts: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """A share of different texts, rounded up."""
    unique = list(dict.fromkeys(texts))
    return frozenset(in_order(unique, seed)[: ceil(len(unique) * share - ROUNDING)])
