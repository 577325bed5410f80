"""Registers `a3_llama` and the controls `decoupled_rope_llama` and `masked_diffusion_llama` with the Auto classes, and the
adapters with peft. Imports the package's public names, which `a3_hf` re-exports.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from a3_hf import adapters  # noqa: F401  (it registers them)
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.drafter import attach_draft_head
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from a3_hf.models.a3_llama.configuration_a3_llama import A3LlamaConfig
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.generation_lossless import lossless
from a3_hf.models.a3_llama.infilling_pipeline import A3InfillingPipeline
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM, A3LlamaModel
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.models.decoupled_rope_llama.configuration_decoupled_rope_llama import DecoupledRopeLlamaConfig
from a3_hf.models.decoupled_rope_llama.modeling_decoupled_rope_llama import (
    DecoupledRopeLlamaForCausalLM,
    DecoupledRopeLlamaModel,
)
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.curriculum_callbacks import CurriculumCallback
from a3_hf.training.trainer import A3Trainer

from .versions import TESTED_TRANSFORMERS, warn_if_newer

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
    "DraftHead",
    "DraftHeadConfig",
    "GroupOrder",
    "MaskedDiffusionLlamaConfig",
    "MaskedDiffusionLlamaForCausalLM",
    "attach_draft_head",
    "lossless",
]

warn_if_newer()

AutoConfig.register(A3LlamaConfig.model_type, A3LlamaConfig)
AutoModel.register(A3LlamaConfig, A3LlamaModel)
AutoModelForCausalLM.register(A3LlamaConfig, A3LlamaForCausalLM)
AutoConfig.register(DecoupledRopeLlamaConfig.model_type, DecoupledRopeLlamaConfig)
AutoModel.register(DecoupledRopeLlamaConfig, DecoupledRopeLlamaModel)
AutoModelForCausalLM.register(DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM)
AutoConfig.register(MaskedDiffusionLlamaConfig.model_type, MaskedDiffusionLlamaConfig)
AutoModelForCausalLM.register(MaskedDiffusionLlamaConfig, MaskedDiffusionLlamaForCausalLM)
