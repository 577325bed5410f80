"""Engines of vLLM in this process, and what they answer."""

import contextlib
import gc


@contextlib.contextmanager
def engine(folder: str, **settings):
    """An engine of vLLM in this process; freed at the end, so that the next one finds room."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "max_num_batched_tokens": 128,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "block_size": 32,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(model=folder, **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(llm, cases, *, together: bool = True, lora=None) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Returns what the engine writes for each case, in one batch or one by one."""
    prompts, params = [case.prompt() for case in cases], [case.sampling_params() for case in cases]
    if together:
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
    else:
        loras = lora or [None] * len(cases)
        outputs = [
            llm.generate([prompt], [one], use_tqdm=False, lora_request=own)[0]
            for prompt, one, own in zip(prompts, params, loras, strict=True)
        ]
    return [case.written(output.outputs[0]) for case, output in zip(cases, outputs, strict=True)]


def num_equal(cases, answers) -> int:
    """How many answers have all tokens of their cases; log-probabilities must then agree, too."""
    count = 0
    for case, (tokens, log_probs) in zip(cases, answers, strict=True):
        if tokens != case.answer:
            print(f"{case.blanks}: {tokens} for {case.answer}, whose log-probabilities are {case.log_probs}")
        else:
            count += 1
            assert max(abs(a - b) for a, b in zip(log_probs, case.log_probs, strict=True)) < 5e-3
    return count


def counter(llm, name: str | None) -> float:
    """A counter of vLLM's metrics; 0 without a name."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
