"""Requests with blanks and what `generate_any_order` answers, and engines to ask.

vLLM computes in float32 and the oracle in float64: the models' weights are drawn wide, so that no two tokens are near.
"""

import contextlib
import gc
from dataclasses import dataclass, replace

import torch

from a3_hf.engines.vllm.requests import Blanks, Dynamic, OneRowScript, Sampling
from a3_hf.models.a3_llama.generation_decoder import row_seed
from a3_hf.models.a3_llama.orders import GroupOrder

SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
# (given before, between and after), (lengths)
LAYOUTS = (
    ((40, 30), (5,)),
    ((35, 3, 20), (4, 6)),
    ((50, 0), (7,)),
    ((33, 0, 12), (3, 4)),
    ((64, 40, 0), (2, 8)),
    ((1, 70), (6,)),
    ((20, 10, 5, 7), (3, 3, 3)),
    ((32, 33), (9,)),
)


@dataclass(frozen=True)
class Case:
    """A request and its answer.

    Attributes:
        blanks: None: the prompt is continued.
        answer: tokens in the order in which vLLM reports them.
        log_probs: of these.
    """

    blanks: Blanks | None
    given: tuple[int, ...]
    answer: tuple[int, ...]
    log_probs: tuple[float, ...]
    params: tuple[tuple[str, object], ...] = ()

    def prompt(self) -> dict:
        if self.blanks is None or self.blanks.sampling is not None:
            return {"prompt_token_ids": list(self.given)}
        return {"prompt_token_ids": OneRowScript(self.blanks).prompt(self.given)}

    def sampling_params(self, **changes):
        from vllm import SamplingParams

        extra, outputs = {}, len(self.answer)
        settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, "logprobs": 1, **dict(self.params)}
        if self.blanks is not None:
            extra = self.blanks.extra_args()
            if self.blanks.sampling is None:
                outputs = OneRowScript(self.blanks).num_outputs
            else:
                extra["diffusion_canvas_length"] = self.blanks.width()
                settings["temperature"] = 1.0
        return SamplingParams(**settings | {"max_tokens": outputs, "extra_args": extra} | changes)

    def written(self, output) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The tokens of a vLLM output that are the blanks', and their log-probabilities."""
        tokens = list(output.token_ids)
        log_probs = [of[token].logprob for token, of in zip(tokens, output.logprobs, strict=True)]
        if self.blanks is not None and self.blanks.sampling is None:
            kept = [number for number, column in enumerate(OneRowScript(self.blanks).columns) if column is not None]
            tokens, log_probs = [tokens[number] for number in kept], [log_probs[number] for number in kept]
        return tuple(tokens), tuple(log_probs)


def given_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def filled(model, blanks: Blanks, given: list[int], **settings) -> Case:
    """Returns the case that `generate_any_order(**settings)` answers; its blanks get the way of writing that settings name."""
    input_ids = torch.zeros(1, blanks.size, dtype=torch.long)
    blank_mask = torch.zeros(1, blanks.size, dtype=torch.bool)
    input_ids[0, blanks.given_columns()] = torch.tensor(given)
    blank_mask[0, blanks.open_columns()] = True
    settings = {"seed": 0, **settings}
    strategy, in_groups = settings.get("strategy"), settings.pop("in_groups", True)
    if strategy == "speculative":  # what it writes is what one token at a time is
        reference = {name: settings[name] for name in settings if name not in ("strategy", "draft_tokens")}
    else:
        reference = settings
    output = model.generate_any_order(input_ids, blank_mask, **reference)
    if in_groups:
        seed = row_seed(settings["seed"], input_ids[0].masked_fill(blank_mask[0], -1), 0)
        sampling = Sampling(
            settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
            *(settings.get(name) for name in ("top_k", "top_p", "min_p")),
            seed=seed,
        )
        blanks = replace(blanks, sampling=sampling, **_way(blanks, blank_mask, settings, seed))
    columns = [column for step in blanks.steps for column in step] or blanks.open_columns()
    answer, log_probs = output.sequences[0, columns].tolist(), output.log_probs[0, columns].tolist()
    return Case(blanks, tuple(given), tuple(answer), tuple(log_probs))


def _way(blanks: Blanks, blank_mask: torch.Tensor, settings: dict, seed: int) -> dict:
    strategy = settings.get("strategy")
    if strategy == "speculative":
        return {"drafts": settings["draft_tokens"]}
    if strategy == "dynamic":
        names = ("criterion", "tokens_per_step", "threshold", "entropy_budget", "window")
        return {"dynamic": Dynamic(**{name: settings.get(name) for name in names})}
    groups = GroupOrder.infilling(
        blank_mask,
        order=settings.get("order", "left_to_right"),
        group_size=settings.get("group_size", 1),
        span_length=settings.get("span_length"),
        generator=[torch.Generator().manual_seed(seed)],
    ).group_ids[0]
    steps: dict[int, list[int]] = {}
    for column in blanks.open_columns():
        steps.setdefault(int(groups[column]), []).append(column)
    return {"steps": tuple(tuple(steps[number]) for number in sorted(steps))}


def continued(model, given: list[int], length: int) -> Case:
    """Returns the case of a plain continuation, as transformers' `generate` answers it."""
    output = model.generate(
        torch.tensor([given]),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, len(given) :].tolist()
    log_probs = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, answer, strict=True)]
    return Case(None, tuple(given), tuple(answer), tuple(log_probs))


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


def counter(llm, name: str) -> float:
    """A counter of vLLM's metrics."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
