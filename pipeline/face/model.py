"""LongMem as a model of transformers: `from_pretrained`, `forward`, `generate`, `memorize`.

Shapes: `B` rows, `n` tokens of a row, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.backbone.backbone import identity
from pipeline.config.model import ModelSettings
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import DataError
from pipeline.face import checks
from pipeline.face.cache import LongMemCache
from pipeline.face.configuration import LongMemConfig
from pipeline.face.contents import MemoryKind
from pipeline.face.given import Memories, memories_of_rows, names_of, tokens_of_texts
from pipeline.face.gradients import hidden_with_gradients, loss_of
from pipeline.face.memory import Memory
from pipeline.face.remembering import begun, kind_of, memorize, start_of
from pipeline.face.saving import load, save
from pipeline.model.longmem import DTYPES, LongMem, build
from pipeline.model.rows import Rows


class LongMemForCausalLM(PreTrainedModel, GenerationMixin):
    """A frozen backbone, a SideNet, and memory that each row of a batch keeps for itself.

    Args:
        config: What it is.
        backbone: The causal LM; None: one of random weights.
    """

    config_class = LongMemConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: LongMemConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(copy.deepcopy(config.backbone_config))
        settings = _remembering_in(backbone.dtype, config.model_settings)
        wrapped, sidenet = build(settings, backbone)
        self.backbone, self.sidenet = backbone, sidenet.to(backbone.dtype)
        self._longmem = [LongMem(settings, wrapped, sidenet)]  # in a list: no module of this one
        self._kind: MemoryKind | None = None
        self.post_init()

    @property
    def longmem(self) -> LongMem:
        """Backbone, SideNet and settings as all of LongMem knows them."""
        return self._longmem[0]

    def train(self, mode: bool = True) -> LongMemForCausalLM:
        """As any model, but for the backbone, which stays as it was trained: without dropout."""
        super().train(mode)
        self.backbone.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        exact, was = [buffer.clone() for buffer in self.backbone.buffers()], (self.backbone.dtype, self.longmem.device)
        super()._apply(*args, **kwargs)
        for buffer, before in zip(self.backbone.buffers(), exact, strict=True):
            if not before.is_meta:
                buffer.data = before.to(buffer.device)  # frequencies of positions are no weights: they keep their dtype
        if was != (self.backbone.dtype, self.longmem.device):
            old = self.longmem  # which may keep tensors of the old dtype, or where the model was
            self._longmem = [LongMem(_remembering_in(self.backbone.dtype, old.settings), old.backbone, old.sidenet)]
        return self

    def init_weights(self) -> None:
        """Nothing: backbone and SideNet come with their weights."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's own."""
        self.backbone.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return cast(nn.Module, self.backbone.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> NoReturn:
        """Cannot be done. Raises DataError."""
        raise DataError(
            "a LongMem's embeddings are its backbone's, which is frozen",
            got="other embeddings, or another number of them",
            do="change the backbone, and train a SideNet beside that",
        )

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        return cast(nn.Module, self.backbone.get_output_embeddings())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a saved or exported LongMem, and its backbone.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            **kwargs: `backbone`: the backbone's folder or hub name, or the loaded causal LM, whose tensors are shared;
                by default where the model was saved or trained. `settings`: laid over the saved ones, such as
                `{"memory": {"tokens": 16384}}`. `dtype`, `device_map` (one device), `revision`, `subfolder`,
                `cache_dir`, `token`, `local_files_only`, `attn_implementation`, `trust_remote_code` as transformers
                has them.

        Returns:
            The model, in evaluation mode; with `output_loading_info=True` also what was missing: nothing.

        Raises:
            CheckpointError: The folder holds none, is damaged or newer, or the backbone is another one.
            BackboneError: The backbone cannot be loaded.
            ConfigError: A setting is wrong.
        """
        return load(cls, str(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | Path, *, save_backbone: bool | None = None, **kwargs: Any) -> None:
        """Saves the SideNet, and which backbone it stands beside.

        Args:
            save_directory: The folder.
            save_backbone: Whether the backbone is saved in it too, whole; None: if it is not known where else it lies.
            **kwargs: As transformers has them.
        """
        save(self, Path(save_directory), save_backbone=save_backbone, **kwargs)

    @property
    def memory_kind(self) -> MemoryKind:
        """What memories of this model are like."""
        if self._kind is None:
            self._kind = kind_of(self.longmem, self.config.backbone_hash or identity(self.backbone))
        return self._kind

    def own_tokenizer(self) -> Any:
        """The tokenizer that lies beside the model, or else beside the backbone; a DataError if there is none."""
        for name in (self.config.name_or_path, self.backbone.name_or_path, self.config.backbone_name):
            try:
                return load_tokenizer(str(name))
            except DataError as error:
                failed = error
        raise failed

    def memorize(
        self,
        texts: Any,
        *,
        names: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        progress: bool = True,
        dtype: str | None = None,
    ) -> Memory:
        """Reads texts into a memory, each as a document of its own, in the space of what is remembered.

        Args:
            texts: A text, or token ids int64 `[n]`; or several.
            names: What the documents are called; None: by number.
            tokenizer: Turns texts into ids; None: the one that lies beside the model.
            progress: Whether a bar is shown.
            dtype: What the memory is stored as: `fp32`, `bf16`, `fp16` or `int8`; None: as the model remembers.

        Returns:
            The memory.

        Raises:
            DataError: A text is empty, or ids are outside the vocabulary.
            LongMemMemoryError: Two documents are called alike.
        """
        tokens = tokens_of_texts(texts, tokenizer, self.own_tokenizer)
        kind, found = self.memory_kind, []
        for name, text in zip(names_of(names, len(tokens)), tokens, strict=True):
            checks.check_ids(text[None], self.config.vocab_size)
            one = memorize(self.longmem, kind, text, name=name, progress=progress)
            found.append(one if dtype is None else one.to(dtype))
        return found[0] if len(found) == 1 else Memory.merge(found, align=self.longmem.settings.segment_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongMemCache | None = None,
        memory: Memories = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Reads on, segment by segment: what is full is remembered, what comes reads it.

        Args:
            input_ids: The next tokens of every row, int64 `[B, n]`.
            attention_mask: 1 where a token is; of these tokens or of the whole stream.
            past_key_values: What `use_cache` returned; these tokens follow.
            memory: What a row reads besides its own stream, where it begins: a `Memory` or several for all rows, or a
                list of some for each row; False: no memory at all.
            labels: int64 `[B, n]`; -100 where nothing is predicted. Shifted here.
            use_cache: Whether the stream can be read on.
            logits_to_keep: Of how many last tokens logits are made; 0: all.
            **kwargs: What transformers passes besides: `return_dict`, `num_items_in_batch`.

        Returns:
            `loss` in nats, `logits` float32 `[B, n, V]`, `past_key_values`.

        Raises:
            DataError: Something is asked that a LongMem cannot do.
        """
        checks.check_others(kwargs)
        checks.check_ids(input_ids, self.config.vocab_size)
        assert input_ids is not None
        checks.check_labels(labels, input_ids, self.config.vocab_size)
        checks.check_cache(past_key_values, self.longmem)
        wanted, there = input_ids.shape[1], None
        if attention_mask is not None:
            num_read = 0 if past_key_values is None else past_key_values.get_seq_length()
            checks.check_mask_shape(attention_mask, input_ids, num_read=num_read)
            there = attention_mask[:, -wanted:].to(torch.bool)
        if isinstance(logits_to_keep, int) and 0 < logits_to_keep < wanted and labels is None:
            wanted = logits_to_keep
        learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.sidenet.parameters())
        cache = past_key_values
        if learns and cache is None and not use_cache and (memory is None or isinstance(memory, bool)):
            reads = self._reads(memory)
            hidden = hidden_with_gradients(self.longmem, input_ids, there, reads_memory=reads)[:, -wanted:]
        else:
            if learns:
                checks.check_learning(labels)
            cache = LongMemCache() if cache is None else cache
            if cache.rows is None:
                cache.begin(self._begin(memory, len(input_ids)), memory)
            cache.check(memory, len(input_ids))
            hidden = cache.read(input_ids, there, wanted=wanted)
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = loss_of(self.longmem, hidden, labels, there, num_items_in_batch=count)
        kept = hidden[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else hidden
        output = CausalLMOutputWithPast(
            loss=loss, logits=self.longmem.logits(kept), past_key_values=None if use_cache is False else cache
        )
        return output if kwargs.get("return_dict") is not False else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers generates, with `memory=` as in `forward`.

        Args:
            inputs: The prompts, int64 `[B, n]`, padded on the left.
            generation_config: How.
            **kwargs: As transformers has them.

        Returns:
            As transformers gives it.

        Raises:
            DataError: The prompts are empty, padded on the right, longer than memory and window, or hold ids outside
                the vocabulary; or what is asked needs tokens taken back, or another cache.
        """
        checks.check_ways(kwargs, self.generation_config if generation_config is None else generation_config)
        past = kwargs.get("past_key_values")
        checks.check_cache(past, self.longmem)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is not None:
            mask = kwargs.get("attention_mask")
            checks.check_ids(ids, self.config.vocab_size)
            checks.check_mask(mask, ids, num_read=0 if past is None else past.get_seq_length())
            settings, begun_rows = self.longmem.settings, None if past is None else past.rows
            reads = self._reads(kwargs.get("memory")) if begun_rows is None else begun_rows.reads_memory
            remembered = settings.memory.tokens if reads else 0
            checks.check_length(checks.own_tokens(mask, ids), window=settings.segment_tokens, remembered=remembered)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongMemCache()

    def _begin(self, memory: Memories, num_rows: int) -> Rows:
        """Rows that have read nothing but their memories."""
        starts: dict[tuple[int, ...], int] = {}
        begins: list[Rows] = []
        numbers = []
        for memories in memories_of_rows(memory, num_rows):
            known = tuple(id(one) for one in memories)
            if known not in starts:
                for one in memories:
                    one.check(self.memory_kind)
                starts[known] = len(begins)
                begins.append(begun(self.longmem, start_of(self.longmem, memories), reads_memory=self._reads(memory)))
            numbers.append(starts[known])
        return Rows.joined(begins).chosen(torch.tensor(numbers, device=self.longmem.device))

    def _reads(self, memory: Memories) -> bool:
        return memory is not False and self.longmem.settings.memory.enabled


def _remembering_in(dtype: torch.dtype, settings: ModelSettings) -> ModelSettings:
    """Settings of a model whose weights are of a dtype."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return settings.model_copy(update={"precision": names.get(dtype, "fp32")})
