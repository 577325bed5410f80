"""`model.generate(..., custom_generate=lossless)`: transformers' call, in fewer passes."""

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode, logits_process, stopping_criteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .generation_config import PROCESSOR_OPTIONS, SAMPLING_OPTIONS
from .generation_processors import WARPERS

# Processors that `generate` makes of the settings that any-order generation has, too.
KNOWN_PROCESSORS = (
    *WARPERS.values(),
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
)
KNOWN_CRITERIA = (stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria)
TAKEN = ("do_sample", "eos_token_id", "pad_token_id", *SAMPLING_OPTIONS, *PROCESSOR_OPTIONS)
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def lossless(
    model,
    input_ids: torch.LongTensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **others,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """The text of a LLaMA's `generate`, in fewer passes: drafts from the model's draft head and from the text so far, checked
    by the content stream. Pass it to `A3LlamaForCausalLM.generate` as `custom_generate`. Greedy, the tokens are those of the
    plain LLaMA's `generate` (in half precision up to rounding); sampled, they have the same distribution.

    Raises:
        ValueError: settings, processors or stopping criteria beyond those of `A3GenerationConfig`; a cache.
    """
    # Words of the signature would come twice, as `generate` passes those on by itself.
    attention_mask = others.pop("attention_mask", None)
    use_cache = others.pop("use_cache", True)
    for name in ("past_key_values", "cache"):  # `generate` makes an empty one
        if others.get(name) is not None and others[name].get_seq_length() == 0:
            del others[name]
    for name in ("logits_to_keep", "cache_position"):  # `generate`'s own
        others.pop(name, None)
    position_ids = others.pop("position_ids", None)
    if position_ids is not None:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if ((position_ids != real.long().cumsum(dim=1) - 1) & real.bool()).any():
            raise ValueError("position_ids: expected those of the tokens without padding, or None")
    unknown = {name: value for name, value in others.items() if value is not None and value is not False}
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        unknown["generation mode"] = mode.value
    unknown |= {name: True for name in OUTPUTS if getattr(generation_config, name, None)}
    if not use_cache:
        unknown["use_cache"] = False
    for name, kinds, known in (
        ("logits_processor", logits_processor, KNOWN_PROCESSORS),
        ("stopping_criteria", stopping_criteria, KNOWN_CRITERIA),
    ):
        foreign = [type(one).__name__ for one in kinds if type(one) not in known]
        if foreign:
            unknown[name] = ", ".join(foreign)
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ValueError(f"{name}={value!r} is not supported by custom_generate=lossless: use generate without it")
    settings = {name: getattr(generation_config, name) for name in TAKEN}
    output = model.generate_any_order(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        strategy="speculative",
        draft="ngram" if model.drafter is None else "ngram+head",
        verify="content",
        **{name: value for name, value in settings.items() if value is not None or name == "eos_token_id"},
    )
    written = (output.group_ids[:, input_ids.shape[1] :] >= 0).sum(dim=1)
    sequences = output.sequences[:, : input_ids.shape[1] + int(written.max())]
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences
