"""Checks and settings of an engine that serves A3, before it loads the model."""

import vllm.envs as envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .start_check import check_engine


class A3EngineConfig(VerifyAndUpdateConfig):
    """vLLM calls it for the architecture `A3LlamaForCausalLM`."""

    @classmethod
    def verify_and_update_config(cls, vllm_config) -> None:
        """Checks vLLM and the settings, and adds what requests are checked and masked by.

        Raises:
            ValueError: a setting under which blanks would be filled wrongly.
            RuntimeError: as `check_engine`.
        """
        check_engine(caches_prefixes=bool(vllm_config.cache_config.enable_prefix_caching))
        _check_settings(vllm_config)
        model = vllm_config.model_config
        groups = getattr(model.hf_config, "canvas_length", None) is not None
        own = f"{__package__}.blank_masks:{'GroupChecks' if groups else 'OneRowMasks'}"
        model.logits_processors = [*(model.logits_processors or []), own]
        if groups:
            _set_up_groups(vllm_config)


def _check_settings(vllm_config) -> None:
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "vLLM's model runner v1 is in use: blanks need v2. Set VLLM_USE_V2_MODEL_RUNNER=1, and leave out what vLLM's log "
            "says that v2 does not have."
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"{name}={getattr(parallel, name)}: expected 1, as the rows of blanks are not split by place"
            )
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise ValueError(
            "enable_batch_sharded_sampling=True: expected False, as blanks are written beside the whole batch"
        )
    if getattr(parallel, "enable_dbo", False):
        raise ValueError("enable_dbo=True: expected False, as the rows of blanks are planned for whole batches")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("kv_transfer_config: expected None, as other engines do not know the places of blanks")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: expected None; requests ask for strategy='speculative' themselves")
    mode = getattr(vllm_config.model_config, "logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise ValueError(
            f"logprobs_mode={mode!r}: expected 'raw_logprobs', by which blanks of unknown length are chosen"
        )
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise ValueError("enable_prompt_embeds=True: expected False")


def _set_up_groups(vllm_config) -> None:
    """Settings of groups: attention that takes rows which see the same keys beside causal ones, and no full graphs, as the
    number of such sequences varies.
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.config.diffusion import DiffusionConfig
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "pipeline_parallel_size: expected 1 with canvas_length, as only the last stage sees what was written"
        )
    canvas = vllm_config.model_config.hf_config.canvas_length
    if not isinstance(canvas, int) or canvas < 1:
        raise ValueError(f"canvas_length={canvas!r}: expected a number of rows, twice the largest group")
    scheduler = vllm_config.scheduler_config
    for name in ("max_num_batched_tokens", "long_prefill_token_threshold"):
        if 0 < (getattr(scheduler, name, 0) or 0) < canvas:
            raise ValueError(
                f"{name}={getattr(scheduler, name)}: expected at least {canvas}, the rows of one step (canvas_length)"
            )
    if vllm_config.diffusion_config is None:
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=canvas)
    if vllm_config.diffusion_config.canvas_length != canvas:
        raise ValueError(
            f"diffusion_config has canvas_length={vllm_config.diffusion_config.canvas_length}: expected {canvas}, as in the "
            "model's configuration; leave it out"
        )
    attention = vllm_config.attention_config
    if not current_platform.is_cpu():
        if attention.backend is None:
            attention.backend = AttentionBackendEnum.TRITON_ATTN
        elif attention.backend != AttentionBackendEnum.TRITON_ATTN:
            raise ValueError(
                f"attention_config has backend={attention.backend.name}: expected TRITON_ATTN, which takes causal and other "
                "rows in one batch on every GPU"
            )
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = (
            CUDAGraphMode.NONE if envs.VLLM_USE_BREAKABLE_CUDAGRAPH else CUDAGraphMode.PIECEWISE
        )
    elif compilation.cudagraph_mode.has_full_cudagraphs():
        raise ValueError(
            f"cudagraph_mode={compilation.cudagraph_mode.name}: expected PIECEWISE or NONE, as groups are not of one size"
        )
