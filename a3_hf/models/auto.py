"""Architectures that a recipe trains: A3, its controls (Decoupled RoPE, masked diffusion, plain LLaMA), a draft head on A3."""

from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.decoupled_rope_llama.configuration_decoupled_rope_llama import DecoupledRopeLlamaConfig
from a3_hf.models.decoupled_rope_llama.modeling_decoupled_rope_llama import DecoupledRopeLlamaForCausalLM
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM


@dataclass(frozen=True)
class Architecture:
    """Classes of a model (a draft head: of its base), and whether a curriculum of orders trains it."""

    config: type[LlamaConfig]
    model: type[PreTrainedModel]
    has_curriculum: bool


ARCHITECTURES = {
    "a3": Architecture(A3LlamaConfig, A3LlamaForCausalLM, has_curriculum=True),
    "decoupled_rope": Architecture(DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM, has_curriculum=True),
    "masked_diffusion": Architecture(MaskedDiffusionLlamaConfig, MaskedDiffusionLlamaForCausalLM, has_curriculum=False),
    "llama": Architecture(LlamaConfig, LlamaForCausalLM, has_curriculum=False),
    "draft_head": Architecture(A3LlamaConfig, A3LlamaForCausalLM, has_curriculum=False),
}
