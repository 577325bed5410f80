"""What a LLaMA can become: A3, Decoupled RoPE, masked diffusion, or the LLaMA it is, trained further as the control."""

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
    """A model and how it is trained: under the orders of a curriculum, or by a loss of its own."""

    config: type[LlamaConfig]
    model: type[PreTrainedModel]
    has_curriculum: bool


ARCHITECTURES = {
    "a3": Architecture(A3LlamaConfig, A3LlamaForCausalLM, has_curriculum=True),
    "decoupled_rope": Architecture(DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM, has_curriculum=True),
    "masked_diffusion": Architecture(MaskedDiffusionLlamaConfig, MaskedDiffusionLlamaForCausalLM, has_curriculum=False),
    "llama": Architecture(LlamaConfig, LlamaForCausalLM, has_curriculum=False),
}


def architecture_of(path: str) -> str:
    """The architecture of the checkpoint at `path`, by its model type; a LLaMA's is `"a3"`, what it becomes where nothing
    else is said.

    Raises:
        ValueError: a checkpoint of none of these model types.
    """
    model_type = LlamaConfig.get_config_dict(path)[0].get("model_type")
    if model_type == LlamaConfig.model_type:
        return "a3"
    for name, architecture in ARCHITECTURES.items():
        if architecture.config.model_type == model_type:
            return name
    known = ", ".join(architecture.config.model_type for architecture in ARCHITECTURES.values())
    raise ValueError(f"{path} holds a checkpoint of model type {model_type!r}; it takes {known}")


def read_model_config(path: str, architecture: str) -> LlamaConfig:
    """The configuration of the checkpoint at `path` as one of an architecture.

    Raises:
        ValueError: a checkpoint that is neither a LLaMA's nor of this architecture.
    """
    config_class = ARCHITECTURES[architecture].config
    if config_class is LlamaConfig:
        model_type = LlamaConfig.get_config_dict(path)[0].get("model_type")
        if model_type != LlamaConfig.model_type:
            raise ValueError(
                f"{path} holds a checkpoint of model type {model_type!r}; architecture 'llama' takes a LLaMA"
            )
    return config_class.from_pretrained(path)
