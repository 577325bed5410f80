"""Odd calls of the Python API: a ValueError that names the argument, before any work, or the right result."""

import pytest
import torch
from transformers import DynamicCache

from a3_hf import A3GenerationConfig
from a3_hf.models.auto import ARCHITECTURES
from tests.conftest import tiny_config, tiny_model

KINDS = ["query_embed", "left_token", "decoupled_rope", "masked_diffusion"]
VOCABULARY, MASK_TOKEN = 61, 60
IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 15, 16, 17, 18, 19]])
GROUPS = torch.arange(6).expand(2, -1)
BLANKS = torch.tensor([[False, False, True, False, True, False]] * 2)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
MODELS = {}


def made(kind: str):
    if kind not in MODELS:
        torch.manual_seed(0)
        if kind in ("query_embed", "left_token"):
            MODELS[kind] = tiny_model(slot_start=kind, num_hidden_layers=1)
        else:
            own = {"mask_token_id": MASK_TOKEN} if kind == "masked_diffusion" else {}
            settings = tiny_config(num_hidden_layers=1).to_dict()
            settings = {name: value for name, value in settings.items() if name not in ("model_type", "slot_start")}
            MODELS[kind] = ARCHITECTURES[kind].model(ARCHITECTURES[kind].config(**settings, **own)).eval()
    return MODELS[kind]


def forward(model, input_ids=IDS, **arguments):
    return model(input_ids, **arguments).logits


def forward_in_groups(model, input_ids=IDS, group_ids=GROUPS, **arguments):
    return model(input_ids, group_ids=group_ids, **arguments).logits[:, 1:]


def log_likelihood(model, input_ids=IDS, group_ids=GROUPS, **arguments):
    return model.log_likelihood(input_ids, group_ids, **arguments)


def generate(model, input_ids=IDS, blank_mask=BLANKS, max_new_tokens=2, **arguments):
    output = model.generate_any_order(input_ids, blank_mask, max_new_tokens, **{"seed": 1, **arguments})
    return output.log_probs


def infill_blanks(model, input_ids=IDS, blank_mask=BLANKS, **arguments):
    return model.generate_any_order(input_ids, blank_mask, **arguments).log_probs


CALLS = {one.__name__: one for one in (forward, forward_in_groups, log_likelihood, generate)}
# Masked diffusion has no groups in `forward`.
METHODS = [
    (kind, name) for kind in KINDS for name in CALLS if (kind, name) != ("masked_diffusion", "forward_in_groups")
]


def assert_refused(call, model, argument: str, **arguments) -> None:
    with pytest.raises(ValueError) as caught:
        call(model, **arguments)
    assert argument in str(caught.value), str(caught.value)


def with_id(token_id: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[1, 3] = token_id
    return ids


ODD_IDS = {
    "list": IDS.tolist(),
    "text": "The dog",
    "float": IDS.float(),
    "bool": IDS.bool(),
    "complex": IDS.to(torch.complex64),
    "1d": IDS[0],
    "3d": IDS[None],
    "no_rows": IDS[:0],
    "no_tokens": IDS[:, :0],
    "negative": with_id(-1),
    "ignored_label": with_id(-100),
    "one_too_many": with_id(VOCABULARY),
    "huge": with_id(10**12),
}


@pytest.mark.parametrize("odd", ODD_IDS)
@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_odd_input_ids(kind, method, odd):
    assert_refused(CALLS[method], made(kind), "input_ids", input_ids=ODD_IDS[odd])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_other_integers_are_as_good(kind, method, dtype):
    model = made(kind)
    with torch.no_grad():
        expected = CALLS[method](model)
        groups = {"group_ids": GROUPS.to(dtype)} if method in ("forward_in_groups", "log_likelihood") else {}
        assert torch.equal(CALLS[method](model, input_ids=IDS.to(dtype), **groups), expected)


ODD_MASKS = {
    "list": MASK.tolist(),
    "too_long": torch.ones(2, 7),
    "too_short": torch.ones(2, 5).long(),
    "too_few_rows": torch.ones(1, 6).bool(),
    "1d": torch.ones(6),
    "half": MASK * 0.5,
    "additive": torch.zeros(2, 6).masked_fill(MASK == 0, -torch.inf),
    "nan": torch.full((2, 6), torch.nan),
    "two": MASK * 2,
    "negative": -MASK,
}


@pytest.mark.parametrize("odd", ODD_MASKS)
@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_odd_attention_masks(kind, method, odd):
    assert_refused(CALLS[method], made(kind), "attention_mask", attention_mask=ODD_MASKS[odd])


@pytest.mark.parametrize("odd", ODD_MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_blank_masks(kind, odd):
    assert_refused(generate, made(kind), "blank_mask", blank_mask=ODD_MASKS[odd])


@pytest.mark.parametrize("odd", ODD_MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_scored_masks(kind, odd):
    assert_refused(log_likelihood, made(kind), "scored_mask", scored_mask=ODD_MASKS[odd])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_masks_of_0_and_1_are_as_good(kind, method, dtype):
    model = made(kind)
    masks = {"attention_mask": MASK}
    if method == "generate":
        masks["blank_mask"] = BLANKS
    with torch.no_grad():
        expected = CALLS[method](model, **masks)
        assert torch.equal(CALLS[method](model, **{name: mask.to(dtype) for name, mask in masks.items()}), expected)


ODD_GROUPS = {
    "list": GROUPS.tolist(),
    "float": GROUPS.float(),
    "bool": GROUPS.bool(),
    "1d": GROUPS[0],
    "too_short": GROUPS[:, :5],
    "too_few_rows": GROUPS[:1],
}


@pytest.mark.parametrize("odd", ODD_GROUPS)
@pytest.mark.parametrize("method", ["forward_in_groups", "log_likelihood"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_group_ids(kind, method, odd):
    if (kind, method) in METHODS:
        assert_refused(CALLS[method], made(kind), "group_ids", group_ids=ODD_GROUPS[odd])


ODD_PASSES = [
    ("labels", IDS.float()),
    ("labels", IDS[:, 1:]),
    ("labels", IDS.tolist()),
    ("labels", with_id(VOCABULARY)),
    ("labels", with_id(-1)),
    ("position_ids", GROUPS.float()),
    ("position_ids", GROUPS[:, 1:]),
    ("position_ids", GROUPS - 1),
    ("position_ids", GROUPS.tolist()),
    ("past_key_values", ((1, 2),)),
    ("past_key_values", [1]),
    ("past_key_values", "cache"),
    ("logits_to_keep", 1.5),
    ("logits_to_keep", -1),
    ("logits_to_keep", torch.tensor([9])),
    ("target_position_ids", GROUPS.float()),
    ("target_position_ids", GROUPS - 1),
    ("target_group_ids", GROUPS.float()),
    ("target_group_ids", GROUPS[:, 1:]),
    ("document_ids", GROUPS[:, 1:]),
    ("document_ids", GROUPS.float()),
    ("targt_position_ids", GROUPS),  # what nobody knows
    ("slot_start", "left_token"),
    ("max_new_tokens", 4),
]


@pytest.mark.parametrize(("argument", "value"), ODD_PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_arguments_of_a_pass(kind, argument, value):
    is_diffusion = kind == "masked_diffusion"
    with_groups = {"group_ids": GROUPS} if argument.startswith(("target", "document")) and not is_diffusion else {}
    if argument == "target_position_ids" and kind not in ("decoupled_rope", "masked_diffusion"):
        with_groups["target_group_ids"] = GROUPS
    if argument == "target_group_ids":
        with_groups["target_position_ids"] = GROUPS
    name = "cache" if is_diffusion and argument == "past_key_values" else argument
    assert_refused(forward, made(kind), name, **with_groups, **{argument: value})


FOR_EVERY_MODEL = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2.0),
    ("max_new_tokens", "5"),
    ("max_new_tokens", True),
    ("max_new_tokens", 10**11),
    ("max_new_tokens", 127),
    ("num_return_sequences", 0),
    ("num_return_sequences", 1.5),
    ("num_return_sequences", 10**11),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", 1e-39),
    ("temperature", float("inf")),
    ("temperature", float("nan")),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_k", "5"),
    ("top_p", 1.5),
    ("top_p", -0.1),
    ("top_p", float("nan")),
    ("top_p", "0.9"),
    ("min_p", 2.0),
    ("min_p", "0.1"),
    ("typical_p", 0.0),
    ("typical_p", 1.1),
    ("epsilon_cutoff", 1.0),
    ("epsilon_cutoff", -0.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")),
    ("repetition_penalty", "2"),
    ("eos_token_id", -1),
    ("eos_token_id", VOCABULARY),
    ("eos_token_id", 2.0),
    ("eos_token_id", "2"),
    ("eos_token_id", [2, -1]),
    ("eos_token_id", [[2]]),
    ("pad_token_id", VOCABULARY),
    ("pad_token_id", "0"),
    ("forced_eos_token_id", VOCABULARY),
    ("forced_eos_token_id", 2.5),
    ("suppress_tokens", [VOCABULARY]),
    ("suppress_tokens", [-1]),
    ("suppress_tokens", 5),
    ("suppress_tokens", ["a"]),
    ("suppress_tokens", list(range(VOCABULARY))),
    ("bad_words_ids", [[VOCABULARY]]),
    ("bad_words_ids", [[-1]]),
    ("bad_words_ids", [[]]),
    ("bad_words_ids", [5]),
    ("bad_words_ids", "word"),
    ("bad_words_ids", [[token_id] for token_id in range(VOCABULARY)]),
    ("seed", [1]),
    ("seed", [1, 2, 3]),
    ("seed", 1.5),
    ("seed", "1"),
    ("seed", [1, None]),
    ("do_sample", "yes"),
    ("strategy", "spiral"),
    ("strategy", 5),
    ("streamer", object()),
    ("logits_hook", 5),
    ("commit_hook", "hook"),
    ("logits_processor", 5),
    ("logits_processor", [5]),
    ("generation_config", {"seed": 1}),
    ("num_beams", 4),
    ("max_length", 20),
    ("groupsize", 2),
]
FOR_A3 = [
    ("order", "spiral"),
    ("order", 5),
    ("order", [0, 1]),
    ("order", torch.zeros(2, 8)),
    ("order", torch.zeros(2, 8).bool()),
    ("order", torch.zeros(0).long()),
    ("order", torch.zeros(2, 0).long()),
    ("order", torch.zeros(2, 6).long()),
    ("order", torch.zeros(1, 8).long()),
    ("order", torch.zeros(8).long()),
    ("group_size", 0),
    ("group_size", 1.5),
    ("group_size", "4"),
    ("span_length", 2),
    ("max_time", 0),
    ("max_time", -1.0),
    ("max_time", "1s"),
    ("max_time", float("nan")),
    ("use_cache", "no"),
    ("cache_implementation", 5),
    ("cache_implementation", "paged"),
    ("past_key_values", ((1, 2),)),
    ("past_key_values", [1]),
    ("past_key_values", torch.zeros(2)),
    ("threshold", 0.5),
]
FOR_DYNAMIC = [
    ("criterion", "luck"),
    ("criterion", 5),
    ("criterion_temperature", -1.0),
    ("criterion_temperature", float("nan")),
    ("criterion_temperature", "1"),
    ("tokens_per_step", 0),
    ("tokens_per_step", 1.5),
    ("threshold", 0.0),
    ("threshold", 1.5),
    ("threshold", "0.5"),
    ("threshold", float("nan")),
    ("entropy_budget", -1.0),
    ("entropy_budget", "1"),
    ("entropy_budget", float("nan")),
    ("window", 0),
    ("window", 2.5),
    ("refine_fraction", 0.0),
]
SETTINGS = [
    *((kind, {}, *each) for kind in KINDS for each in FOR_EVERY_MODEL),
    *((kind, {}, *each) for kind in KINDS[:3] for each in FOR_A3),
    *((kind, {"strategy": "dynamic"}, *each) for kind in ("left_token", "masked_diffusion") for each in FOR_DYNAMIC),
    *(("left_token", {"strategy": "speculative"}, "draft_tokens", value) for value in (0, 1.5, "4")),
    *(("left_token", {"strategy": "speculative"}, "draft", value) for value in (5, "oracle")),
    *(("left_token", {"strategy": "refine"}, "refine_rounds", value) for value in (0, 1.5)),
    *(("left_token", {"strategy": "refine"}, "refine_fraction", value) for value in (0.0, "half", 2)),
    *(("masked_diffusion", {}, "steps", value) for value in (0, -1, 1.5, "4", True)),
    ("masked_diffusion", {"steps": 2}, "bad_words_ids", [[3, 4]]),
    ("masked_diffusion", {"tokens_per_step": 2}, "bad_words_ids", [[3, 4]]),
    ("left_token", {"group_size": 2}, "bad_words_ids", [[3, 4]]),
    ("left_token", {"max_time": 60.0}, "bad_words_ids", [[3, 4]]),
    ("masked_diffusion", {}, "use_cache", True),
    ("masked_diffusion", {}, "suppress_tokens", list(range(MASK_TOKEN))),
]


@pytest.mark.parametrize(("kind", "others", "option", "value"), SETTINGS)
def test_odd_settings_of_generation(kind, others, option, value):
    sampled = {"do_sample": True} if option in ("temperature", "top_k", "top_p", "num_return_sequences") else {}
    assert_refused(generate, made(kind), option, **{**sampled, **others, option: value})


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_cache_of_another_shape(kind):
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    blanks = torch.zeros_like(BLANKS)
    assert_refused(generate, made(kind), "past_key_values", blank_mask=blanks, past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_only_end_can_not_be_infilled(kind):
    """All but EOS is suppressed, and EOS is not written into blanks."""
    others = [token_id for token_id in range(VOCABULARY) if token_id != 2]
    settings = {"eos_token_id": 2, "suppress_tokens": others}
    assert_refused(generate, made(kind), "suppress_tokens", **settings)
    assert_refused(infill_blanks, made(kind), "suppress_tokens", **settings)


@pytest.mark.parametrize("option", ["temperature", "top_p", "max_new_tokens", "eos_token_id", "seed"])
def test_a_config_refuses_before_any_call(option):
    with pytest.raises(ValueError, match=option):
        A3GenerationConfig(**{"do_sample": True, option: "odd"})
