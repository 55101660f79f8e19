"""Remembers files and answers: `launch/generate.py --model DIR --remember FILES --prompt TEXT`; `--help`.

Without a prompt it holds a dialogue, a line a turn. Ctrl-C ends an answer, Ctrl-D the dialogue.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained
from pipeline.config.output import readers_may_leave

if TYPE_CHECKING:
    from pipeline.face import LongMemForCausalLM, Memory
    from pipeline.face.talking import Talk

_OF_SAMPLES = ("temperature", "top_p", "seed")
_CHUNKS_SHOWN = 5
_INTERRUPTED = 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description="Remembers files, then answers a prompt, or holds a dialogue, a line a turn. Ctrl-C ends an "
        "answer, Ctrl-D the dialogue. Turns that no longer fit the window are remembered, too.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what launch/export.py or save_pretrained wrote")
    parser.add_argument("--backbone", metavar="PATH", help="its folder or hub name, if not the one named in the model")
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--remember", nargs="+", type=Path, default=[], metavar="FILE", help="texts in UTF-8, each a document"
    )
    memory.add_argument(
        "--memory", nargs="+", type=Path, default=[], metavar="FILE", help="saved memories, before the files"
    )
    memory.add_argument("--save-memory", type=Path, metavar="FILE", help="keep memories and files in one memory")
    memory.add_argument("--no-memory", action="store_true", help="read the window alone: for comparison")
    memory.add_argument("--show", action="store_true", help="print after an answer what it looked up")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--prompt", metavar="TEXT", help="what is answered; without it a dialogue is read")
    answers.add_argument("--plain", action="store_true", help="go on with the text, without a chat template")
    answers.add_argument("--max-new-tokens", type=_at_least_one, default=256, metavar="N", help="default %(default)s")
    answers.add_argument("--sample", action="store_true", help="draw tokens, instead of the likeliest")
    answers.add_argument("--temperature", type=_positive, metavar="X", help="of samples; default 1")
    answers.add_argument("--top-p", type=_share, metavar="X", help="of samples; default 1: all tokens")
    answers.add_argument("--seed", type=int, metavar="N", help="of samples; default: another one each time")
    options = parser.parse_args(arguments)
    asked = [name for name in _OF_SAMPLES if getattr(options, name) is not None]
    if asked and not options.sample:
        parser.error(f"argument --{asked[0].replace('_', '-')}: means nothing without --sample")
    given = bool(options.remember or options.memory)
    if options.no_memory and (given or options.show):
        parser.error("argument --no-memory: there is nothing to read or to show then")
    if options.save_memory is not None and not given:
        parser.error("argument --save-memory: give --remember or --memory: there is nothing to save")
    return options


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, remembers, answers."""
    options = parse(arguments)
    # Loaded after the command line is known to be right: these imports take seconds.
    import torch

    from pipeline.errors import DataError
    from pipeline.face import LongMemForCausalLM
    from pipeline.face.given import texts_of_files
    from pipeline.face.talking import Talk

    if options.prompt is not None and not options.prompt.strip():
        raise DataError("the prompt is empty", got=repr(options.prompt), do="write something, or leave --prompt out")
    texts = texts_of_files(options.remember)
    model = LongMemForCausalLM.from_pretrained(options.model, backbone=options.backbone)
    tokenizer = model.own_tokenizer()
    memories = _memories(options, model, tokenizer, texts)
    talk = Talk(model, tokenizer, memories, reads_memory=not options.no_memory, is_plain=options.plain)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    turns = [options.prompt] if options.prompt is not None else _lines()
    with readers_may_leave():
        for text in turns:
            _answer(options, talk, tokenizer, text)


def _memories(options: argparse.Namespace, model: LongMemForCausalLM, tokenizer: Any, texts: dict[str, str]) -> Any:
    """What is remembered, in order; kept, if that is asked for."""
    from pipeline.face import Memory

    found: list[Memory] = [Memory.load(path, kind=model.memory_kind) for path in options.memory]
    if texts:
        found.append(model.memorize(list(texts.values()), names=list(texts), tokenizer=tokenizer))
        for document, held in zip(found[-1].sources, found[-1].documents(), strict=True):
            if held.num_tokens < document.num_tokens - model.longmem.settings.memory.chunk_size:
                told = f"of {document.num_tokens:,} tokens the last {held.num_tokens:,} are remembered"
                print(f"{document.name}: {told} (memory.tokens of the model)", file=sys.stderr)
    if options.save_memory is not None:
        whole = found[0]
        if len(found) > 1:
            whole = Memory.merge(found, align=model.longmem.settings.segment_tokens)
        whole.save(options.save_memory)
        documents = len(whole.documents())
        print(f"{len(whole):,} tokens of {documents} document(s) -> {options.save_memory}", file=sys.stderr)
    return found


def _lines() -> Iterator[str]:
    """What is said, turn by turn; lines without words are passed over."""
    asks = "> " if sys.stdin.isatty() else ""
    if asks:
        import readline  # noqa: F401  # input() edits lines by it
    while True:
        try:
            line = input(asks)
        except EOFError:
            if asks:
                print()
            return
        except KeyboardInterrupt:  # there is no answer to end
            print()
            continue
        if line.strip():
            yield line


def _answer(options: argparse.Namespace, talk: Talk, tokenizer: Any, text: str) -> None:
    from transformers import TextStreamer

    way: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.sample, "num_beams": 1}
    if options.sample:
        way |= {"temperature": options.temperature or 1.0, "top_p": options.top_p or 1.0, "top_k": 0}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with _interrupts() as is_stopped:
        talk.answer(text, way=way, streamer=streamer, is_stopped=is_stopped, watch=options.show)
    if options.show:
        shown = talk.looked_up(_CHUNKS_SHOWN)
        print("\nlooked up:" if shown else "\nlooked up: nothing")
        for one in shown:
            print(f"  {one.share:4.0%}  {one.document}, {one.distance:,} tokens back, layer {one.layer}: {one.text!r}")
        print()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is asked for after each token; a second one ends the program."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def program() -> None:
    """The command `longmem-generate`."""
    with explained():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    program()
