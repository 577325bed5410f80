"""Masked diffusion, as a difference from transformers' LLaMA: both sides seen, a mask token, shifted logits."""

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
    check_integers,
    check_keywords,
    check_labels,
    check_numbers,
    check_padding_mask,
)
from a3_hf.models.a3_llama.likelihood import SLOTS_PER_CHUNK
from a3_hf.models.a3_llama.pretrained import WholeCheckpointMixin
from a3_hf.models.a3_llama.rope import FixedRotaryEmbedding
from a3_hf.models.a3_llama.scoring import A3ScoringMixin

from .configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from .corruption import check_mask_token
from .generation_masked_diffusion import UnmaskingMixin
from .likelihood_masked_diffusion import DiffusionLikelihoodMixin

# The attention implementations that take a mask of any pattern as a tensor.
PATTERNED = ("sdpa", "eager")


@dataclass
class MaskedDiffusionOutput(CausalLMOutput):
    """Output of `MaskedDiffusionLlamaForCausalLM`. With `labels` there are no `logits`, but `token_losses` (B, S): each
    scored token's own, in nats, without its weight and without gradient; 0 where nothing is scored.
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

    - every token sees every other (`config.is_causal` is False), and nothing is cached;
    - the input holds mask tokens, which have probability 0 in the output;
    - `forward` asks for tokens where they stand: the logits of token i are those of the state before it, as in LLaMA, whose
      head keeps its use. The first token of a row (BOS) is given;
    - it has the methods `generate_any_order`, `infill`, `rewrite`, `score`, `log_likelihood`, `log_likelihood_bound` and
      `exact_bound`, and no `generate`.
    """

    config_class = MaskedDiffusionLlamaConfig

    def __init__(self, config: MaskedDiffusionLlamaConfig):
        super().__init__(config)
        self.model.rotary_emb = FixedRotaryEmbedding(config=config)

    def set_mask_token(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None = None) -> int:
        """Sets `config.mask_token_id` and returns it. A fresh mask token starts as the mean embedding of the tokenizer's
        tokens, whatever stood in its row; one that the config has already is left as it is.

        Args:
            tokenizer: of the model; it is not changed, and no text will encode to the mask token.
            mask_token_id: e.g. a reserved special token. None: the config's own, or the tokenizer's mask token, or else the
                first row of the embeddings beyond the tokenizer's ids, which is added where there is none.

        Raises:
            ValueError: an id that is a real word of the tokenizer, its BOS or EOS, or none of the model's.
        """
        vocabulary = sorted(set(tokenizer.get_vocab().values()))
        for known in (self.config.mask_token_id, tokenizer.mask_token_id, vocabulary[-1] + 1):
            mask_token_id = known if mask_token_id is None else mask_token_id
        if mask_token_id == vocabulary[-1] + 1 == self.config.vocab_size:
            with torch.random.fork_rng():  # resizing draws the row, which is set below
                self.resize_token_embeddings(self.config.vocab_size + 1, mean_resizing=False)
        check_mask_token(tokenizer, mask_token_id, vocab_size=self.config.vocab_size)
        if mask_token_id != self.config.mask_token_id:
            words = [token_id for token_id in vocabulary if token_id != mask_token_id]
            # The head's row too, though the mask token is never written: it would hold whatever was drawn for it.
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
        """Three forms, by what is given:

        - `model(input_ids)`: LLaMA's logits (B, S, V), of which `[:, i − 1]` predict token i.
        - with `target_columns` (B, Q): logits (B, Q, V), of which `[:, q]` predict the token at column
          `target_columns[:, q]`.
        - with `labels`: the loss alone, Σ weight · −log p(label), over `num_items_in_batch`, by default the number of
          labels. Logits are made for labelled tokens only.

        Args:
            input_ids: (B, S) tokens, the mask token where they are unknown (or `inputs_embeds`, (B, S, D)).
            attention_mask: (B, S), 0 at padding, on whichever side.
            position_ids: (B, S); by default the number of tokens before, padding not counted.
            labels: (B, S), not shifted; −100 is ignored.
            loss_weights: with `labels`: (B, S), or (B, 1) for all of a row; None: 1.
            document_ids: (B, S) integers: documents of one row don't see each other.
            visible_mask: (S, S) or (B, S, S) bool, where the token of a row sees that of a column, padding and documents
                apart; None: everywhere.

        Raises:
            ValueError: shapes that don't match; a label at padding, or where nothing predicts: at the first token of a row or
                of a document; an attention implementation that can't keep documents apart; a cache.
        """
        refuse_other_words({name: value for name, value in kwargs.items() if name not in CACHE_WORDS})
        caches = [kwargs.pop(word, None) for word in CACHE_WORDS]
        check_keywords(kwargs, type(self).forward)
        if use_cache or any(cache is not None for cache in caches):
            raise ValueError(
                "masked diffusion sees both sides, so that no state lasts: it takes no cache, use_cache=False"
            )
        input_ids = check_content(input_ids, inputs_embeds, self.model.embed_tokens.num_embeddings)
        content = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and target_columns is not None:
            raise ValueError("give labels or target_columns: with labels there are no logits")
        if loss_weights is not None and labels is None:
            raise ValueError("loss_weights belongs to labels")
        shape = tuple(content.shape[:2])
        if attention_mask is not None:
            check_padding_mask("attention_mask", attention_mask, shape[0], 0, shape[1])
        if labels is not None:
            labels = check_labels(labels, content, self.vocab_size, True)
        for name, ids, most in (
            ("position_ids", position_ids, None),
            ("target_columns", target_columns, shape[1] - 1),
        ):
            if ids is not None:
                check_numbers(name, ids, at_least=0, at_most=most)
        if document_ids is not None:
            check_integers("document_ids", document_ids)
        if target_columns is not None and (target_columns.ndim != 2 or target_columns.shape[0] != shape[0]):
            raise ValueError(f"target_columns has shape {tuple(target_columns.shape)}: expected ({shape[0]}, slots)")
        if position_ids is not None and tuple(position_ids.shape) not in {shape, (1, shape[1])}:
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: expected the shape of input_ids, {shape}")
        for name, tensor in {
            "document_ids": document_ids,
            "loss_weights": loss_weights,
        }.items():
            expected = {shape, (shape[0], 1)} if name == "loss_weights" else {shape}
            if tensor is not None and tuple(tensor.shape) not in expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected the shape of input_ids, {shape}")

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
        """(n, D) the states from which `predict` makes the logits of the tokens under `asked` (B, S), in reading order."""
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
        """Logits (…, V) from states (…, D); −∞ at the mask token, which is no word."""
        logits = self.lm_head(states)
        if self.config.mask_token_id is not None:
            # In place, unseen by autograd: a probability of 0 has no gradient, and the head keeps nothing of its output.
            with torch.no_grad():
                logits[..., self.config.mask_token_id] = -torch.inf
        return logits

    def generate(self, *args, **kwargs):
        """Raises a ValueError: there is no next token here."""
        raise ValueError(
            "masked diffusion does not write from left to right with a cache, as generate does; use "
            "generate_any_order(input_ids, max_new_tokens=…)"
        )

    def _cross_entropy(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(n,) losses; where no gradient is kept, logits are made a few rows at a time."""
        rows = max(len(labels), 1) if torch.is_grad_enabled() else SLOTS_PER_CHUNK
        losses = [
            nn.functional.cross_entropy(self.predict(part).float(), ids, reduction="none")
            for part, ids in zip(states.split(rows), labels.split(rows), strict=True)
        ]
        return torch.cat(losses)

    def _pattern(self, content, attention_mask, document_ids, visible_mask) -> torch.Tensor | None:
        """The mask as LLaMA takes it: (B or 1, 1, S, S), so that seeing both sides does not hang on a setting alone; padding
        (B, S) for attention implementations that take no such mask.
        """
        implementation = self.config._attn_implementation
        is_plain = document_ids is None and visible_mask is None
        if is_plain and (self.config.is_causal or implementation not in PATTERNED):
            return attention_mask
        if implementation not in PATTERNED:
            raise ValueError(
                f"attn_implementation={implementation!r}: document_ids and visible_mask need one that takes any mask, "
                f"{' or '.join(PATTERNED)}"
            )
        length = content.shape[1]
        seen = torch.ones(1, length, length, dtype=torch.bool, device=content.device)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, :]
        if document_ids is not None:
            seen = seen & (document_ids[:, :, None] == document_ids[:, None, :])
        if visible_mask is not None:
            seen = seen & visible_mask
        # Padding sees itself: a row that sees nothing would be an average of nothing.
        seen = (seen | torch.eye(length, dtype=torch.bool, device=content.device))[:, None]
        if implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(
            ~seen, torch.finfo(self.dtype).min
        )


def columns_before(content: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, S) for each token of `content` (B, S, …) the column of the real token before it, whose state predicts it; −1 where
    there is none.
    """
    columns = torch.arange(content.shape[1], device=content.device)
    if attention_mask is None:
        return (columns - 1).expand(content.shape[:2])
    last = torch.where(attention_mask.bool(), columns, -1).cummax(dim=1).values
    return nn.functional.pad(last[:, :-1], (1, 0), value=-1)


def states_before(states: torch.Tensor, before: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """(n, D) of `states` (B, S, D) those that predict the tokens under `asked` (B, S), at the columns `before` (B, S)."""
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
            f"labels asks for a score at row {row}, column {column}, which is padding or the first token of a row or "
            "document, and so has no token before it to predict it; put -100 there"
        )
