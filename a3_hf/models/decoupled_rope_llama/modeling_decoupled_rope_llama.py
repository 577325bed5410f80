"""Decoupled RoPE, as a difference from transformers' LLaMA: one stream, whose queries use the next token's position."""

import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.utils.generic import can_return_tuple

from a3_hf.models.a3_llama.caching import CACHE, check_filled, one_cache, take_cache
from a3_hf.models.a3_llama.chunked_cross_entropy import apply_head
from a3_hf.models.a3_llama.infilling import A3InfillingMixin
from a3_hf.models.a3_llama.input_validation import (
    check_content,
    check_kept,
    check_keywords,
    check_labels,
)
from a3_hf.models.a3_llama.likelihood import A3LikelihoodMixin, checked_text
from a3_hf.models.a3_llama.modeling_outputs import A3CausalLMOutput
from a3_hf.models.a3_llama.pretrained import WholeCheckpointMixin
from a3_hf.models.a3_llama.rope import FixedRotaryEmbedding, apply_rotary
from a3_hf.models.a3_llama.scoring import A3ScoringMixin

from .configuration_decoupled_rope_llama import DecoupledRopeLlamaConfig
from .generation_decoupled_rope import DecoupledRopeGenerationMixin
from .input_validation import (
    check_groups,
    check_mask_and_positions,
    check_one_stream,
    check_singletons,
    check_state_labels,
    check_targets,
)
from .successors import successors_of

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (B or 1, C, D / H)


class DecoupledRopeLlamaAttention(LlamaAttention):
    # Identical to LlamaAttention except: `rotations`, if given, are separate RoPE rotations for queries and keys.
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if "rotations" not in kwargs:  # None selects LLaMA's own attention
            raise RuntimeError(
                f"transformers {transformers.__version__}: LlamaModel no longer passes its keyword arguments to attention, so "
                "Decoupled RoPE's rotations are lost"
            )
        rotations = kwargs.pop("rotations")
        if rotations is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        cache = take_cache(kwargs)
        query_rotation, key_rotation = rotations
        query_states, key_states, value_states = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_states = apply_rotary(query_states, *query_rotation)
        key_states = apply_rotary(key_states, *key_rotation)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attn_output, attn_weights = attend(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()), attn_weights


class DecoupledRopeLlamaPreTrainedModel(WholeCheckpointMixin, LlamaPreTrainedModel):
    config_class = DecoupledRopeLlamaConfig


class DecoupledRopeLlamaModel(DecoupledRopeLlamaPreTrainedModel, LlamaModel):
    """Identical to `LlamaModel` except: `DecoupledRopeLlamaAttention`, and rows in generation order, where each token gets
    the position of the next (paper §2). It has exactly LLaMA's weights.

    Token t of the order, x_σ(t), rotates its key by its own position σ(t) and its query by σ(t + 1) − 1; its state predicts
    x_σ(t + 1). The paper rotates the query by σ(t + 1), an equivalent up to a shift by one; with the −1, left to right is
    LLaMA bit for bit before any training. A token's states depend on its successor's position, known when it is encoded,
    and on nothing later, so a cache is exact.
    """

    _keys_to_ignore_on_load_unexpected = [
        *DecoupledRopeLlamaPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",
    ]

    def __init__(self, config: DecoupledRopeLlamaConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = DecoupledRopeLlamaAttention(config=config, layer_idx=layer_idx)
        self.rotary_emb = FixedRotaryEmbedding(config=config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        group_ids: torch.LongTensor | None = None,
        target_position_ids: torch.LongTensor | None = None,
        target_group_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        target_document_ids: torch.LongTensor | None = None,
        content_hidden_state: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs one pass, in one of three forms:

        - neither `group_ids` nor `target_position_ids`: LLaMA's.
        - `target_position_ids` (B, C) and `position_ids`: rows in generation order, with the position that each token
          predicts. State t (B, C, D) is that of token t.
        - `group_ids`: rows in any storage order, sorted inside. State i (B, C, D) predicts token i; with
          `target_position_ids` and `target_group_ids` (B, Q), state q (B, Q, D) predicts the token of slot q.

        Args:
            input_ids: (B, C) tokens (or `inputs_embeds`, (B, C, D)).
            attention_mask: (B, cached + C), 0 at padding, on either side.
            position_ids: (B, C) or (1, C). Default with groups: the number of tokens before, without padding.
            past_key_values, cache: two names for keys and values of the tokens earlier in the order; not with groups.
            group_ids: (B, C) integers, lower = earlier, distinct within a row; any values, in any storage order. A row's
                first token is given: no token predicts it, and its state is 0. `hidden_states` and `attentions`, if
                requested, are in generation order, padding last.
            target_group_ids: (B, Q) groups of the slots. A slot's position must be that of the successor of the last token
                in an earlier group, unless that token has none. The state is 0 if there is no earlier token.
            document_ids, target_document_ids: None; documents of a row are not supported.
            content_hidden_state: False; there is one stream.

        Raises:
            ValueError: groups of several tokens; a slot that the token before it does not predict; shapes that don't match,
                ids that are not integers, arguments for two streams, or a cache under both keywords or an unknown one.
            RuntimeError: the layers did not fill the cache.
        """
        cache = one_cache(past_key_values, cache, kwargs, takes_paged=True)
        if cache is None or isinstance(cache, Cache):  # continuous batching passes other keyword arguments too
            check_keywords(kwargs, type(self).forward)
        input_ids = check_content(
            input_ids, inputs_embeds, self.embed_tokens.num_embeddings, may_be_empty=cache is not None
        )
        check_one_stream(document_ids, target_document_ids, content_hidden_state)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        num_cached = cache.get_seq_length() if isinstance(cache, Cache) else 0
        check_mask_and_positions(inputs_embeds, attention_mask, position_ids, num_cached)
        if group_ids is None and target_position_ids is None and target_group_ids is None:
            return self._llama(
                inputs_embeds,
                cache,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                rotations=None,
                **kwargs,
            )
        if group_ids is None:
            check_targets(inputs_embeds, position_ids, target_position_ids, target_group_ids)
            # Rows are in generation order, so LLaMA's causal mask is right; only `rotations` use the positions.
            return self._llama(
                inputs_embeds,
                cache,
                attention_mask=attention_mask,
                use_cache=use_cache,
                rotations=self._rotations(inputs_embeds, position_ids, target_position_ids),
                **kwargs,
            )

        check_groups(inputs_embeds, group_ids, target_position_ids, target_group_ids)
        if cache is not None or use_cache:
            raise ValueError(
                "past_key_values and use_cache=True don't work with group_ids, as a cache needs rows in generation order. "
                "Pass position_ids and target_position_ids (the positions of successors) instead."
            )
        return self._in_any_order(
            inputs_embeds, attention_mask, position_ids, group_ids, target_position_ids, target_group_ids, **kwargs
        )

    def _in_any_order(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        group_ids: torch.Tensor,
        target_position_ids: torch.Tensor | None,
        target_group_ids: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The form of `forward` with `group_ids`."""
        batch_size, length, _ = inputs_embeds.shape
        real = inputs_embeds.new_ones(batch_size, length, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.to(torch.bool)
        if position_ids is None:
            position_ids = (real.long().cumsum(dim=1) - 1).clamp_min(0)

        # 1. Generation order, padding last, so that the causal mask hides it.
        groups = group_ids.long().masked_fill(~real, torch.iinfo(torch.long).max)
        order = groups.argsort(dim=1, stable=True)
        groups, real, positions = (
            tensor.gather(1, order) for tensor in (groups, real, position_ids.expand(batch_size, -1))
        )
        check_singletons(groups, real)

        # 2. The number of tokens before each predicted one, and the position of each token's successor.
        if target_group_ids is None:
            num_before, successors = order.argsort(dim=1), successors_of(positions, real)
        else:
            num_before = torch.searchsorted(groups, target_group_ids.long().contiguous())
            successors = successors_of(positions, real, target_position_ids, num_before)

        # 3. One pass; a token is predicted by the state of the one before it.
        outputs = self._llama(
            inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds)),
            None,
            use_cache=False,
            rotations=self._rotations(inputs_embeds, positions, successors),
            **kwargs,
        )
        states = nn.functional.pad(outputs.last_hidden_state, (0, 0, 1, 0))
        outputs.last_hidden_state = states.gather(1, num_before[..., None].expand(-1, -1, states.shape[2]))
        return outputs

    def _llama(self, inputs_embeds: torch.Tensor, cache: Cache | None, **arguments) -> BaseModelOutputWithPast:
        """Runs `LlamaModel.forward` with the cache under its installed keyword, and checks the cache after it."""
        if cache is not None and not isinstance(cache, Cache):  # continuous batching's cache, passed on unchanged
            return super().forward(inputs_embeds=inputs_embeds, return_dict=True, cache=cache, **arguments)
        filled = inputs_embeds.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        outputs = super().forward(inputs_embeds=inputs_embeds, return_dict=True, **{CACHE: cache}, **arguments)
        if getattr(outputs, CACHE) is not None:
            check_filled(getattr(outputs, CACHE), filled, last_layer=self.config.num_hidden_layers - 1)
        return outputs

    def _rotations(
        self, states: torch.Tensor, position_ids: torch.Tensor, successor_ids: torch.Tensor
    ) -> tuple[Rotation, Rotation]:
        """Returns the rotations of queries and of keys, for tokens at `position_ids` with successors at `successor_ids`. One
        call computes both, as some kinds of RoPE depend on the largest position of a pass.
        """
        rows = max(position_ids.shape[0], successor_ids.shape[0])
        both = torch.cat([successor_ids.expand(rows, -1) - 1, position_ids.expand(rows, -1)], dim=1)
        cos, sin = (part.chunk(2, dim=1) for part in self.rotary_emb(states, position_ids=both))
        return (cos[0], sin[0]), (cos[1], sin[1])


class DecoupledRopeLlamaForCausalLM(
    DecoupledRopeLlamaPreTrainedModel,
    DecoupledRopeGenerationMixin,
    A3InfillingMixin,
    A3LikelihoodMixin,
    A3ScoringMixin,
    LlamaForCausalLM,
):
    """Identical to `LlamaForCausalLM` except: `DecoupledRopeLlamaModel`, three forms of `forward`, and A3's methods
    `generate_any_order`, `infill`, `rewrite`, `score` and `log_likelihood`, for groups of one token.
    """

    def __init__(self, config: DecoupledRopeLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DecoupledRopeLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
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
        content_hidden_state: bool = False,
        content_logits_at: tuple[torch.LongTensor, torch.LongTensor] | None = None,
        chunked_loss: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> A3CausalLMOutput:
        """Returns logits and loss, in one of three forms:

        - `model(input_ids)`: LLaMA's causal contract, and LLaMA's values. `labels` (B, C) are shifted inside.
        - `model(input_ids, group_ids=g)`: `logits[:, i]` (B, C, V) predicts `input_ids[:, i]` given all tokens of lower
          groups, of one token each. `labels` (B, C) are not shifted. The lowest group sees nothing: its logits are
          meaningless. With `target_position_ids` and `target_group_ids` (B, Q), logits (B, Q, V) and `labels` (B, Q) are
          those of slots.
        - `model(input_ids, position_ids=p, target_position_ids=q)`, both (B, C), rows in generation order: `logits[:, t]`
          (B, C, V) predicts the token at position `q[:, t]` given tokens up to t. `labels` (B, C) are not shifted.

        Other arguments as in `DecoupledRopeLlamaModel.forward`; −100 in `labels` is ignored. `logits_to_keep` is LLaMA's (the
        last n, or indices (n,)) or indices (B, n) per row; not with groups. With `chunked_loss`, the output has `loss` and
        `token_losses` (the labels' shape), but no logits, which are never all held at once.

        Raises:
            ValueError: as `DecoupledRopeLlamaModel.forward`; labels that differ in shape from the logits; a label at padding
                or where nothing is seen; `logits_to_keep` with groups; `chunked_loss` without labels, groups or targets;
                `content_logits_at`, which needs two streams.
        """
        cache = one_cache(past_key_values, cache, kwargs, takes_paged=True)
        if cache is None or isinstance(cache, Cache):  # continuous batching passes other keyword arguments too
            check_keywords(kwargs, type(self).forward)
        causal_contract = group_ids is None and target_position_ids is None
        if chunked_loss and (labels is None or causal_contract):
            raise ValueError("chunked_loss=True: expected labels, and group_ids or target_position_ids")
        if labels is not None:
            content = input_ids if inputs_embeds is None else inputs_embeds
            labels = check_labels(labels, content, self.vocab_size, causal_contract)
        if content_logits_at is not None:
            raise ValueError("content_logits_at: expected None, as there is one stream. Use `logits`.")
        if group_ids is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep does not work with group_ids. Pass fewer targets instead.")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            group_ids=group_ids,
            target_position_ids=target_position_ids,
            target_group_ids=target_group_ids,
            document_ids=document_ids,
            target_document_ids=target_document_ids,
            content_hidden_state=content_hidden_state,
            **kwargs,
        )
        hidden_states = _kept(outputs.last_hidden_state, logits_to_keep)
        if labels is not None and not causal_contract:
            check_state_labels(labels, hidden_states, attention_mask, group_ids, target_group_ids)
        head = apply_head(self, hidden_states, labels, kwargs, is_shifted=causal_contract, chunked=chunked_loss)
        return A3CausalLMOutput(
            **head._asdict(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def log_likelihood_and_greedy(
        self,
        input_ids: torch.LongTensor,
        group_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scored_mask: torch.Tensor | None = None,
    ) -> tuple[torch.FloatTensor, torch.BoolTensor]:
        """Returns `log_likelihood`, and (B, S) True where a scored token is the likeliest at its position. A group of several
        tokens raises a ValueError.
        """
        input_ids, group_ids, attention_mask, scored_mask = checked_text(
            input_ids, group_ids, attention_mask, scored_mask, vocab_size=self.config.vocab_size
        )
        if attention_mask is not None:
            # Rows with fewer tokens to score also get padding columns as slots; in the lowest group, nothing predicts them.
            group_ids = group_ids.masked_fill(~attention_mask, torch.iinfo(group_ids.dtype).min)
        return super().log_likelihood_and_greedy(input_ids, group_ids, attention_mask, scored_mask=scored_mask)


def _kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    check_kept(logits_to_keep, hidden_states.shape[1])
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[2]))
