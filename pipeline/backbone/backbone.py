"""The frozen backbone as a memory encoder.

Shapes: `B` rows, `T` tokens, `E` hidden size, `H` query heads, `Hkv` key/value heads, `D` head size, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from pipeline.backbone.encoding import Encoding, KeyValue, LayerCall
from pipeline.backbone.families import attention_scale, family_of, position_encoding, sliding_window
from pipeline.backbone.masks import document_mask
from pipeline.errors import BackboneError
from pipeline.positions import PositionEncoding

MadeWhole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


def _is_whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """For a model that is not partitioned: its parameters are whole."""
    return nullcontext()


class Backbone(nn.Module):
    """A frozen causal LM that yields taps, layer calls, memory keys and values.

    Args:
        model: A `transformers` causal LM of a known family; frozen here.
        taps: Numbers of layers (0 to all) after which the residual stream is kept; one more than there are: after the
            final norm.
        calls: Layers, counted from 1, whose call is kept.
        memory_layers: Layers, counted from 1, whose keys and values are kept.
        made_whole: Context manager that makes partitioned parameters whole while it is open (ZeRO-3); every rank must
            enter it together.

    Raises:
        BackboneError: The family is unknown or the variant is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        taps: Sequence[int] = (),
        calls: Sequence[int] = (),
        memory_layers: Sequence[int] = (),
        made_whole: MadeWhole = _is_whole,
    ) -> None:
        super().__init__()
        self.family = family_of(model.config)
        self.model = model
        self.made_whole = made_whole
        self.tap_points = tuple(sorted(set(taps)))
        self.call_layers = tuple(sorted(set(calls)))
        self.memory_layers = tuple(memory_layers)
        self._taps: dict[int, Tensor] = {}
        self._calls: dict[int, LayerCall] = {}
        self._projected: dict[tuple[int, str], Tensor] = {}
        self._mask_documents: Tensor | None = None
        self._masks: dict[int | None, Tensor] = {}  # of those documents, by sliding window: layers share them
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.eval()
        self._register()

    @property
    def decoder(self) -> nn.Module:
        """The module that holds the layers."""
        return self.model.get_submodule(self.family.decoder)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """All layers, in order."""
        return list(getattr(self.decoder, self.family.layers))

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.decoder.get_submodule(self.family.norm)

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        head: nn.Module = self.model.get_output_embeddings()  # named differently from one version to the next
        return head

    @property
    def hidden_size(self) -> int:
        """`E`."""
        return int(self.model.config.hidden_size)

    @property
    def num_heads(self) -> int:
        """`H`."""
        return int(self.model.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """`Hkv`."""
        return int(getattr(self.model.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        """`D`."""
        return int(getattr(self.model.config, "head_dim", None) or self.hidden_size // self.num_heads)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer, counted from 1."""
        return self.layers[layer - 1].get_submodule(self.family.attention)

    def scale(self, layer: int) -> float:
        """The factor on `q k^T` in a layer, counted from 1."""
        return attention_scale(self.attention(layer), self.head_dim)

    def positions(self, layer: int) -> PositionEncoding:
        """The position encoding of a layer, counted from 1."""
        return position_encoding(self.family, self.decoder, layer, num_heads=self.num_heads)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode (no dropout), whatever is asked: a wrapper's `train()` must not change it."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, num_context: int = 0, cache: Cache | None = None
    ) -> Encoding:
        """Encodes one segment of each row, which may begin with left context: what is said of that is dropped.

        Args:
            tokens: Context and segment, int64 `[B, num_context + T]`.
            documents: Document of each token, of the same shape, if attention must not cross documents (positions then
                begin anew with each document); else None. With a cache: of the tokens in it and, after them, of these.
            num_context: Tokens of context.
            cache: What the backbone's own attention has read before, which it reads on from: keys and values of these
                tokens are added to it.

        Returns:
            The encoding of the segment; none of its tensors requires a gradient.
        """
        kwargs: dict[str, Any] = {}
        if documents is not None:
            kwargs["position_ids"] = _positions_in_document(documents)[:, -tokens.shape[1] :]
        self._mask_documents = documents
        try:
            if cache is not None:
                kwargs["past_key_values"] = cache
            self.decoder(input_ids=tokens, use_cache=cache is not None, **kwargs)
            memory = [KeyValue(*self._split(layer)[1:]) for layer in self.memory_layers]
            within = documents if cache is None else None  # there is more in a cache than this call says anything of
            return Encoding(dict(self._taps), dict(self._calls), memory, within).after(num_context)
        finally:
            self._taps.clear()
            self._calls.clear()
            self._projected.clear()
            self._masks.clear()
            self._mask_documents = None

    @contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """Inside, the last tap is all that is kept: what an ordinary model costs can be measured."""
        kept = self.tap_points, self.call_layers, self.memory_layers
        self.tap_points, self.call_layers, self.memory_layers = (len(self.layers),), (), ()
        try:
            yield
        finally:
            self.tap_points, self.call_layers, self.memory_layers = kept
            self._taps.clear()

    @contextmanager
    def head_parameters(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Makes the LM head whole inside: weight `[V, E]`, bias `[V]` or None. Collective if partitioned."""
        with self.made_whole(list(self.head.parameters())):
            yield self.head.weight, getattr(self.head, "bias", None)  # type: ignore[misc]

    def _split(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        outputs = [self._projected[layer, name] for name in self.family.hooked]
        return self.family.split(outputs, num_heads=self.num_heads, head_dim=self.head_dim)

    def _register(self) -> None:
        # Methods, not closures: with the module they are copied.
        modules = self.layers
        for layer, module in enumerate(modules, start=1):
            module.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
        if len(modules) in self.tap_points:
            modules[-1].register_forward_hook(partial(self._after, len(modules)))
        if len(modules) + 1 in self.tap_points:
            self.norm.register_forward_hook(partial(self._after, len(modules) + 1))
        for layer in self.memory_layers:
            for name in self.family.hooked:
                projection = self.attention(layer).get_submodule(name)
                projection.register_forward_hook(partial(self._on_projection, layer, name))

    def _before(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the tap before a layer and its call, and forbids attention across documents where asked."""
        if self._mask_documents is not None:
            window = sliding_window(self.attention(layer))
            if window not in self._masks:
                self._masks[window] = document_mask(
                    self._mask_documents, dtype=args[0].dtype, window=window, num_queries=args[0].shape[1]
                )
            call = LayerCall(args[1:], kwargs).with_mask(self._masks[window])
            args, kwargs = (args[0], *call.args), dict(call.kwargs)
        if layer - 1 in self.tap_points:  # taps are named by the layers passed
            self._taps[layer - 1] = args[0]
        if layer in self.call_layers:
            self._calls[layer] = LayerCall(args[1:], kwargs)
        return args, kwargs

    def _after(self, tap: int, module: nn.Module, args: Any, output: Any) -> None:
        self._taps[tap] = output[0] if isinstance(output, tuple) else output

    def _on_projection(self, layer: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if layer in self.memory_layers:
            self._projected[layer, name] = output


def _positions_in_document(documents: Tensor) -> Tensor:
    """Position of each token since its document (or the segment) began, int64 `[B, T]`."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)  # [B, T]
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def identity(model: nn.Module, *, made_whole: MadeWhole = _is_whole) -> str:
    """A hash of every parameter's name, shape and bytes (in float32): says whether two backbones are the same.

    Collective: with a partitioned backbone every rank must call it.

    Args:
        model: The causal LM.
        made_whole: As in `Backbone`.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        BackboneError: A parameter holds something that is not a finite number.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        with made_whole([parameter]):
            numbers = parameter.detach().float().cpu().contiguous()
            ill = int((~numbers.isfinite()).sum())
            if ill:
                raise BackboneError(
                    "the backbone's weights hold numbers that are not finite",
                    got=f"{ill} of {numbers.numel()} in {name}",
                    expected=f"finite numbers only, in {parameter.dtype}",
                    do="check the files in backbone.path, or convert or download the model again",
                )
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()
