"""Masked diffusion, as a difference from transformers' LLaMA: bidirectional attention, a mask token, shifted logits."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.generic import can_return_tuple

from a3_hf.models.a3_llama.caching import CACHE_WORDS, NoPagedCacheMixin, refuse_other_words
from a3_hf.models.a3_llama.infilling import A3InfillingMixin
from a3_hf.models.a3_llama.input_validation import (
    check_content,
    check_keywords,
    check_labels,
)
from a3_hf.models.a3_llama.likelihood import SLOTS_PER_CHUNK
from a3_hf.models.a3_llama.pretrained import WholeCheckpointMixin
from a3_hf.models.a3_llama.rope import FixedRotaryEmbedding
from a3_hf.models.a3_llama.scoring import A3ScoringMixin

from .configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from .corruption import check_mask_token
from .generation_masked_diffusion import UnmaskingMixin
from .input_validation import check_shapes
from .likelihood_masked_diffusion import DiffusionLikelihoodMixin

# Attention implementations that support any mask tensor.
PATTERNED = ("sdpa", "eager")


@dataclass
class MaskedDiffusionOutput(CausalLMOutput):
    """Output of `MaskedDiffusionLlamaForCausalLM`. With `labels` it has no `logits`, but `token_losses` (B, S): unweighted
    losses in nats, without gradient, 0 where not scored.
    """

    token_losses: torch.FloatTensor | None = None


class MaskedDiffusionLlamaForCausalLM(
    NoPagedCacheMixin,
    WholeCheckpointMixin,
    UnmaskingMixin,
    A3InfillingMixin,
    DiffusionLikelihoodMixin,
    A3ScoringMixin,
    LlamaForCausalLM,
):
    """Identical to `LlamaForCausalLM` except (paper §3, as DiffuLLaMA and Dream adapt a LLaMA):

    - every token sees every other (`config.is_causal` is False), and there is no cache;
    - the input holds mask tokens, which have probability 0 in the output;
    - targets of `forward` are not shifted: token i is predicted by the state before it, as in LLaMA. The first token of a
      row (BOS) must be given;
    - it has the methods `generate_any_order`, `infill`, `rewrite`, `score`, `log_likelihood`, `log_likelihood_bound` and
      `exact_bound`, but no `generate`.
    """

    config_class = MaskedDiffusionLlamaConfig

    def __init__(self, config: MaskedDiffusionLlamaConfig):
        super().__init__(config)
        self.model.rotary_emb = FixedRotaryEmbedding(config=config)

    def set_mask_token(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None = None) -> int:
        """Sets `config.mask_token_id` and returns it. The embedding of a new mask token is overwritten by the tokenizer's mean
        token embedding; one that the config already has is not changed.

        Args:
            tokenizer: the model's tokenizer; not modified, so no text encodes to a newly added mask token.
            mask_token_id: e.g. a reserved special token. None: the config's, else the tokenizer's mask token, else the first
                id after the tokenizer's, for which an embedding row is added if missing.

        Raises:
            ValueError: an id that is a text token, BOS or EOS of the tokenizer, or not one of the model's ids.
        """
        vocabulary = sorted(set(tokenizer.get_vocab().values()))
        for known in (self.config.mask_token_id, tokenizer.mask_token_id, vocabulary[-1] + 1):
            mask_token_id = known if mask_token_id is None else mask_token_id
        if mask_token_id == vocabulary[-1] + 1 == self.config.vocab_size:
            with torch.random.fork_rng():  # resizing draws random values for the row, which is set below
                self.resize_token_embeddings(self.config.vocab_size + 1, mean_resizing=False)
        check_mask_token(tokenizer, mask_token_id, vocab_size=self.config.vocab_size)
        if mask_token_id != self.config.mask_token_id:
            words = [token_id for token_id in vocabulary if token_id != mask_token_id]
            # The head's row is set too, to keep it deterministic, although the mask token is never predicted.
            with torch.no_grad():
                for embeddings in (self.get_input_embeddings().weight, self.get_output_embeddings().weight):
                    embeddings[mask_token_id] = embeddings[words].float().mean(dim=0).to(embeddings.dtype)
            self.config.mask_token_id = mask_token_id
        return mask_token_id

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        target_columns: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        visible_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MaskedDiffusionOutput:
        """Returns logits or the loss, in one of three forms:

        - `model(input_ids)`: LLaMA's logits (B, S, V); `[:, i − 1]` predicts token i.
        - with `target_columns` (B, Q): logits (B, Q, V); `[:, q]` predicts the token at column `target_columns[:, q]`.
        - with `labels`: the loss only, Σ weight · −log p(label), divided by `num_items_in_batch` (default: the number of
          labels). Logits are computed for labelled tokens only.

        Args:
            input_ids: (B, S) tokens, with mask tokens for unknown ones (or `inputs_embeds`, (B, S, D)).
            attention_mask: (B, S), 0 at padding, on either side.
            position_ids: (B, S); default: the number of tokens before, without padding.
            labels: (B, S), not shifted; −100 is ignored.
            loss_weights: with `labels`: (B, S), or (B, 1) for whole rows; None: 1.
            document_ids: (B, S) integers; documents of one row don't see each other.
            visible_mask: (S, S) or (B, S, S) bool, `[…, i, j]` True where token i sees token j, combined with the masks for
                padding and documents; None: everywhere.

        Raises:
            ValueError: shapes that don't match; a label at padding or at the first token of a row or document, which nothing
                predicts; an attention implementation that can't separate documents; a cache.
        """
        refuse_other_words({name: value for name, value in kwargs.items() if name not in CACHE_WORDS})
        caches = [kwargs.pop(word, None) for word in CACHE_WORDS]
        check_keywords(kwargs, type(self).forward)
        if use_cache or any(cache is not None for cache in caches):
            raise ValueError(
                "use_cache=True or a cache: masked diffusion is bidirectional and can't cache. Pass use_cache=False."
            )
        input_ids = check_content(input_ids, inputs_embeds, self.model.embed_tokens.num_embeddings)
        content = input_ids if input_ids is not None else inputs_embeds
        shape = tuple(content.shape[:2])
        check_shapes(shape, attention_mask, position_ids, labels, loss_weights, target_columns, document_ids)
        if labels is not None:
            labels = check_labels(labels, content, self.vocab_size, True)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=self._pattern(content, attention_mask, document_ids, visible_mask),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        )
        states = outputs.last_hidden_state
        loss = token_losses = logits = None
        if labels is not None:
            before = columns_before(content, attention_mask)
            scored = labels != -100
            _check_labels(scored, before, attention_mask, document_ids)
            losses = self._cross_entropy(states_before(states, before, scored), labels[scored])
            token_losses = losses.new_zeros(shape).masked_scatter(scored, losses.detach())
            if loss_weights is not None:
                losses = losses * loss_weights.expand(shape)[scored]
            num_items = losses.numel() if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / num_items
        elif target_columns is not None:
            before = columns_before(content, attention_mask).gather(1, target_columns).clamp_min(0)
            logits = self.predict(states.gather(1, before[..., None].expand(-1, -1, states.shape[-1])))
        else:
            logits = self.predict(states)
        return MaskedDiffusionOutput(
            loss=loss,
            token_losses=token_losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def predicting_states(
        self, input_ids: torch.LongTensor, *, asked: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns (n, D) the states that predict the tokens in `asked` (B, S) bool, row by row, as input to `predict`."""
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        states = self.model(
            input_ids=input_ids,
            attention_mask=self._pattern(input_ids, attention_mask, None, None),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        return states_before(states, columns_before(input_ids, attention_mask), asked)

    def predict(self, states: torch.Tensor) -> torch.Tensor:
        """Returns logits (…, V) of states (…, D), −∞ at the mask token."""
        logits = self.lm_head(states)
        if self.config.mask_token_id is not None:
            # In place and without autograd: a probability of 0 has no gradient, and a linear layer doesn't save its output.
            with torch.no_grad():
                logits[..., self.config.mask_token_id] = -torch.inf
        return logits

    def generate(self, *args, **kwargs):
        """Raises a ValueError: masked diffusion has no left-to-right generation."""
        raise ValueError(
            "masked diffusion does not support generate (left to right, cached). Use "
            "generate_any_order(input_ids, max_new_tokens=…)."
        )

    def _cross_entropy(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns (n,) losses; without gradient, logits are computed in chunks of rows."""
        rows = max(len(labels), 1) if torch.is_grad_enabled() else SLOTS_PER_CHUNK
        losses = [
            nn.functional.cross_entropy(self.predict(part).float(), ids, reduction="none")
            for part, ids in zip(states.split(rows), labels.split(rows), strict=True)
        ]
        return torch.cat(losses)

    def _pattern(self, content, attention_mask, document_ids, visible_mask) -> torch.Tensor | None:
        """Returns an explicit bidirectional mask (B or 1, 1, S, S), so as not to rely on `is_causal` alone; the padding mask
        (B, S) for attention implementations without support for mask tensors.
        """
        implementation = self.config._attn_implementation
        is_plain = document_ids is None and visible_mask is None
        if is_plain and (self.config.is_causal or implementation not in PATTERNED):
            return attention_mask
        if implementation not in PATTERNED:
            raise ValueError(
                f"attn_implementation={implementation!r}: document_ids and visible_mask expect {' or '.join(PATTERNED)}"
            )
        length = content.shape[1]
        seen = torch.ones(1, length, length, dtype=torch.bool, device=content.device)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, :]
        if document_ids is not None:
            seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
        if visible_mask is not None:
            seen = seen & visible_mask
        # Padding sees itself, since attention of a row that sees nothing is undefined.
        seen = (seen | torch.eye(length, dtype=torch.bool, device=content.device))[:, None]
        if implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(self.dtype).min
        )


def columns_before(content: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns (B, S) for each token of `content` (B, S, …) the column of the real token before it, which predicts it; −1 if
    there is none.
    """
    columns = torch.arange(content.shape[1], device=content.device)
    if attention_mask is None:
        return (columns - 1).expand(content.shape[:2])
    last = torch.where(attention_mask.bool(), columns, -1).cummax(dim=1).values
    return nn.functional.pad(last[:, :-1], (1, 0), value=-1)


def states_before(states: torch.Tensor, before: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Returns (n, D) of `states` (B, S, D) those at the columns `before` (B, S) of the tokens in `asked` (B, S) bool."""
    rows, columns = asked.nonzero(as_tuple=True)
    return states[rows, before[rows, columns]]


def _check_labels(scored, before, attention_mask, document_ids) -> None:
    if torch.compiler.is_compiling():
        return
    wrong = before < 0
    if attention_mask is not None:
        wrong = wrong | ~attention_mask.bool()
    if document_ids is not None:
        wrong = wrong | (document_ids.gather(1, before.clamp_min(0)) != document_ids)
    if (scored & wrong).any():
        row, column = (scored & wrong).nonzero()[0].tolist()
        raise ValueError(
            f"labels holds a token at row {row}, column {column}, which is padding or the first token of a row or document, "
            "which nothing predicts: expected -100"
        )
