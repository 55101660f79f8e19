"""Makes a token store of demonstrations to learn from: `python launch/prepare_demonstrations.py --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.labelled import FORMS, known_sets
from launch.preparing import count, end, path, run, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.training_documents import Source
    from pipeline.data.ending import StopSignals
    from pipeline.data.made import Made
    from pipeline.data.prepare import Prepared

MOST_DOCUMENTS = 10**6
MOST_TOKENS = 10**7


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; a signal ends the process with 128 + its number."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.in_context and not options.squad:
        parser.error("give --in-context, --squad or both")
    if bool(options.squad) != bool(options.squad_tested or options.squad_articles):
        parser.error("--squad goes with --squad-tested, --squad-articles or both: what evaluation asks is not learnt")
    if options.validation_documents and not 0 < options.validation_share < 1:
        parser.error("--validation-share must be between 0 and 1 where there are --validation-documents")

    def make(stop: StopSignals) -> Prepared:
        from pipeline.data.made import prepare_made

        per_source = options.documents + options.validation_documents
        num_sources = bool(options.in_context) * len(options.sets) + bool(options.squad)
        return prepare_made(
            partial(_documents, options),
            tokenizer=options.tokenizer,
            output=options.output,
            num_tokens=per_source * num_sources * options.document_tokens,
            append_eos=not options.no_eos,
            overwrite=options.overwrite,
            stop=stop,
        )

    return run(make)


def _documents(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Iterator[Made]]:
    """The documents by split."""
    from eval.relabelled import KINDS
    from eval.task import tokens_of
    from eval.training_documents import Wanted, documents
    from eval.training_sources import labelled_sources, squad_sources

    split: dict[str, Any] = {
        "held_out": options.validation_share if options.validation_documents else 0.0,
        "seed": options.seed,
    }
    wanted = Wanted(options.documents, options.validation_documents, options.document_tokens, options.seed)
    found: list[Mapping[str, Sequence[Source]]] = []
    if options.in_context:
        kinds = [one for one in KINDS if options.relabel_with in (one, "both")]
        found.append(labelled_sources(options.in_context, options.sets, relabel=options.relabel, kinds=kinds, **split))
    if options.squad:
        of_squad = squad_sources(
            options.squad,
            tested=options.squad_tested,
            articles=options.squad_articles,
            with_unanswerable=options.unanswerable == "asked",
            passages_first=options.passages_first,
            **split,
        )
        found.append(of_squad)
    tokenize = partial(tokens_of, tokenizer)
    return {
        name: documents(tokenize, [one for by in found for one in by[name]], wanted, name) for name in wanted.counts
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make documents of demonstrations, written as evaluation writes them into memory and window, into "
        "the store that data.path names: for each set of in-context learning, and for SQuAD. No test item is in any.",
        allow_abbrev=False,
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_NAME", help="the backbone's folder or hub name")
    parser.add_argument("--output", required=True, metavar="DIR", type=path, help="folder to make")
    sets = parser.add_argument_group("in-context learning")
    sets.add_argument(
        "--in-context", nargs="+", default=(), metavar="DATA", help="folders with the sets, hub, or SET=NAME on the hub"
    )
    sets.add_argument(
        "--sets",
        nargs="+",
        default=tuple(FORMS),
        type=_set,
        metavar="SET",
        help=f"of {', '.join(FORMS)} (default: all)",
    )
    sets.add_argument(
        "--relabel",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of the documents whose labels are other words, to be known from earlier ones alone (default: 0.5)",
    )
    sets.add_argument(
        "--relabel-with",
        choices=("both", "permuted", "symbols"),
        default="both",
        help="the set's own words, permuted; symbols: numbers, nouns, syllables; or both in turns (default: both)",
    )
    squad = parser.add_argument_group("SQuAD")
    squad.add_argument("--squad", metavar="FILE", help="file of SQuAD v1.1 or v2.0")
    squad.add_argument("--squad-tested", metavar="FILE", help="evaluation's file: no article of it is taken")
    squad.add_argument(
        "--squad-articles",
        nargs="+",
        default=(),
        metavar="TITLE",
        help="take these articles only; evaluation of the same file must --squad.leave_out them",
    )
    squad.add_argument(
        "--unanswerable",
        choices=("asked", "left_out"),
        default="asked",
        help="what is done with questions without answer (default: asked)",
    )
    squad.add_argument(
        "--passages-first",
        type=share,
        default=0.5,
        metavar="SHARE",
        help="share of the documents whose passages all stand before all questions (default: 0.5)",
    )
    both = parser.add_argument_group("documents")
    both.add_argument(
        "--documents",
        type=_within(1, MOST_DOCUMENTS),
        default=40,
        metavar="N",
        help="of each set and of SQuAD (default: 40)",
    )
    both.add_argument(
        "--validation-documents",
        type=_within(0, MOST_DOCUMENTS),
        default=4,
        metavar="N",
        help="further ones, made of sentences and passages that no other document has (default: 4)",
    )
    both.add_argument(
        "--validation-share", type=share, default=0.1, metavar="SHARE", help="of sentences and passages (default: 0.1)"
    )
    both.add_argument(
        "--document-tokens",
        type=_within(1, MOST_TOKENS),
        default=12000,
        metavar="N",
        help="of a document at most, in whole demonstrations (default: 12000)",
    )
    both.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-text token")
    both.add_argument("--seed", type=count, default=1234, metavar="S", help="default: 1234")
    both.add_argument("--overwrite", action="store_true", help="replace a store that exists, and nothing else")
    return parser


def _set(text: str) -> str:
    try:
        return known_sets([text])[0]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _within(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        found = count(text)
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]} is not from {least:,} to {most:,}")
        return found

    return number


def program() -> None:
    """The command `longmem-prepare-demonstrations`."""
    end(main())


if __name__ == "__main__":
    program()
