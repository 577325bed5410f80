"""Blanks filled by vLLM: its scheduler, paged cache, tensor parallelism and server, with A3's positions and slots.

vLLM finds `register` by the entry point `vllm.general_plugins`, and `endpoints.FillingEndpoints` by `vllm.endpoint_plugins`.
"""


def register() -> None:
    """Registers `A3LlamaForCausalLM` with vLLM. Called by vLLM in each of its processes, before a model is loaded; several
    calls do no harm. What vLLM must have for it is checked when a model starts (`start_check`).
    """
    from .registration import register_models

    register_models()
