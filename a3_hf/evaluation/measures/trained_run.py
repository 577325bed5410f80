"""A trained run as measurements see it: its model, its text, its recipe and what it logged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.training.arguments import Recipe


@dataclass(frozen=True)
class Trained:
    """What a measurement is given.

    Attributes:
        model: the trained model, in evaluation mode: an `A3LlamaForCausalLM`, `DecoupledRopeLlamaForCausalLM`,
            `MaskedDiffusionLlamaForCausalLM` or, of next-token training, `LlamaForCausalLM`.
        documents: texts that training did not see, the recipe's `validation_documents`.
        training_documents: the texts that it saw.
        log_history: what the run logged, as in `TrainerState`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    documents: Sequence[str]
    training_documents: Sequence[str]
    log_history: Sequence[Mapping[str, Any]]

    @property
    def architecture(self) -> str:
        """`"a3"`, `"decoupled_rope"`, `"masked_diffusion"` or `"llama"`."""
        return self.recipe.model.architecture
