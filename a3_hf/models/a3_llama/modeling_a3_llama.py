"""The model, as a difference from transformers' LLaMA: content tokens and query slots in one decoder pass."""

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, repeat_kv, rotate_half
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_masks import (
    AttentionMask,
    AttentionMasks,
    group_attention_mask,
    next_token_mask,
    sees_something,
    slots_attention_mask,
)
from .caching import CACHE, BothWordsMixin, NoPagedCacheMixin, check_filled, one_cache, take_cache
from .chunked_cross_entropy import chunked_cross_entropy, slot_cross_entropy
from .configuration_a3_llama import A3LlamaConfig
from .generation import A3GenerationMixin
from .infilling import A3InfillingMixin
from .input_validation import (
    check_content,
    check_integers,
    check_kept,
    check_keywords,
    check_labels,
    check_numbers,
    check_padding_mask,
)
from .likelihood import A3LikelihoodMixin
from .orders import left_tokens
from .pretrained import WholeCheckpointMixin
from .rope import FixedRotaryEmbedding
from .scoring import A3ScoringMixin


@dataclass
class A3ModelOutput(BothWordsMixin, BaseModelOutputWithPast):
    """Output of `A3LlamaModel`: `last_hidden_state` (B, Q, D) belongs to the query slots, `content_hidden_state`
    (B, C, D) to the content tokens (None where it was not computed); `hidden_states` and `attentions`, when asked for,
    hold C + Q rows, content first (the last of `hidden_states` holds the slots alone). `cache` (or
    `past_key_values`) holds content keys and values only.
    """

    content_hidden_state: torch.FloatTensor | None = None


@dataclass
class A3CausalLMOutput(BothWordsMixin, CausalLMOutputWithPast):
    """Output of `A3LlamaForCausalLM`: `token_losses` (B, Q), with `chunked_loss` alone, are each slot's own in nats, 0
    where nothing is scored, without gradient; `content_hidden_state` (B, C, D) and `content_logits` (N, V) are there where
    they were asked for.
    """

    token_losses: torch.FloatTensor | None = None
    content_hidden_state: torch.FloatTensor | None = None
    content_logits: torch.FloatTensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Identical to LLaMA's except: a boolean mask is obeyed, and a row that sees nothing gets zeros (as from `sdpa`)
    # instead of the average of everything, which would leak.
    if attention_mask is None or attention_mask.dtype != torch.bool:
        return llama_eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).masked_fill(~attention_mask, 0.0)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """LLaMA's `apply_rotary_pos_emb` for one of its two arguments: queries and keys differ in length here."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (states * cos) + (rotate_half(states) * sin)


class A3LlamaAttention(LlamaAttention):
    # Identical to LlamaAttention except: keys and values come from the first `content_length` rows only, and the mask is
    # one view for all rows or several, of one run of rows after the other. With `slots_only` the content rows do nothing
    # else: queries, masks and the output are those of the slots.
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: AttentionMasks,
        content_length: int,
        position_ids: torch.LongTensor | None = None,
        slots_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # `position_ids` stop here: a flash kernel would read positions that don't ascend as several packed texts.
        cache = take_cache(kwargs)
        heads = (-1, self.head_dim)
        content_states = hidden_states[:, :content_length]
        cos, sin = position_embeddings
        first_row = content_length if slots_only else 0
        hidden_states = hidden_states[:, first_row:]
        input_shape = hidden_states.shape[:-1]

        query_states = self.q_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        query_states = apply_rotary(query_states, cos[:, first_row:], sin[:, first_row:])
        key_states = self.k_proj(content_states).unflatten(-1, heads).transpose(1, 2)
        key_states = apply_rotary(key_states, cos[:, :content_length], sin[:, :content_length])
        value_states = self.v_proj(content_states).unflatten(-1, heads).transpose(1, 2)

        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        lengths = (input_shape[1],) if len(attention_mask) == 1 else (content_length, input_shape[1] - content_length)
        if attention_mask[0].rows is not None:
            lengths = tuple(view.rows for view in attention_mask)
        outputs = [
            attention_interface(
                self,
                queries,
                key_states[:, :, : view.keys],
                value_states[:, :, : view.keys],
                view.mask,
                dropout=0.0 if not self.training else self.attention_dropout,
                scaling=self.scaling,
                is_causal=view.is_causal,
                **kwargs,
            )
            for queries, view in zip(query_states.split(lengths, dim=2), attention_mask, strict=True)
        ]
        attn_weights = outputs[0][1]
        attn_output = outputs[0][0] if len(outputs) == 1 else torch.cat([output for output, _ in outputs], dim=1)
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


class A3LlamaLastLayer(LlamaDecoderLayer):
    # Identical to LlamaDecoderLayer except: with `slots_only` the content rows give their keys and values and go no further,
    # and the output (B, Q, D) is that of the slots.
    def forward(
        self, hidden_states: torch.Tensor, content_length: int, slots_only: bool = False, **kwargs
    ) -> torch.Tensor:
        if not slots_only:
            return super().forward(hidden_states, content_length=content_length, **kwargs)
        residual = hidden_states[:, content_length:]
        hidden_states, _ = self.self_attn(
            self.input_layernorm(hidden_states), content_length=content_length, slots_only=True, **kwargs
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class A3LlamaPreTrainedModel(WholeCheckpointMixin, LlamaPreTrainedModel):
    config_class = A3LlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "A3LlamaLastLayer"]
    own_weights = ("query_embed",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `WholeCheckpointMixin.from_pretrained`. From a LLaMA, `query_embed` alone is fresh: the mean token embedding,
        scaled to the token embeddings' root mean square (the paper doesn't say how it starts).
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            model.base_model.start_query_embed()
        return (model, info) if output_loading_info else model


class A3LlamaModel(A3LlamaPreTrainedModel, LlamaModel):
    """Identical to `LlamaModel` except: `query_embed`, the attention above, and query slots behind the content tokens."""

    _keys_to_ignore_on_load_unexpected = [*A3LlamaPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: A3LlamaConfig):
        super().__init__(config)
        self.layers[-1] = A3LlamaLastLayer(config, layer_idx=config.num_hidden_layers - 1)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = A3LlamaAttention(config=config, layer_idx=layer_idx)
        self.rotary_emb = FixedRotaryEmbedding(config=config)
        # An nn.Embedding, not a bare nn.Parameter: a missing one is then initialised, and peft can train and save it.
        self.query_embed = nn.Embedding(1, config.hidden_size)
        self.post_init()

    def start_query_embed(self) -> None:
        """Sets `query_embed` to the mean token embedding at the token embeddings' scale. Left as it is (normal, with
        the config's `initializer_range`) on the meta device.
        """
        weights = [self.embed_tokens.weight, self.query_embed.weight]
        if is_deepspeed_zero3_enabled():  # each rank has a part of each weight
            # No import statement: those of a checkpoint's code must be met wherever it is loaded.
            whole = import_module("deepspeed").zero.GatheredParameters(weights, modifier_rank=0)
        else:
            whole = nullcontext()
        with torch.no_grad(), whole:
            tokens, query = weights
            if tokens.is_meta or tokens.numel() == 0:
                return
            mean = tokens.float().mean(dim=0)
            scale = tokens.float().pow(2).mean().sqrt() / mean.pow(2).mean().sqrt().clamp_min(1e-12)
            query.copy_(mean * scale)

    def first_layer_keys(self, input_ids: torch.LongTensor, position_ids: torch.LongTensor) -> torch.Tensor:
        """(B, H, C, D / H) the first layer's keys of content (B, C), which depend on nothing but id and position: what a
        cache of these tokens must hold.
        """
        layer = self.layers[0]
        embeds = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(embeds, position_ids=position_ids)
        keys = layer.self_attn.k_proj(layer.input_layernorm(embeds))
        return apply_rotary(keys.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2), cos, sin)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | AttentionMasks | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        group_ids: torch.LongTensor | None = None,
        target_position_ids: torch.LongTensor | None = None,
        target_group_ids: torch.LongTensor | None = None,
        slots_to_keep: int | torch.Tensor = 0,
        document_ids: torch.LongTensor | None = None,
        target_document_ids: torch.LongTensor | None = None,
        target_input_ids: torch.LongTensor | None = None,
        content_hidden_state: bool = True,
        cache: Cache | None = None,
        **kwargs,
    ) -> A3ModelOutput:
        """One pass over content tokens and query slots (paper §1, both streams with one set of weights).

        Args:
            input_ids: (B, C) content tokens (or `inputs_embeds`, (B, C, D)).
            attention_mask: (B, cached + C), 0 at padding, on whichever side; or prepared `AttentionMasks`, taken as they are.
            position_ids: (B, C) or (1, C). Default: with groups, the number of tokens before, padding not counted;
                without, what LLaMA does.
            past_key_values, cache: two words for the content keys and values of earlier passes; everything new sees them.
            group_ids: (B, C) integers, lower = earlier; any values, any layout. None: left to right, as LLaMA.
            target_position_ids: (B, Q) positions that are asked for. None: with `group_ids`, a slot for every token;
                without, a slot after every token. Width 0 runs the content stream alone.
            target_group_ids: (B, Q) groups of the slots; a slot sees content of earlier groups only.
            slots_to_keep: where slots follow every token, only the last n of them (0: all) or those of the given
                indices, as LLaMA's `logits_to_keep`.
            document_ids: (B, C) integers, with `group_ids` and without a cache: documents of one row don't see each other.
                Their positions may go on from one to the next, for RoPE knows distances only.
            target_document_ids: (B, Q) documents of the slots; needed beside `target_position_ids`.
            target_input_ids: (B, Q) with `slot_start="left_token"`: the token to the left of each slot's where the slot may
                see it, and −1 elsewhere (`orders.left_tokens`). None: found in the content of this pass; needed with a
                cache or prepared `AttentionMasks`.
            content_hidden_state: False leaves the content rows of the last layer at keys and values, which is all that slots
                need of them, and the output's `content_hidden_state` at None. Without slots, and with
                `output_attentions`, which shows these rows, they are computed all the same.

        Raises:
            ValueError: shapes that don't match, ids that are not integers, documents where they can't be kept apart, an
                attention implementation that can't express the groups, or a cache under both words or a third.
            RuntimeError: the layers did not fill the cache.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        check_keywords(kwargs, type(self).forward)
        num_cached = cache.get_seq_length() if cache is not None else 0
        input_ids = check_content(
            input_ids, inputs_embeds, self.embed_tokens.num_embeddings, may_be_empty=cache is not None
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        implementation = self.config._attn_implementation
        content_length = inputs_embeds.shape[1]
        num_keys = content_length
        if cache is not None:  # a static cache is wider than what it holds
            num_keys, _ = cache.get_mask_sizes(content_length, 0)
        _check_arguments(
            inputs_embeds, attention_mask, position_ids, group_ids, target_position_ids, target_group_ids, num_cached
        )
        if document_ids is not None or target_document_ids is not None:
            _check_documents(
                attention_mask, group_ids, target_position_ids, document_ids, target_document_ids, num_cached
            )

        if self.config.slot_start == "left_token" or target_input_ids is not None:
            _check_left_tokens(
                self.config, input_ids, attention_mask, group_ids, target_position_ids, target_input_ids, num_cached
            )

        # 1. Positions of the content.
        position_ids, group_ids, target_position_ids, target_group_ids, target_input_ids = (
            None if ids is None else ids.long()
            for ids in (position_ids, group_ids, target_position_ids, target_group_ids, target_input_ids)
        )
        has_groups = group_ids is not None
        rows_before = None  # in the causal contract: the content rows whose next tokens the slots ask for
        if position_ids is None and has_groups and isinstance(attention_mask, torch.Tensor):
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, num_cached:]
        elif position_ids is None:
            position_ids = (torch.arange(content_length, device=inputs_embeds.device) + num_cached)[None]

        # 2. The slots, and what each row may see.
        if isinstance(attention_mask, tuple):
            masks = attention_mask
            if target_position_ids is None:
                target_position_ids = position_ids
        elif has_groups or (target_position_ids is not None and target_position_ids.shape[1] > 0):
            if not has_groups:
                group_ids = torch.arange(content_length, device=inputs_embeds.device)
                group_ids = group_ids.expand(inputs_embeds.shape[0], -1)
            if target_position_ids is None:
                target_position_ids, target_group_ids = position_ids, group_ids
                target_document_ids = document_ids
            masks = group_attention_mask(
                implementation,
                group_ids=group_ids,
                target_group_ids=group_ids[:, :0] if target_group_ids is None else target_group_ids,
                key_mask=attention_mask,
                num_cached=num_cached,
                num_keys=num_keys,
                document_ids=document_ids,
                target_document_ids=target_document_ids,
            )
        else:
            content_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
            if target_position_ids is None:
                check_kept(slots_to_keep, content_length)
                rows = torch.arange(content_length, device=inputs_embeds.device)
                rows = rows[-slots_to_keep:] if isinstance(slots_to_keep, int) else rows[slots_to_keep]
                masks = next_token_mask(implementation, content_mask, rows, content_length, num_keys)
                target_position_ids = position_ids[:, rows] + 1
                rows_before = rows
            else:
                masks = (AttentionMask(content_mask, is_causal=content_length > 1),)

        # 3. One pass: content rows first, then slots, which start as `query_embed`, or as the token on their left.
        hidden_states = inputs_embeds
        num_slots = target_position_ids.shape[1]
        if num_slots:
            slots = self.query_embed.weight.to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], num_slots, -1)
            from_left = self.config.slot_start == "left_token"
            if from_left and rows_before is not None:
                slots = inputs_embeds[:, rows_before]
            elif from_left:
                if target_input_ids is None:
                    target_input_ids = left_tokens(
                        input_ids,
                        position_ids,
                        group_ids,
                        target_position_ids,
                        target_group_ids,
                        key_mask=attention_mask,
                        document_ids=document_ids,
                        target_document_ids=target_document_ids,
                    )
                left_embeds = self.embed_tokens(target_input_ids.clamp_min(0))
                slots = torch.where((target_input_ids >= 0)[..., None], left_embeds, slots)
            if from_left:
                target_position_ids = target_position_ids - 1
            hidden_states = torch.cat([inputs_embeds, slots], dim=1)
            rows = max(position_ids.shape[0], target_position_ids.shape[0])
            position_ids = torch.cat([position_ids.expand(rows, -1), target_position_ids.expand(rows, -1)], dim=1)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        shows_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        slots_only = num_slots > 0 and not content_hidden_state and not shows_attentions
        last_layer = self.config.num_hidden_layers - 1
        filled = num_cached + content_length
        for layer_idx, decoder_layer in enumerate(self.layers[: last_layer + 1]):
            at_the_end = {}
            if slots_only and layer_idx == last_layer:
                masks = slots_attention_mask(masks, content_length)
                at_the_end = {"slots_only": True}
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                content_length=content_length,
                **{CACHE: cache},
                **at_the_end,
                **kwargs,
            )
        if cache is not None:
            check_filled(cache, filled, last_layer=last_layer)
        hidden_states = self.norm(hidden_states)
        if slots_only:
            return A3ModelOutput(last_hidden_state=hidden_states, **{CACHE: cache})
        return A3ModelOutput(
            last_hidden_state=hidden_states[:, content_length:],
            content_hidden_state=hidden_states[:, :content_length],
            **{CACHE: cache},
        )


class A3LlamaForCausalLM(
    NoPagedCacheMixin,
    A3LlamaPreTrainedModel,
    A3GenerationMixin,
    A3InfillingMixin,
    A3LikelihoodMixin,
    A3ScoringMixin,
    LlamaForCausalLM,
):
    """Identical to `LlamaForCausalLM` except: the body above, three forms of `forward`, and the methods
    `generate_any_order`, `infill`, `rewrite`, `score` and `log_likelihood`.
    """

    def __init__(self, config: A3LlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = A3LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | AttentionMasks | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        group_ids: torch.LongTensor | None = None,
        target_position_ids: torch.LongTensor | None = None,
        target_group_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        target_document_ids: torch.LongTensor | None = None,
        target_input_ids: torch.LongTensor | None = None,
        content_hidden_state: bool = False,
        content_logits_at: tuple[torch.LongTensor, torch.LongTensor] | None = None,
        chunked_loss: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> A3CausalLMOutput:
        """Three forms, by what is given:

        - `model(input_ids)`: LLaMA's causal contract. `logits[:, t]` (B, C, V) predicts token t + 1; `labels` (B, C) are
          shifted inside; `generate` and every tool for causal LMs work.
        - `model(input_ids, group_ids=g)`: `logits[:, i]` (B, C, V) scores `input_ids[:, i]` given all tokens of lower
          groups. `labels` (B, C) are not shifted. The lowest group sees nothing: its logits mean nothing.
        - with `target_position_ids` and `target_group_ids` (B, Q): logits (B, Q, V) and `labels` (B, Q) follow them.

        Other arguments as in `A3LlamaModel.forward`; −100 in `labels` is ignored. `content_logits_at`, rows and indices (N,)
        of content tokens, asks for what their own states forecast, `content_logits`. With `chunked_loss` the logits never
        exist all at once: the output holds `loss` and `token_losses` (B, Q), and no logits.

        Raises:
            ValueError: as `A3LlamaModel.forward`; a label of another shape than its logits, at padding, or where a slot
                sees nothing; `logits_to_keep` with groups or targets; `chunked_loss` without labels or groups.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        check_keywords(kwargs, type(self).forward)
        causal_contract = group_ids is None and target_position_ids is None
        if labels is not None:
            check_labels(
                labels, input_ids if inputs_embeds is None else inputs_embeds, self.vocab_size, causal_contract
            )
            labels = labels.long()
        if chunked_loss and (labels is None or causal_contract):
            raise ValueError("chunked_loss=True takes labels, with group_ids or target_position_ids")
        if not causal_contract:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError(
                    "logits_to_keep belongs to model(input_ids); with groups, ask for fewer targets instead"
                )
            if labels is not None:
                content = input_ids if input_ids is not None else inputs_embeds
                num_cached = cache.get_seq_length() if cache is not None else 0
                if document_ids is not None:
                    _check_documents(
                        attention_mask, group_ids, target_position_ids, document_ids, target_document_ids, num_cached
                    )
                _check_labels(
                    labels,
                    content,
                    attention_mask,
                    group_ids,
                    target_position_ids,
                    target_group_ids,
                    num_cached,
                    document_ids,
                    target_document_ids,
                )
        outputs: A3ModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            group_ids=group_ids,
            target_position_ids=target_position_ids,
            target_group_ids=target_group_ids,
            slots_to_keep=logits_to_keep,
            document_ids=document_ids,
            target_document_ids=target_document_ids,
            target_input_ids=target_input_ids,
            content_hidden_state=content_hidden_state or content_logits_at is not None,
            **kwargs,
        )
        content_logits = None
        if content_logits_at is not None:
            content_logits = self.lm_head(outputs.content_hidden_state[content_logits_at])
        loss = token_losses = logits = None
        if chunked_loss:
            loss, token_losses = chunked_cross_entropy(
                outputs.last_hidden_state, self.lm_head, labels, num_items=kwargs.get("num_items_in_batch")
            )
        else:
            logits = self.lm_head(outputs.last_hidden_state)
        if labels is not None and causal_contract:  # transformers' own loss, which shifts them
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif labels is not None and not chunked_loss:
            loss = slot_cross_entropy(logits, labels, num_items=kwargs.get("num_items_in_batch"))
        return A3CausalLMOutput(
            loss=loss,
            token_losses=token_losses,
            content_hidden_state=outputs.content_hidden_state if content_hidden_state else None,
            content_logits=content_logits,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _check_arguments(
    inputs_embeds, attention_mask, position_ids, group_ids, target_position_ids, target_group_ids, num_cached
) -> None:
    batch_size, content_length = inputs_embeds.shape[:2]
    prepared = isinstance(attention_mask, tuple | dict | BlockMask) or (
        isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and group_ids is None
    )
    if attention_mask is not None and not prepared:
        check_padding_mask("attention_mask", attention_mask, batch_size, num_cached, content_length)
    for name, ids in (("position_ids", position_ids), ("target_position_ids", target_position_ids)):
        if ids is not None:
            check_numbers(name, ids, at_least=0)
    if position_ids is not None and tuple(position_ids.shape) not in {
        (batch_size, content_length),
        (1, content_length),
    }:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it takes that of input_ids, "
            f"{(batch_size, content_length)}"
        )
    if group_ids is not None:
        check_integers("group_ids", group_ids)
        if tuple(group_ids.shape) != (batch_size, content_length):
            raise ValueError(
                f"group_ids has shape {tuple(group_ids.shape)}; it takes that of input_ids, {(batch_size, content_length)}"
            )
    if target_group_ids is not None:
        check_integers("target_group_ids", target_group_ids)
        if target_position_ids is None or target_position_ids.shape != target_group_ids.shape:
            shape = None if target_position_ids is None else tuple(target_position_ids.shape)
            raise ValueError(
                f"target_group_ids has shape {tuple(target_group_ids.shape)} and target_position_ids {shape}; they take "
                "the same, (batch, slots)"
            )
    if target_position_ids is not None:
        if target_position_ids.ndim != 2 or target_position_ids.shape[0] != batch_size:
            raise ValueError(
                f"target_position_ids has shape {tuple(target_position_ids.shape)}; it takes ({batch_size}, slots)"
            )
        prepared = isinstance(attention_mask, tuple)
        if target_position_ids.shape[1] and target_group_ids is None and not prepared:
            raise ValueError("target_position_ids needs target_group_ids, of the same shape: what may each slot see?")


def _check_left_tokens(
    config, input_ids, attention_mask, group_ids, target_position_ids, target_input_ids, num_cached
) -> None:
    if config.slot_start != "left_token":
        raise ValueError(f"target_input_ids has no effect with slot_start={config.slot_start!r}; leave it out")
    if target_input_ids is not None:
        check_numbers("target_input_ids", target_input_ids, at_least=-1, at_most=config.vocab_size - 1)
        if target_position_ids is None or target_input_ids.shape != target_position_ids.shape:
            shape = None if target_position_ids is None else tuple(target_position_ids.shape)
            raise ValueError(
                f"target_input_ids has shape {tuple(target_input_ids.shape)} and target_position_ids {shape}; they take "
                "the same"
            )
        return
    if (target_position_ids is None and group_ids is None) or (
        target_position_ids is not None and not target_position_ids.shape[1]
    ):
        return  # LLaMA's causal contract, or no slots
    for name, is_there in (
        ("a cache", num_cached > 0),
        ("prepared masks", isinstance(attention_mask, tuple)),
        ("inputs_embeds", input_ids is None),
    ):
        if is_there:
            raise ValueError(f"slot_start='left_token' with {name} needs target_input_ids: which token is on the left?")


def _check_documents(
    attention_mask, group_ids, target_position_ids, document_ids, target_document_ids, num_cached
) -> None:
    if document_ids is None:
        raise ValueError("target_document_ids needs document_ids: whose are the content tokens?")
    if isinstance(attention_mask, tuple) or group_ids is None or num_cached:
        raise ValueError(
            "document_ids takes group_ids, no cache and no prepared masks: only the masks of groups keep documents apart"
        )
    for name, ids in (("document_ids", document_ids), ("target_document_ids", target_document_ids)):
        if ids is not None:
            check_integers(name, ids)
    if document_ids.shape != group_ids.shape:
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)}; it takes that of input_ids, {tuple(group_ids.shape)}"
        )
    expected = None if target_position_ids is None else tuple(target_position_ids.shape)
    got = None if target_document_ids is None else tuple(target_document_ids.shape)
    if got != expected:
        raise ValueError(
            f"target_document_ids has shape {got} and target_position_ids {expected}; with document_ids they take the same"
        )


def _check_labels(
    labels,
    content,
    attention_mask,
    group_ids,
    target_position_ids,
    target_group_ids,
    num_cached,
    document_ids,
    target_document_ids,
) -> None:
    expected = (content.shape[0], content.shape[1] if target_position_ids is None else target_position_ids.shape[1])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; with groups it takes that of the slots, {expected}")
    if isinstance(attention_mask, tuple) or torch.compiler.is_compiling():
        return  # prepared masks: whoever made them knows what each slot sees
    if group_ids is None:
        group_ids = torch.arange(content.shape[1], device=content.device).expand(content.shape[0], -1)
    slots_are_tokens = target_position_ids is None
    scored = labels != -100
    if slots_are_tokens and attention_mask is not None and (scored & (attention_mask[:, num_cached:] == 0)).any():
        raise ValueError("labels holds a token at padding (attention_mask is 0 there); it takes -100 at padding")
    target_groups = group_ids if slots_are_tokens else target_group_ids
    if target_groups.shape[1] == 0:
        return
    blind = scored & ~sees_something(
        group_ids,
        target_groups,
        attention_mask,
        num_cached,
        document_ids=document_ids,
        target_document_ids=document_ids if slots_are_tokens else target_document_ids,
    )
    if blind.any():
        row, slot = blind.nonzero()[0].tolist()
        raise ValueError(
            f"labels asks for a score at row {row}, slot {slot}, which sees no token: nothing is in an earlier group. "
            "Put -100 there, or a given token (BOS) into an earlier group"
        )


A3LlamaConfig.register_for_auto_class("AutoConfig")
A3LlamaModel.register_for_auto_class("AutoModel")
A3LlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
