"""Shows what a memory does to a prompt: `inspect_memory.py --model DIR --memory FILE --prompt TEXT`; `--help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.failing import explained


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description="Reads a prompt with memory and without, and writes a page that shows what memory changed and "
        "which chunks every token looked up: one HTML file that loads nothing else.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what launch/export.py or save_pretrained wrote")
    parser.add_argument("--backbone", metavar="PATH", help="its folder or hub name, if not the one named in the model")
    parser.add_argument(
        "--memory", required=True, nargs="+", type=Path, metavar="FILE", help="saved memories, one behind another"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what is read; it goes on where the memory ends")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, in UTF-8")
    parser.add_argument("--output", type=Path, default=Path("inspection.html"), metavar="FILE", help="%(default)s")
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="memory layers, counted from 1; default: all"
    )
    parser.add_argument(
        "--chunks-per-token", type=int, default=32, metavar="N", help="kept, of the largest share; default %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.chunks_per_token < 1:
        parser.error(f"argument --chunks-per-token: {options.chunks_per_token} is less than 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses `arguments`, or the process's command line, reads the prompt twice, writes the page."""
    options = parse(arguments)
    # Loaded after the command line is known to be right: these imports take seconds.
    import torch

    from pipeline.errors import DataError, in_a_line
    from pipeline.face import LongMemForCausalLM, Memory
    from pipeline.face.given import texts_of_files
    from pipeline.face.inspecting import inspect
    from pipeline.face.page import render
    from pipeline.files import write_text

    prompt = options.prompt
    if options.prompt_file is not None:
        (prompt,) = texts_of_files([options.prompt_file]).values()
    if not prompt.strip():
        raise DataError("the prompt is empty", got=repr(prompt), do="give a text to read")
    model = LongMemForCausalLM.from_pretrained(options.model, backbone=options.backbone)
    memories = [Memory.load(path, kind=model.memory_kind) for path in options.memory]
    tokenizer = model.own_tokenizer()
    names = [path.name for path in options.memory]
    inspection = inspect(
        model,
        memories,
        torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.int64),
        tokenizer,
        title="A prompt, with memory and without",
        names=names,
        layers=options.layers,
        chunks_per_token=options.chunks_per_token,
    )
    page = render(inspection, chunks_per_token=options.chunks_per_token)
    try:
        write_text(options.output, page)
    except OSError as error:
        raise DataError(
            "the page cannot be written", got=f"{options.output} ({in_a_line(error)})", do="name another file"
        ) from error
    told = ""
    if inspection.perplexity_with is not None:
        told = f"; perplexity {inspection.perplexity_without:.2f} without memory, {inspection.perplexity_with:.2f} with"
    print(f"{len(inspection.tokens):,} tokens read{told} -> {options.output}")


def program() -> None:
    """The command `longmem-inspect-memory`."""
    with explained():
        main()


if __name__ == "__main__":
    program()
