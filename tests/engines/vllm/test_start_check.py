"""Another vLLM is refused in words, whatever of it has changed."""

import importlib

import pytest
from vllm.v1.core import kv_cache_utils

from a3_hf.engines.vllm import prefix_cache, register, start_check
from a3_hf.engines.vllm.start_check import HOOKS, check_engine


def test_this_vllm_is_taken():
    for _ in range(2):  # vLLM calls it in each process, and some twice
        register()
        check_engine(caches_prefixes=True)


@pytest.mark.parametrize(("module", "name", "parameters"), HOOKS, ids=[name for _, name, _ in HOOKS])
def test_a_hook_that_is_gone_or_lacks_a_parameter(monkeypatch, module, name, parameters):
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    if parameters:
        with monkeypatch.context() as patch:
            patch.setattr(owner, last, lambda something_else: None)
            with pytest.raises(RuntimeError, match=f"takes no {parameters.split()[0]!r}"):
                check_engine(caches_prefixes=False)
    # of it and of its parents, which have the same name
    for one in [*getattr(owner, "__mro__", ()), owner]:
        if last in vars(one):
            monkeypatch.delattr(one, last)
    with pytest.raises(RuntimeError, match=rf"{name} is not there: a3_hf is tested with vLLM 0\.32"):
        check_engine(caches_prefixes=False)


def test_a_hash_function_of_another_name(monkeypatch):
    """vLLM calls its new function, and what was wrapped is called by nobody."""
    original = kv_cache_utils.generate_block_hash_extra_keys.without_blanks
    renamed = kv_cache_utils.get_request_block_hasher

    def hasher(size, hash_fn):  # as if the function that it looks up had another name
        inner = renamed(size, hash_fn)

        def hashes(request):
            kept = kv_cache_utils.generate_block_hash_extra_keys
            kv_cache_utils.generate_block_hash_extra_keys = original
            try:
                return inner(request)
            finally:
                kv_cache_utils.generate_block_hash_extra_keys = kept

        return hashes

    monkeypatch.setattr(kv_cache_utils, "get_request_block_hasher", hasher)
    with pytest.raises(RuntimeError, match="--no-enable-prefix-caching"):
        check_engine(caches_prefixes=True)
    check_engine(caches_prefixes=False)


def test_keys_that_forget_the_lengths(monkeypatch):
    monkeypatch.setattr(prefix_cache, "blank_keys", lambda request, end: ())
    with pytest.raises(RuntimeError, match="blanks of two lengths before the same text have the same keys"):
        check_engine(caches_prefixes=True)


def test_another_minor(monkeypatch):
    monkeypatch.setattr(start_check, "version", lambda name: "0.33.1" if name == "vllm" else "0")
    with pytest.raises(RuntimeError, match=r"vllm 0\.33\.1 is installed"):
        check_engine(caches_prefixes=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hf_overrides": {"canvas_length": 0}}, "canvas_length=0"),
        ({"hf_overrides": {"canvas_length": 80}, "max_num_batched_tokens": 64}, "max_num_batched_tokens=64"),
        ({"hf_overrides": {"canvas_length": 8}, "long_prefill_token_threshold": 4}, "long_prefill_token_threshold=4"),
        ({"hf_overrides": {"canvas_length": 8}, "pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode='processed_logprobs'"),
        ({"hf_overrides": {"canvas_length": 8}, "diffusion_config": {"canvas_length": 4}}, "expected 8"),
        (
            {"hf_overrides": {"canvas_length": 8}, "compilation_config": {"cudagraph_mode": "FULL"}},
            "cudagraph_mode=FULL: expected PIECEWISE",
        ),
    ],
)
def test_settings_under_which_blanks_would_go_wrong(checkpoints, settings, message):
    from vllm.engine.arg_utils import EngineArgs

    defaults = {
        "model": checkpoints["left_token"][0],
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 64,
    }
    with pytest.raises(Exception, match=message):
        EngineArgs(**{**defaults, **settings}).create_engine_config()
