"""Makes A3's model, its configuration checks and its cache keys known to vLLM."""

import importlib

ARCHITECTURE = "A3LlamaForCausalLM"


def register_models() -> None:
    """Registers all that vLLM needs of A3; only classes' names, so that no model is imported."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import a3_hf.registration  # noqa: F401  (its import makes the model type known to AutoConfig)

    from .engine_config import A3EngineConfig
    from .prefix_cache import wrap_block_keys

    importlib.import_module("a3_hf")
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = A3EngineConfig
    wrap_block_keys()
