"""Loading a causal LM, with every check of its files that a user can be told about."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import BackboneError
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
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _no_backbone(path, _first_line(error)) from error


def check_weights(path: str, config: Any) -> None:
    """Compares the weights in a folder, by name and shape, with those that its configuration asks for; loads none.

    While parameters are split over ranks `transformers` says nothing of weights that it does not use. Weights of a hub,
    and in other files than safetensors, are left to `load_backbone`.

    Args:
        path: Folder or hub name.
        config: What `read_backbone_config` returned.

    Raises:
        BackboneError: One has another shape, or belongs to a layer that the configuration does not ask for.
    """
    stored = _stored_shapes(Path(path))
    if not stored:
        return
    with torch.device("meta"):
        wanted = {
            name: list(tensor.shape) for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    layers = next(found[1] for name in wanted if (found := _IN_LAYER.match(name)))
    _refuse_unused(path, [name for name in stored if _is_unused(name, layers, wanted)])
    mismatched = [name for name, shape in wanted.items() if stored.get(name, shape) != shape]
    if mismatched:
        first = mismatched[0]
        raise BackboneError(
            "the backbone's files hold weights of other shapes than its config.json asks for",
            got=f"backbone.path {path!r}: {first} {stored[first]} ({len(mismatched)} weights in all)",
            expected=f"{wanted[first]}",
            do="put back the config.json that belongs to the weights, or " + _CHECK,
        )


def _is_unused(name: str, layers: str, wanted: Collection[str]) -> bool:
    """Whether a weight is one of a layer, and the model has no place for it.

    Args:
        name: As stored. The first parts of a name may be missing (`h.0.` for `transformer.h.0.`) or more.
        layers: How names of the model's layers begin, such as `model.layers.`.
        wanted: Names of the model.

    Returns:
        The answer.
    """
    found = _IN_LAYER.match(name)
    if found is None or _NOT_WEIGHTS.search(name) or not (layers.endswith(found[1]) or found[1].endswith(layers)):
        return False
    return layers + name[found.end(1) :] not in wanted


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in safetensors files, from their headers; a damaged file is found when it is loaded."""
    shapes = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                shapes[name] = tensors.get_slice(name).get_shape()
    return shapes


def load_backbone(path: str, *, dtype: torch.dtype, attention: str, who: str = "") -> PreTrainedModel:
    """Loads a causal LM.

    Collective: where its parameters are split over ranks while they are loaded, every rank must call it.

    Args:
        path: Folder or hub name.
        dtype: Of its parameters.
        attention: `sdpa` or `eager`.
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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BackboneError(
            "the backbone's weights cannot be loaded",
            got=f"backbone.path {path!r}{who} ({_first_line(error)})",
            do=_CHECK,
        ) from error
    _check_names(path, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    return model


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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
