"""A trained run, the input of measures: its model, texts, recipe and log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.training.arguments import Recipe


@dataclass(frozen=True)
class Trained:
    """The input of a measure.

    Attributes:
        model: the trained model, in evaluation mode: an `A3LlamaForCausalLM`, `DecoupledRopeLlamaForCausalLM`,
            `MaskedDiffusionLlamaForCausalLM` or, for next-token training, `LlamaForCausalLM`; of a draft head, its base with
            the head attached.
        documents: held-out texts, the recipe's `validation_documents`; none of a draft head, whose documents are tokens.
        training_documents: the texts of training.
        log_history: the log of training, as in `TrainerState`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    documents: Sequence[str]
    training_documents: Sequence[str]
    log_history: Sequence[Mapping[str, Any]]

    @property
    def architecture(self) -> str:
        """`"a3"`, `"decoupled_rope"`, `"masked_diffusion"`, `"llama"` or `"draft_head"`."""
        return self.recipe.model.architecture
