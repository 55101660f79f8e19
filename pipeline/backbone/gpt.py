"""`longmem_gpt`: the backbone of the paper's authors as a model of transformers.

GPT-2's sizes, but with parallel blocks under one norm, ALiBi, attention without biases, and a head of its own with one.

Shapes: `B` rows, `q` tokens of this call, `k` tokens with those before, `E` hidden size, `H` heads, `D` head size, `V`
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers import PreTrainedModel as Model
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.positions import alibi_slopes

MODEL_TYPE = "longmem_gpt"


class LongMemGPTConfig(PreTrainedConfig):
    """Sizes of a `longmem_gpt`; by default those of the published backbone (407,072,768 parameters).

    Args:
        vocab_size: `V`.
        hidden_size: `E`.
        intermediate_size: Of the MLP; None: four times `E`.
        num_hidden_layers: Layers.
        num_attention_heads: `H`; divides `E`.
        hidden_act: The MLP's activation.
        layer_norm_epsilon: Of every norm.
        max_position_embeddings: Tokens of the windows that it was trained with. ALiBi takes longer ones.
        initializer_range: Standard deviation of random weights.
        **kwargs: As any configuration takes them.

    Raises:
        ValueError: The heads do not divide the hidden size.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # transformers' own way

    def __init__(
        self,
        vocab_size: int = 51_200,
        hidden_size: int = 1024,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        hidden_act: str = "gelu_new",
        layer_norm_epsilon: float = 1e-6,
        max_position_embeddings: int = 1024,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(f"num_attention_heads {num_attention_heads} does not divide hidden_size {hidden_size}")
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.hidden_act, self.layer_norm_epsilon = hidden_act, layer_norm_epsilon
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.use_cache = kwargs.pop("use_cache", True)
        for name, token in (("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2)):
            kwargs.setdefault(name, token)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention of `[B, H, q, D]` by plain matrix products, in transformers' form.

    Args:
        module: Not used.
        query: `[B, H, q, D]`.
        key: `[B, H, k, D]`.
        value: `[B, H, k, D]`.
        attention_mask: Added to the logits, `[B or 1, H, q, k]`.
        scaling: The factor on `q k^T`.
        **kwargs: Not used.

    Returns:
        Values `[B, q, H, D]` and weights `[B, H, q, k]`.
    """
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2), weights


class LongMemGPTAttention(nn.Module):
    """Causal attention with ALiBi, in float32 whatever the model's dtype is.

    Args:
        config: Sizes.
        layer_idx: The layer, from 0: its place in a cache.

    Source:
        Press et al. 2022, section 3.
    """

    def __init__(self, config: LongMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, alibi: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            hidden_states: `[B, q, E]`.
            attention_mask: Added to the logits, `[B or 1, 1, q, k]`; None: every query sees every token.
            alibi: Slope of each head times place of each key, float32 `[B or 1, H, k]`.
            past_key_values: Keys and values before, to which these are added.

        Returns:
            `[B, q, E]`; and the weights `[B, H, q, k]` where attention is `eager`.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dtype, query, key, value = query.dtype, query.float(), key.float(), value.float()
        # Counted from each query, so that the numbers are small where attention is large.
        bias = alibi[:, :, None, :] - alibi[:, :, -query.shape[2] :, None]  # [B or 1, H, q, k]
        if attention_mask is not None:
            bias = bias + attention_mask
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(self, query, key, value, bias, scaling=self.scaling, is_causal=False)
        return self.out_proj(mixed.flatten(2).to(dtype)), weights


class LongMemGPTMLP(nn.Module):
    """Two projections with an activation between them.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, q, E]` to the same."""
        mixed: Tensor = self.fc_out(self.act(self.fc_in(hidden_states)))
        return mixed


class LongMemGPTBlock(nn.Module):
    """`h + attention(norm(h)) + mlp(norm(h))`, of one norm.

    Args:
        config: Sizes.
        layer_idx: The layer, from 0.
    """

    def __init__(self, config: LongMemGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = LongMemGPTAttention(config, layer_idx)
        self.mlp = LongMemGPTMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        alibi: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LongMemGPTAttention.forward`, of the whole layer."""
        assert alibi is not None
        normed = self.ln_1(hidden_states)
        attended, weights = self.attn(normed, attention_mask, alibi, past_key_values)
        return hidden_states + attended + self.mlp(normed), weights


class LongMemGPTPreTrainedModel(Model):
    """What both models have in common."""

    config_class = LongMemGPTConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["LongMemGPTBlock"]  # noqa: RUF012  # transformers' own way
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class LongMemGPTModel(LongMemGPTPreTrainedModel):
    """The layers, without a head.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__(config)
        pad = config.pad_token_id
        known = pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else None
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size, known)
        self.h = nn.ModuleList([LongMemGPTBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Puts another one in its place."""
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As any decoder of transformers.

        Args:
            input_ids: int64 `[B, q]`; this or `inputs_embeds`.
            attention_mask: `[B, k]`, 0 where a token is padding; None: none is.
            past_key_values: What was read before.
            inputs_embeds: `[B, q, E]`.
            use_cache: Whether keys and values are kept.
            output_attentions: Whether attention weights are given out (`eager` only).
            output_hidden_states: Whether the states before each layer, and the normed last one, are given out.
            return_dict: Whether a named output is given.
            **kwargs: Ignored: `position_ids`, of which ALiBi knows nothing.

        Returns:
            The normed hidden states `[B, q, E]`, the cache, and what was asked for.

        Raises:
            ValueError: Neither or both of `input_ids` and `inputs_embeds` were given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        alibi, mask = self._biases(hidden, before, attention_mask)
        attentions: list[Tensor | None] = []
        states: list[Tensor] = []
        for layer in self.h:
            states.append(hidden)
            hidden, weights = layer(hidden, attention_mask=mask, alibi=alibi, past_key_values=past_key_values)
            attentions.append(weights)
        hidden = self.ln_f(hidden)
        asks = self.config.output_attentions if output_attentions is None else output_attentions
        shows = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        found = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if shows else None,
            attentions=tuple(attentions) if asks else None,
        )
        return found if return_dict in (None, True) else found.to_tuple()

    def _biases(self, hidden: Tensor, before: int, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`alibi` and `attention_mask` as the layers take them."""
        num_queries, device = hidden.shape[1], hidden.device
        places = torch.arange(before + num_queries, device=device)
        sees = places[None, :] <= places[before:, None]  # [q, k]
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask.all()):
            is_there = attention_mask.to(device, torch.bool)  # [B, k]
            places = (is_there.cumsum(dim=1) - 1).clamp_min(0) * is_there
            sees = sees & is_there[:, None, :]
        slopes = alibi_slopes(self.config.num_attention_heads).to(device)
        alibi = slopes[:, None] * places.view(-1, 1, places.shape[-1])  # [B or 1, H, k]
        if num_queries == 1 and sees.dim() == 2:
            return alibi, None
        mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=device)
        return alibi, mask.masked_fill(~sees, torch.finfo(hidden.dtype).min).view(-1, 1, *sees.shape[-2:])


class LongMemGPTForCausalLM(LongMemGPTPreTrainedModel, GenerationMixin):
    """The layers with their LM head. It has no dropout: as a backbone it is frozen.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LongMemGPTConfig) -> None:
        super().__init__(config)
        self.transformer = LongMemGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Puts another one in its place."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As any causal LM of transformers.

        Args:
            input_ids: int64 `[B, q]`.
            labels: int64 `[B, q]`, -100 where nothing is predicted; shifted here. None: there is no loss.
            logits_to_keep: How many of the last tokens are given logits, or which tokens; 0: all.
            return_dict: Whether a named output is given.
            **kwargs: As `LongMemGPTModel.forward` has them.

        Returns:
            Loss, logits `[B, q, V]`, and what the layers gave out.
        """
        found = self.transformer(input_ids=input_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        hidden = found.last_hidden_state
        logits = self.lm_head(hidden if isinstance(kept, int) else hidden[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        whole = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
        return whole if return_dict in (None, True) else whole.to_tuple()


AutoConfig.register(MODEL_TYPE, LongMemGPTConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemGPTConfig, LongMemGPTForCausalLM, exist_ok=True)
