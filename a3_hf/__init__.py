"""A3: any-order generation from a pretrained LLaMA. Importing it registers `a3_llama`, and the controls
`decoupled_rope_llama` and `masked_diffusion_llama`, with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_a3_llama import A3LlamaConfig
from .configuration_decoupled_rope_llama import DecoupledRopeLlamaConfig
from .configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from .curriculum import Curriculum, CurriculumCallback
from .generation_config import A3GenerationConfig
from .modeling_a3_llama import A3LlamaForCausalLM, A3LlamaModel
from .modeling_decoupled_rope_llama import DecoupledRopeLlamaForCausalLM, DecoupledRopeLlamaModel
from .modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from .orders import GroupOrder
from .pipeline import A3InfillingPipeline
from .trainer import A3Trainer
from .versions import TESTED_TRANSFORMERS, warn_if_newer

warn_if_newer()

AutoConfig.register(A3LlamaConfig.model_type, A3LlamaConfig)
AutoModel.register(A3LlamaConfig, A3LlamaModel)
AutoModelForCausalLM.register(A3LlamaConfig, A3LlamaForCausalLM)
AutoConfig.register(DecoupledRopeLlamaConfig.model_type, DecoupledRopeLlamaConfig)
AutoModel.register(DecoupledRopeLlamaConfig, DecoupledRopeLlamaModel)
AutoModelForCausalLM.register(DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM)
AutoConfig.register(MaskedDiffusionLlamaConfig.model_type, MaskedDiffusionLlamaConfig)
AutoModelForCausalLM.register(MaskedDiffusionLlamaConfig, MaskedDiffusionLlamaForCausalLM)

__all__ = [
    "TESTED_TRANSFORMERS",
    "A3GenerationConfig",
    "A3InfillingPipeline",
    "A3LlamaConfig",
    "A3LlamaForCausalLM",
    "A3LlamaModel",
    "A3Trainer",
    "Curriculum",
    "CurriculumCallback",
    "DecoupledRopeLlamaConfig",
    "DecoupledRopeLlamaForCausalLM",
    "DecoupledRopeLlamaModel",
    "GroupOrder",
    "MaskedDiffusionLlamaConfig",
    "MaskedDiffusionLlamaForCausalLM",
]
