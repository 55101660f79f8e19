"""Which weights the authors' code saves, by name and shape, and where they go.

Names here are those of the two checkpoints: of the backbone alone, and of LongMem, which holds the backbone once more
below `decoder.pretrained_model.`.

Shapes: `E` hidden size, `F` of the MLP, `H` heads, `V` vocabulary, `L'` backbone layers, `L` SideNet layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.official.pickles import Checkpoint

_BACKBONE, _NESTED, _SIDE = "decoder.model.", "decoder.pretrained_model.", "decoder."
_VERSION, _EMBEDDING, _HEAD = "decoder.version", "decoder.embed_tokens.weight", "decoder.output_projection.weight"
_GATE = re.compile(r"decoder\.layers\.(\d{1,4})\.self_attn\.memory_bias")
_LAYER = re.compile(r"(?:decoder\.model\.transformer\.h|decoder\.layers)\.(\d{1,4})\.")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_WANTED_VERSION = 3  # with 2 or less fairseq's loader drops the final norm
_DO = "give the two checkpoints that belong together, as the authors published them"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a published LongMem.

    Attributes:
        vocab_size: `V`.
        hidden_size: `E`.
        intermediate_size: `F`.
        num_layers: `L'`.
        num_heads: `H`.
        num_side_layers: `L`.
        memory_layer: The SideNet layer that reads memory, counted from 1.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_side_layers: int
    memory_layer: int

    @classmethod
    def of(cls, backbone: Checkpoint, longmem: Checkpoint) -> Sizes:
        """Reads them off the weights. Raises CheckpointError: those are of another kind of model."""
        embedding = _shape(backbone, f"{_BACKBONE}transformer.wte.weight", 2)
        inner = _shape(backbone, f"{_BACKBONE}transformer.h.0.mlp.fc_in.weight", 2)
        gates = [(name, int(found[1]) + 1) for name in longmem.model if (found := _GATE.fullmatch(name))]
        if len(gates) != 1:
            raise CheckpointError(
                f"{longmem.path.name} is no LongMem of the authors' code",
                got=f"{len(gates)} layers with a memory_bias",
                expected="one",
                do=_DO,
            )
        return cls(
            vocab_size=embedding[0],
            hidden_size=embedding[1],
            intermediate_size=inner[0],
            num_layers=_num_layers(backbone, f"{_BACKBONE}transformer.h."),
            num_heads=_shape(longmem, gates[0][0], 1)[0],
            num_side_layers=_num_layers(longmem, f"{_SIDE}layers."),
            memory_layer=gates[0][1],
        )

    @property
    def source_layer(self) -> int:
        """The backbone layer whose keys and values are remembered, counted from 1."""
        return 2 * self.memory_layer


def check(sizes: Sizes, backbone: Checkpoint, longmem: Checkpoint) -> None:
    """Checks every name and shape, what must be the same twice, that numbers are finite, and what settings say.

    Args:
        sizes: Of both.
        backbone: The checkpoint of the backbone.
        longmem: That of LongMem.

    Raises:
        CheckpointError: Something differs from what the authors' code saves.
    """
    if sizes.num_layers != 2 * sizes.num_side_layers or sizes.hidden_size % sizes.num_heads:
        raise CheckpointError(
            "the two checkpoints do not fit each other",
            got=f"{sizes.num_layers} backbone layers of {sizes.hidden_size} numbers, {sizes.num_side_layers} layers "
            f"and {sizes.num_heads} heads of the SideNet",
            expected="two backbone layers to each of the SideNet, and heads that divide the hidden size",
            do=_DO,
        )
    _check_names(backbone, _backbone_shapes(sizes))
    _check_names(longmem, longmem_shapes(sizes))
    version = longmem.model[_VERSION].flatten().tolist()
    if version != [_WANTED_VERSION]:
        raise CheckpointError(
            f"{longmem.path.name} is of another version of the decoder",
            got=f"{_VERSION} {version}",
            expected=_WANTED_VERSION,
            do="older ones lack the final norm: they are no LongMem",
        )
    for name, twin in ((_EMBEDDING, "transformer.wte.weight"), (_HEAD, "lm_head.weight")):
        _check_same(longmem, name, longmem, f"{_NESTED}{_BACKBONE}{twin}")
    for name in backbone.model:
        _check_same(backbone, name, longmem, _NESTED + name)
    _check_settings(backbone, {"newgpt_mode": "alibi"})
    _check_settings(longmem, {"retrieval_layer_index": sizes.source_layer - 1, "activation_fn": "gelu"})


def backbone_weights(longmem: Checkpoint) -> dict[str, Tensor]:
    """The backbone's weights by their names in `pipeline.backbone.gpt`, float32."""
    start = _NESTED + _BACKBONE
    return {name[len(start) :]: _wide(weight) for name, weight in longmem.model.items() if name.startswith(start)}


def sidenet_weights(longmem: Checkpoint, sizes: Sizes) -> dict[str, Tensor]:
    """The SideNet's weights by their names in `pipeline.sidenet`, float32.

    The authors' gate is the weight of memory, ours that of the local part: the sign is turned.
    """
    found = {f"norm.{part}": _wide(longmem.model[f"{_SIDE}layer_norm.{part}"]) for part in ("weight", "bias")}
    for layer in range(sizes.num_side_layers):
        for ours, theirs in _SIDE_LAYER.items():
            found[f"layers.{layer}.{ours}"] = _wide(longmem.model[f"{_SIDE}layers.{layer}.{theirs}"])
    gate = longmem.model[f"{_SIDE}layers.{sizes.memory_layer - 1}.self_attn.memory_bias"]
    return found | {f"memory.{sizes.memory_layer}.gate": -_wide(gate)}


_SIDE_LAYER: Mapping[str, str] = {
    **{f"ln_1.{part}": f"ln_1.{part}" for part in ("weight", "bias")},
    **{f"attn.{name}.weight": f"self_attn.{name}.weight" for name in _PROJECTIONS},
    **{f"mlp.fc_in.{part}": f"fc1.{part}" for part in ("weight", "bias")},
    **{f"mlp.fc_out.{part}": f"fc2.{part}" for part in ("weight", "bias")},
}
"""Names in one of our SideNet's layers -> in one of theirs."""


def _backbone_shapes(sizes: Sizes) -> dict[str, list[int]]:
    shapes = {"transformer.wte.weight": [sizes.vocab_size, sizes.hidden_size]}
    for layer in range(sizes.num_layers):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in _layer_shapes(sizes).items()}
    shapes |= {f"transformer.ln_f.{part}": [sizes.hidden_size] for part in ("weight", "bias")}
    shapes |= {"lm_head.weight": [sizes.vocab_size, sizes.hidden_size], "lm_head.bias": [sizes.vocab_size]}
    return {_BACKBONE + name: shape for name, shape in shapes.items()}


def longmem_shapes(sizes: Sizes) -> dict[str, list[int]]:
    """Every weight of LongMem's checkpoint, by name."""
    words = [sizes.vocab_size, sizes.hidden_size]
    shapes = {_VERSION: [1], _EMBEDDING: words, _HEAD: words}
    shapes |= {f"{_SIDE}layer_norm.{part}": [sizes.hidden_size] for part in ("weight", "bias")}
    for layer in range(sizes.num_side_layers):
        of_layer = _layer_shapes(sizes)
        shapes |= {f"{_SIDE}layers.{layer}.{theirs}": of_layer[ours] for ours, theirs in _SIDE_LAYER.items()}
    shapes[f"{_SIDE}layers.{sizes.memory_layer - 1}.self_attn.memory_bias"] = [sizes.num_heads]
    return shapes | {_NESTED + name: shape for name, shape in _backbone_shapes(sizes).items()}


def _layer_shapes(sizes: Sizes) -> dict[str, list[int]]:
    """Of one layer, by our names."""
    wide, inner = sizes.hidden_size, sizes.intermediate_size
    norm = {f"ln_1.{part}": [wide] for part in ("weight", "bias")}
    attention = {f"attn.{name}.weight": [wide, wide] for name in _PROJECTIONS}
    first = {"mlp.fc_in.weight": [inner, wide], "mlp.fc_in.bias": [inner]}
    return norm | attention | first | {"mlp.fc_out.weight": [wide, inner], "mlp.fc_out.bias": [wide]}


def _shape(checkpoint: Checkpoint, name: str, num_axes: int) -> Sequence[int]:
    weight = checkpoint.model.get(name)
    if weight is None or weight.dim() != num_axes or 0 in weight.shape:
        raise CheckpointError(
            f"{checkpoint.path.name} is no checkpoint of the authors' code",
            got=f"no {name}" if weight is None else f"{name} of the shape {list(weight.shape)}",
            expected=f"{name} of {num_axes} axes",
            do=_DO,
        )
    return list(weight.shape)


def _num_layers(checkpoint: Checkpoint, start: str) -> int:
    found = [int(at[1]) for name in checkpoint.model if name.startswith(start) and (at := _LAYER.match(name))]
    return max(found, default=-1) + 1


def _check_names(checkpoint: Checkpoint, wanted: Mapping[str, Sequence[int]]) -> None:
    missing, foreign = wanted.keys() - checkpoint.model.keys(), checkpoint.model.keys() - wanted.keys()
    problems = [("no", name) for name in sorted(missing)] + [("a foreign", str(name)[:100]) for name in sorted(foreign)]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path.name} does not hold the weights of a LongMem",
            got=", ".join(f"{kind} {name}" for kind, name in problems[:3]) + f" ({len(problems)} names in all)",
            expected=f"{len(wanted)} weights by the names of the authors' code",
            do=_DO,
        )
    for name, weight in checkpoint.model.items():
        shape = list(weight.shape)
        if shape != wanted[name] or not weight.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path.name} is of another shape",
                got=f"{name}: {shape} of {weight.dtype}",
                expected=f"{list(wanted[name])}, floating",
                do=_DO,
            )
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.path.name} holds numbers that are not finite",
                got=f"{int((~weight.isfinite()).sum()):,} in {name}",
                do="download it again",
            )


def _check_same(first: Checkpoint, name: str, second: Checkpoint, twin: str) -> None:
    """That two weights are the same; where one was stored narrower, as far as that goes."""
    one, other = first.model[name], second.model[twin]
    if one.dtype != other.dtype:
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        one, other = one.to(narrow), other.to(narrow)
    if not torch.equal(one, other):
        raise CheckpointError(
            "two weights differ that the authors' code has once",
            got=f"{name} in {first.path.name}, {twin} in {second.path.name}",
            expected="the same numbers",
            do=_DO,
        )


def _check_settings(checkpoint: Checkpoint, wanted: Mapping[str, object]) -> None:
    for name, value in wanted.items():
        found = checkpoint.settings.get(name, value)  # what a checkpoint says nothing of is as published
        if found != value:
            raise CheckpointError(
                f"the settings in {checkpoint.path.name} are of a model that is not known here",
                got=f"{name} = {found!r}"[:200],
                expected=repr(value),
                do=_DO,
            )


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()
