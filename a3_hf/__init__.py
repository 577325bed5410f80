"""A3: any-order generation from a pretrained LLaMA. Importing it registers `a3_llama` with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_a3_llama import A3LlamaConfig
from .curriculum import Curriculum, CurriculumCallback
from .generation_config import A3GenerationConfig
from .modeling_a3_llama import A3LlamaForCausalLM, A3LlamaModel
from .orders import GroupOrder
from .pipeline import A3InfillingPipeline
from .trainer import A3Trainer

AutoConfig.register(A3LlamaConfig.model_type, A3LlamaConfig)
AutoModel.register(A3LlamaConfig, A3LlamaModel)
AutoModelForCausalLM.register(A3LlamaConfig, A3LlamaForCausalLM)

__all__ = [
    "A3GenerationConfig",
    "A3InfillingPipeline",
    "A3LlamaConfig",
    "A3LlamaForCausalLM",
    "A3LlamaModel",
    "A3Trainer",
    "Curriculum",
    "CurriculumCallback",
    "GroupOrder",
]
