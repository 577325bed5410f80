"""The A3 model, as a difference from transformers' LLaMA: content tokens and query slots in one decoder pass."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import A3LlamaAttention
from .attention_masks import AttentionMasks, pass_masks
from .caching import CACHE, NoPagedCacheMixin, check_filled, one_cache
from .chunked_cross_entropy import HeadOutput, apply_head
from .configuration_a3_llama import A3LlamaConfig
from .frozen_content import content_has_no_gradient, run_on_frozen_content
from .generation import A3GenerationMixin
from .infilling import A3InfillingMixin
from .input_validation import check_content, check_kept, check_keywords, check_labels
from .likelihood import A3LikelihoodMixin
from .modeling_outputs import A3CausalLMOutput, A3ModelOutput
from .orders import ContentTokens, QuerySlots, left_tokens
from .packed_layers import PackedLayers
from .pass_validation import check_pass, check_slot_labels
from .pretrained import WholeCheckpointMixin, start_query_embed
from .rope import FixedRotaryEmbedding
from .scoring import A3ScoringMixin


class A3LlamaPreTrainedModel(WholeCheckpointMixin, LlamaPreTrainedModel):
    config_class = A3LlamaConfig
    _no_split_modules = ["LlamaDecoderLayer"]
    own_weights = ("query_embed",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `WholeCheckpointMixin.from_pretrained`; from a LLaMA, `query_embed` is initialised by `start_query_embed`."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            body = model.base_model
            start_query_embed(body.embed_tokens, body.query_embed)
        return (model, info) if output_loading_info else model


class A3LlamaModel(A3LlamaPreTrainedModel, LlamaModel):
    """Identical to `LlamaModel` except: `query_embed`, `A3LlamaAttention`, and query slots after the content tokens.

    Attributes:
        content_is_frozen: set by adapters of slots. Where a training pass finds nothing else that learns, it then runs content
            rows without gradients: the same values and gradients in less time and memory.
        packed_layers: set by `A3LlamaForCausalLM.pack_weights`; runs passes of few rows.
    """

    _keys_to_ignore_on_load_unexpected = [*A3LlamaPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: A3LlamaConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = A3LlamaAttention(config=config, layer_idx=layer_idx)
        self.rotary_emb = FixedRotaryEmbedding(config=config)
        # An nn.Embedding rather than an nn.Parameter, so that transformers initialises it and peft can train and save it.
        self.query_embed = nn.Embedding(1, config.hidden_size)
        self.content_is_frozen = False
        self.packed_layers: PackedLayers | None = None
        self.post_init()

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
        cache: Cache | None = None,
        kept_layer: int | None = None,
        **kwargs,
    ) -> A3ModelOutput:
        """Runs one pass over content tokens and query slots (paper §1, both streams with one set of weights).

        Args:
            input_ids: (B, C) content tokens (or `inputs_embeds`, (B, C, D)).
            attention_mask: (B, cached + C), 0 at padding, on either side; or prepared `AttentionMasks`, used unchanged.
            position_ids: (B, C) or (1, C). Default: with groups, the number of tokens before, without padding; else
                LLaMA's.
            past_key_values, cache: two names for content keys and values of earlier passes; all new rows see them.
            group_ids: (B, C) integers, lower = earlier; any values, in any storage order. None: left to right, as LLaMA.
            target_position_ids: (B, Q) positions to predict. None: with `group_ids`, a slot for every token; without, a
                slot after every token. Width 0: no slots, content stream only.
            target_group_ids: (B, Q) groups of the slots; a slot sees content of earlier groups only.
            slots_to_keep: if slots follow every token: only the last n of them (0: all), or those at the given indices, as
                LLaMA's `logits_to_keep`.
            document_ids: (B, C) integers, with `group_ids` and without a cache: documents of one row don't see each other.
                Positions may continue across documents, since RoPE depends on distances only.
            target_document_ids: (B, Q) documents of the slots; needed with `target_position_ids`.
            target_input_ids: (B, Q) with `slot_start="left_token"`: the token to the left of each slot's position if the
                slot sees it, else −1 (`orders.left_tokens`). None: looked up in the content of this pass; required with a
                cache or prepared `AttentionMasks`.
            kept_layer: also return the content's hidden states before this layer (after the last one, with the number of
                layers), which draft heads start from.

        Raises:
            ValueError: shapes that don't match, ids that are not integers, documents that can't be masked, an attention
                implementation that can't express the groups, a layer that isn't there, or a cache under both keywords or an
                unknown one.
            RuntimeError: the layers did not fill the cache.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        check_keywords(kwargs, type(self).forward)
        if kept_layer is not None and not 0 <= kept_layer <= len(self.layers):
            raise ValueError(f"kept_layer={kept_layer}: expected 0 to {len(self.layers)}")
        num_cached = cache.get_seq_length() if cache is not None else 0
        input_ids = check_content(
            input_ids, inputs_embeds, self.embed_tokens.num_embeddings, may_be_empty=cache is not None
        )
        no_gradient_in_content = cache is None and content_has_no_gradient(self, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None and not no_gradient_in_content:
            cache = DynamicCache(config=self.config)
        content = ContentTokens(input_ids, position_ids, group_ids, document_ids)
        slots = QuerySlots(target_position_ids, target_group_ids, target_document_ids, target_input_ids)
        check_pass(content, slots, inputs_embeds, attention_mask, num_cached, self.config)
        content, slots = (type(ids)(*(None if one is None else one.long() for one in ids)) for ids in (content, slots))

        # 1. Positions of the content.
        content = _with_positions(content, inputs_embeds, attention_mask, num_cached)

        # 2. The slots: as given, or one for each token, or (LLaMA's causal contract) one after each of `rows`.
        is_prepared, rows = isinstance(attention_mask, tuple), None
        if slots.position_ids is None and content.group_ids is None and not is_prepared:
            check_kept(slots_to_keep, inputs_embeds.shape[1])
            rows = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            rows = rows[-slots_to_keep:] if isinstance(slots_to_keep, int) else rows[slots_to_keep]
            slots = QuerySlots(content.position_ids[:, rows] + 1)
        elif slots.position_ids is None:
            slots = content.slots()._replace(left_token_ids=slots.left_token_ids)

        # 3. What each row sees.
        masks = attention_mask
        if not is_prepared:
            masks, content, slots = pass_masks(self.config, content, slots, rows, inputs_embeds, attention_mask, cache)

        # 4. The layers: content rows first, then the slots.
        hidden_states, position_ids = self._rows(content, slots, rows, inputs_embeds, attention_mask)
        content_length, last_layer = inputs_embeds.shape[1], self.config.num_hidden_layers - 1
        filled = num_cached + content_length  # now: a static cache counts in place
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        shows_layers = any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_attentions", "output_hidden_states")
        )
        kept = None
        if no_gradient_in_content and slots.position_ids.shape[1] and not shows_layers and kept_layer is None:
            content_rows, hidden_states = run_on_frozen_content(
                self, hidden_states, masks, position_embeddings, content_length, **kwargs
            )
            return A3ModelOutput(self.norm(hidden_states), content_hidden_state=self.norm(content_rows).detach())
        if self.packed_layers is not None and not shows_layers and self.packed_layers.can_run(hidden_states, masks):
            hidden_states, kept = self.packed_layers(
                hidden_states, masks, position_embeddings, content_length, cache, kept_layer
            )
        else:
            for index, decoder_layer in enumerate(self.layers):
                kept = hidden_states if index == kept_layer else kept
                hidden_states = decoder_layer(
                    hidden_states,
                    attention_mask=masks,
                    position_embeddings=position_embeddings,
                    position_ids=position_ids,
                    use_cache=use_cache,
                    content_length=content_length,
                    **{CACHE: cache},
                    **kwargs,
                )
            kept = hidden_states if kept_layer == len(self.layers) else kept
        if cache is not None:
            check_filled(cache, filled, last_layer=last_layer)
        hidden_states = self.norm(hidden_states)
        return A3ModelOutput(
            last_hidden_state=hidden_states[:, content_length:],
            content_hidden_state=hidden_states[:, :content_length],
            kept_hidden_state=None if kept is None else kept[:, :content_length],
            **{CACHE: cache},
        )

    def _rows(
        self,
        content: ContentTokens,
        slots: QuerySlots,
        rows: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | AttentionMasks | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the layers' input (B, C + Q, D) and positions (B or 1, C + Q). Slots start as `query_embed` at the position
        that they predict; with `slot_start="left_token"`, all use the position to the left, and slots that see the token
        there start as its embedding (not specified in the paper).
        """
        batch_size, num_slots = inputs_embeds.shape[0], slots.position_ids.shape[1]
        if num_slots == 0:
            return inputs_embeds, content.position_ids
        start = self.query_embed.weight.to(inputs_embeds.dtype).expand(batch_size, num_slots, -1)
        target_position_ids = slots.position_ids
        if self.config.slot_start == "left_token":
            target_position_ids = target_position_ids - 1
            left = slots.left_token_ids
            if rows is None and left is None:
                left = left_tokens(content, slots, key_mask=attention_mask)
            if rows is None:
                left_embeds = self.embed_tokens(left.clamp_min(0))
                start = torch.where((left >= 0)[..., None], left_embeds, start)
            else:
                start = inputs_embeds[:, rows]
        num_rows = max(content.position_ids.shape[0], target_position_ids.shape[0])
        position_ids = (content.position_ids.expand(num_rows, -1), target_position_ids.expand(num_rows, -1))
        return torch.cat([inputs_embeds, start], dim=1), torch.cat(position_ids, dim=1)


def _with_positions(
    content: ContentTokens, inputs_embeds: torch.Tensor, attention_mask, num_cached: int
) -> ContentTokens:
    if content.position_ids is not None:
        return content
    if content.group_ids is not None and isinstance(attention_mask, torch.Tensor):
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, num_cached:]
    else:
        position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + num_cached)[None]
    return content._replace(position_ids=position_ids)


class A3LlamaForCausalLM(
    NoPagedCacheMixin,
    A3LlamaPreTrainedModel,
    A3GenerationMixin,
    A3InfillingMixin,
    A3LikelihoodMixin,
    A3ScoringMixin,
    LlamaForCausalLM,
):
    """Identical to `LlamaForCausalLM` except: the body `A3LlamaModel`, three forms of `forward`, and the methods
    `generate_any_order`, `infill`, `rewrite`, `score` and `log_likelihood`.
    """

    def __init__(self, config: A3LlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = A3LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def pack_weights(self) -> None:
        """Speeds up `generate_any_order`, `infill` and `rewrite` on a CPU: passes of few rows take fewer and wider products,
        with a copy of the weights that is packed for them. The same values up to rounding; twice the memory of the weights.
        After a change of weights or adapters, the copy is unused until the next call.

        Raises:
            ValueError: weights that are not float32 or float64 on a CPU, another attention than `sdpa`, or linear layers with
                a bias or of an unknown kind.
        """
        self.model.packed_layers = PackedLayers(self.model, self.lm_head)

    def generation_context(self) -> AbstractContextManager:
        packed = self.model.packed_layers
        return nullcontext() if packed is None else packed.in_use()

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
        kept_layer: int | None = None,
        **kwargs,
    ) -> A3CausalLMOutput:
        """Returns logits and loss, in one of three forms:

        - `model(input_ids)`: LLaMA's causal contract. `logits[:, t]` (B, C, V) predicts token t + 1; `labels` (B, C) are
          shifted inside; `generate` and all tools for causal LMs work.
        - `model(input_ids, group_ids=g)`: `logits[:, i]` (B, C, V) predicts `input_ids[:, i]` given all tokens of lower
          groups. `labels` (B, C) are not shifted. The lowest group sees nothing: its logits are meaningless.
        - with `target_position_ids` and `target_group_ids` (B, Q): logits (B, Q, V) and `labels` (B, Q) are those of slots.

        Other arguments as in `A3LlamaModel.forward`; −100 in `labels` is ignored. `content_logits_at`, rows and columns
        (N,) or (B, n) of content tokens, adds `content_logits`, the logits of their content states. With `chunked_loss`, the
        output has `loss` and `token_losses` (B, Q), but no logits, which are never all held at once.

        Raises:
            ValueError: as `A3LlamaModel.forward`; labels that differ in shape from the logits; a label at padding or where
                a slot sees nothing; `logits_to_keep` with groups or targets; `chunked_loss` without labels or groups.
        """
        cache = one_cache(past_key_values, cache, kwargs)
        check_keywords(kwargs, type(self).forward)
        causal_contract = group_ids is None and target_position_ids is None
        if chunked_loss and (labels is None or causal_contract):
            raise ValueError("chunked_loss=True: expected labels, and group_ids or target_position_ids")
        if labels is not None:
            content = input_ids if inputs_embeds is None else inputs_embeds
            labels = check_labels(labels, content, self.vocab_size, causal_contract)
        if not causal_contract:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("logits_to_keep works with model(input_ids) only. With groups, pass fewer targets.")
            if labels is not None:
                content = ContentTokens(input_ids, position_ids, group_ids, document_ids)
                slots = QuerySlots(target_position_ids, target_group_ids, target_document_ids)
                shape = tuple((inputs_embeds if input_ids is None else input_ids).shape[:2])
                num_cached = cache.get_seq_length() if cache is not None else 0
                check_slot_labels(labels, content, slots, shape, attention_mask, num_cached)
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
            kept_layer=kept_layer,
            **kwargs,
        )
        packed = self.model.packed_layers
        content_logits = None
        if content_logits_at is not None:
            states = outputs.content_hidden_state[content_logits_at]
            is_packed = packed is not None and packed.can_run(states)
            content_logits = packed.logits(states) if is_packed else self.lm_head(states)
        if labels is None and packed is not None and packed.can_run(outputs.last_hidden_state):
            head = HeadOutput(packed.logits(outputs.last_hidden_state))
        else:
            head = apply_head(
                self, outputs.last_hidden_state, labels, kwargs, is_shifted=causal_contract, chunked=chunked_loss
            )
        return A3CausalLMOutput(
            **head._asdict(),
            content_hidden_state=outputs.content_hidden_state if content_hidden_state else None,
            content_logits=content_logits,
            kept_hidden_state=outputs.kept_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


A3LlamaConfig.register_for_auto_class("AutoConfig")
A3LlamaModel.register_for_auto_class("AutoModel")
A3LlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
