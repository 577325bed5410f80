"""The model that vLLM loads: its own LLaMA, and `query_embed`."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.model_executor.models.llama import LlamaForCausalLM

from a3_hf.models.a3_llama.pretrained import query_embed_start

QUERY_EMBED, EMBED_TOKENS = "query_embed.weight", "embed_tokens.weight"


class A3LlamaForCausalLM(LlamaForCausalLM):
    """Identical to vLLM's `LlamaForCausalLM` except: `query_embed`, and a model state that places the rows of blanks."""

    def __init__(self, *, vllm_config, prefix: str = "", **kwargs):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        if self._writes_groups():
            # `GroupState` reads it; elsewhere an adapter of slots would act on all rows, and is refused by this weight
            self.lora_skip_prefixes = ["query_embed"]
            # adapters of the head take one row of logits a request, and groups have more
            self.embedding_modules = {}
        size = vllm_config.model_config.hf_config.hidden_size
        # (1, D); of a plain LLaMA, where its training would start
        self.query_embed = nn.Parameter(torch.zeros(1, size, dtype=vllm_config.model_config.dtype), requires_grad=False)

    def get_model_state_cls(self):
        """Called by vLLM's model runner v2."""
        if self._writes_groups():
            from .group_state import GroupState

            return GroupState
        from .one_row_state import OneRowState

        return OneRowState

    def _writes_groups(self) -> bool:
        return getattr(self.config, "canvas_length", None) is not None

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if not len(hidden_states):  # a step of prompts alone: gathering no rows kills a worker on a CPU (SIGFPE, 0.32)
            return hidden_states.new_zeros(0, self.config.vocab_size)
        return super().compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = {}

        def of_llama():
            for name, weight in weights:
                if name.endswith(QUERY_EMBED):
                    found[QUERY_EMBED] = weight
                    continue
                if name.endswith(EMBED_TOKENS):
                    found[EMBED_TOKENS] = weight
                yield name, weight

        loaded = super().load_weights(of_llama())
        if QUERY_EMBED not in found and EMBED_TOKENS in found:  # a plain LLaMA
            found[QUERY_EMBED] = query_embed_start(found[EMBED_TOKENS])
        if QUERY_EMBED in found:
            self.query_embed.data.copy_(found[QUERY_EMBED])
        return loaded | {"query_embed"}
