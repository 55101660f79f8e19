"""Loading a causal LM, with every check of its files that a user can be told about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import BackboneError, in_a_line
from pipeline.files import is_a_path

_CHECK = "check the folder, or convert or download the model again"
_IN_LAYER = re.compile(r"(.*?\.)\d+\.")
# Masks and frequencies that older versions of transformers stored; they are computed now.
_NOT_WEIGHTS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$")


def read_backbone_config(path: str) -> Any:
    """Reads a backbone's configuration, before any weight is loaded.

    Args:
        path: Folder or hub name.

    Returns:
        The `transformers` configuration.

    Raises:
        BackboneError: There is none.
    """
    is_file = Path(path).is_file()
    if is_file or (is_a_path(path) and not Path(path).is_dir()):
        raise _no_backbone(path, "which is a file" if is_file else f"which does not exist in {Path.cwd()}")
    try:
        config = AutoConfig.from_pretrained(path)
        text = config.get_text_config()
        counts = {name: getattr(text, name) for name in ("num_hidden_layers", "vocab_size")}
        ill = {name: count for name, count in counts.items() if count < 1}
    except Exception as error:  # foreign code on a foreign file raises whatever it comes upon
        raise _no_backbone(path, in_a_line(error)) from error
    numbers = {name: value for name, value in text.to_dict().items() if isinstance(value, float)}
    ill |= {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if ill:
        raise _no_backbone(path, "; ".join(f"{name} is {value}" for name, value in ill.items()))
    return config


def check_weights(path: str, config: Any) -> None:
    """Compares the weights in a folder, by name and shape, with those that its configuration asks for; loads none.

    While parameters are split over ranks `transformers` says nothing of weights that it does not use. Weights of a hub
    are left to `load_backbone`.

    Args:
        path: Folder or hub name.
        config: What `read_backbone_config` returned.

    Raises:
        BackboneError: One has another shape or kind, or belongs to a layer that the configuration does not ask for; or
            the configuration asks for something that cannot be made.
    """
    stored = _stored(path)
    if not stored:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = model.state_dict()
        layers = next(found[1] for name in wanted if (found := _IN_LAYER.match(name)))
    except Exception as error:  # as above
        raise _no_backbone(path, in_a_line(error)) from error
    _refuse_unused(path, [name for name in stored if _is_unused(name, layers, wanted)])
    for name, tensor in wanted.items():
        part = stored.get(name)
        if part is not None and part.shape != list(tensor.shape):
            raise _other_weights(path, f"{name} has the shape {part.shape}", f"{list(tensor.shape)}")
        if part is not None and tensor.is_floating_point() and not part.is_floating:
            raise _other_weights(path, f"{name} holds whole numbers", "floating-point numbers")
    _check_tie(path, model, stored)


def _check_tie(path: str, model: PreTrainedModel, stored: Mapping[str, _Stored]) -> None:
    """A configuration that ties the LM head to the embedding would have a head of its own dropped."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.get_text_config().tie_word_embeddings or head is None:
        return
    names = [name for name, module in model.named_modules() if module is head or module is embedding]
    found = [stored[f"{name}.weight"] for name in names if f"{name}.weight" in stored]
    if len(found) == 2 and not torch.equal(*(part.read() for part in found)):
        raise _other_weights(
            path, "the LM head is not the embedding", "the same numbers, as config.json says tie_word_embeddings"
        )


def _other_weights(path: str, got: str, expected: str) -> BackboneError:
    return BackboneError(
        "the backbone's files hold other weights than its config.json asks for",
        got=f"backbone.path {path!r}: {got}",
        expected=expected,
        do="put back the config.json that belongs to the weights, or " + _CHECK,
    )


def _is_unused(name: str, layers: str, wanted: Collection[str]) -> bool:
    """Whether a stored weight is one of a layer and the model has no place for it."""
    found = _IN_LAYER.match(name)
    if found is None or _NOT_WEIGHTS.search(name) or not (layers.endswith(found[1]) or found[1].endswith(layers)):
        return False
    return layers + name[found.end(1) :] not in wanted


@dataclass(frozen=True)
class _Stored:
    """A weight as a file has it; `read` reads it."""

    shape: list[int]
    is_floating: bool
    read: Callable[[], Tensor]


def _stored(path: str) -> dict[str, _Stored]:
    """All weights of a folder by name, from what stands before the numbers."""
    found = {}
    for file in weight_files(path):
        try:
            found.update(_safetensors(file) if file.suffix == ".safetensors" else _pickled(file))
        except Exception as error:  # a file of somebody else may hold anything
            raise _unreadable(f"{path!r} ({file.name}: {in_a_line(error)})") from error
    return found


def _safetensors(file: Path) -> dict[str, _Stored]:
    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)

        return read

    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # it is no mapping
        return {
            name: _Stored(part.get_shape(), part.get_dtype().startswith(("F", "BF")), reader(name))
            for name, part in slices.items()
        }


def _pickled(file: Path) -> dict[str, _Stored]:
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {
        name: _Stored(list(tensor.shape), tensor.is_floating_point(), tensor.clone) for name, tensor in tensors.items()
    }


def weight_files(path: str) -> list[Path]:
    """The files that `transformers` reads, in the order in which it looks for them; none of a hub name.

    Raises BackboneError: one of them is missing.
    """
    folder = Path(path)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                foreign = [name for name in names if Path(name).name != name]
            except Exception as error:  # as above
                raise _unreadable(f"{path!r} ({index.name}: {in_a_line(error)})") from error
            missing = [name for name in names if not (folder / name).is_file()]
            if foreign or missing:
                what = f"names {foreign[0]!r} outside the folder" if foreign else f"names {missing[0]!r}, not there"
                raise _unreadable(f"{path!r} ({index.name} {what})")
            return [folder / name for name in names]
    return []


def _unreadable(got: str) -> BackboneError:
    return BackboneError("the backbone's weights cannot be loaded", got=f"backbone.path {got}", do=_CHECK)


_CACHE_LINE = 64  # bytes


def load_backbone(path: str, *, dtype: torch.dtype, attention: str | None, who: str = "") -> PreTrainedModel:
    """Loads a causal LM.

    Collective: where its parameters are split over ranks while they are loaded, every rank must call it.

    Args:
        path: Folder or hub name.
        dtype: Of its parameters.
        attention: `sdpa` or `eager`; None: the faster one that the family has.
        who: Whom an error happened to, such as ` on rank 1`.

    Returns:
        The model.

    Raises:
        BackboneError: Its files are missing or damaged, or do not hold the weights that its configuration asks for.
    """
    model: PreTrainedModel
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise _unreadable(f"{path!r}{who} ({in_a_line(error)})") from error
    _check_names(path, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    _align(model)
    return model


def _align(model: PreTrainedModel) -> None:
    """Copies weights that begin within a cache line, as those mapped from a file may.

    Some kernels round otherwise there: a model would differ in last bits from what was saved.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _CACHE_LINE:
            parameter.data = parameter.data.clone()


def _no_backbone(path: str, why: str) -> BackboneError:
    return BackboneError(
        "the backbone cannot be loaded",
        got=f"backbone.path {path!r} ({why})",
        expected="a Hugging Face model folder (config.json, *.safetensors) or hub name",
        do="set backbone.path; launch/prepare_backbone.py makes a small one without network",
    )


def _check_names(path: str, *, missing: Collection[str], unexpected: Collection[str]) -> None:
    # transformers would put random numbers in the place of what is missing.
    if missing:
        raise BackboneError(
            "the backbone's files lack weights",
            got=f"backbone.path {path!r} without {', '.join(sorted(missing)[:3])} ({len(missing)} in all)",
            do=_CHECK,
        )
    _refuse_unused(path, [name for name in unexpected if _IN_LAYER.match(name) and not _NOT_WEIGHTS.search(name)])


def _refuse_unused(path: str, unused: Collection[str]) -> None:
    if unused:
        raise BackboneError(
            "the backbone's files hold weights of layers that its config.json does not ask for: "
            "without them it would be another model",
            got=f"backbone.path {path!r} with {', '.join(sorted(unused)[:3])} ({len(unused)} in all)",
            do="put back the config.json that belongs to the weights, or " + _CHECK,
        )
