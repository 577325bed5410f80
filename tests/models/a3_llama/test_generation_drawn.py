"""UniformInt cases of generation: what is returned has the likelihood that is returned, and a row is the same alone.

fp64 throughout, so that rounding (1e-13) is far below both the tolerance and any true effect (1e-3 and more).
"""

import itertools
import random

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import a3_hf.models.a3_llama.generation_decoder as decoder_module
from a3_hf import A3LlamaForCausalLM
from a3_hf.models.auto import ARCHITECTURES
from tests.conftest import tiny_config

TOLERANCE = 1e-9
VOCABULARY = 13
MASK_TOKEN = 12
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.8,
}
A3_STRATEGIES = [
    {"strategy": "groupwise", "order": "left_to_right"},
    {"strategy": "groupwise", "order": "right_to_left", "group_size": 2},
    {"strategy": "groupwise", "order": "random", "group_size": 3},
    {"strategy": "groupwise", "order": "random"},
    {"strategy": "groupwise", "order": "spans", "span_length": 3, "group_size": 2},
    {"strategy": "groupwise", "order": "drawn"},
    {"strategy": "groupwise", "order": "random", "cache_implementation": "static"},
    {"strategy": "dynamic"},
    {"strategy": "dynamic", "tokens_per_step": 2, "window": 3},
    {"strategy": "dynamic", "criterion": "margin", "criterion_temperature": 0.5},
    {"strategy": "dynamic", "threshold": 0.4},
    {"strategy": "dynamic", "entropy_budget": 2.0},
    {"strategy": "dynamic", "criterion": "random", "tokens_per_step": 2},
    {"strategy": "speculative", "draft_tokens": 3},
    {"strategy": "speculative", "draft_tokens": 2, "order": "random"},
    {"strategy": "speculative", "draft_tokens": 3, "order": "right_to_left"},
    {"strategy": "speculative", "draft": "ngram", "draft_tokens": 3},
    {"strategy": "speculative", "draft": "ngram", "draft_tokens": 2, "order": "random"},
    {"strategy": "refine", "refine_rounds": 2},
    {"strategy": "refine", "refine_rounds": 1, "tokens_per_step": 2},
]
DECOUPLED_STRATEGIES = [
    {"order": "left_to_right"},
    {"order": "right_to_left"},
    {"order": "random"},
    {"order": "spans", "span_length": 2},
    {"order": "random", "cache_implementation": "static", "disable_compile": True},
]
DIFFUSION_STRATEGIES = [
    {},
    {"tokens_per_step": 2},
    {"threshold": 0.4},
    {"criterion": "entropy", "window": 3},
    {"steps": 3},
    {"criterion": "random"},
]
STRATEGIES_OF = {
    "query_embed": A3_STRATEGIES,
    "left_token": A3_STRATEGIES,
    "decoupled_rope": DECOUPLED_STRATEGIES,
    "masked_diffusion": DIFFUSION_STRATEGIES,
}


def exact_model(kind: str):
    """A tiny model in fp64, norms included, which LLaMA computes in fp32 whatever the weights."""
    torch.manual_seed(1)
    if kind in ("query_embed", "left_token"):
        model = A3LlamaForCausalLM(tiny_config(**SHAPE, slot_start=kind))
    else:
        architecture = ARCHITECTURES[kind]
        own = {"mask_token_id": MASK_TOKEN} if kind == "masked_diffusion" else {}
        settings = {name: value for name, value in tiny_config(**SHAPE).to_dict().items() if name != "model_type"}
        model = architecture.model(architecture.config(**{**settings, **own}))
    return in_fp64(model)


def in_fp64(model):
    model = model.double().eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def drawn_rows(draw: random.Random, kind: str):
    """(B, S) ids, blanks and real tokens: rows of different lengths, padded on a side, on both, or full of holes; and how
    many new tokens.
    """
    batch_size, width = draw.choice([1, 2, 3, 4]), draw.randint(2, 8)
    layout = draw.choice(["none", "left", "right", "both", "holes"])
    ids = torch.tensor([[draw.randrange(VOCABULARY - 1) for _ in range(width)] for _ in range(batch_size)])
    real, blank = torch.zeros(2, batch_size, width).bool()
    inside = draw.random() < 0.7
    for row in range(batch_size):
        length = width if layout == "none" else draw.randint(1, width)
        start = {"left": width - length, "right": 0, "none": 0}.get(layout, draw.randint(0, width - length))
        columns = range(start, start + length)
        if layout == "holes":
            columns = sorted(draw.sample(range(width), length))
        real[row, list(columns)] = True
        given = draw.choice(list(columns)) if kind != "masked_diffusion" else columns[0]
        for column in columns:
            blank[row, column] = inside and column != given and draw.random() < 0.5
    return ids, blank, real, draw.choice([0, 3, 6]) if blank.any() else draw.choice([3, 6])


def drawn_case(draw: random.Random, kind: str):
    """Rows, as from `drawn_rows`, and settings. Where slots compete, each row has two different given tokens at least: if
    all are the same, so are all values, positions make no difference, and rounding would decide among equals.
    """
    strategy = draw.choice(STRATEGIES_OF[kind])
    compete = kind == "masked_diffusion" or strategy.get("strategy") in ("dynamic", "refine")
    while True:
        ids, blank, real, num_new = drawn_rows(draw, kind)
        if not compete or all(len(row[here].unique()) > 1 for row, here in zip(ids, real & ~blank, strict=True)):
            break
    settings = drawn_settings(draw, kind, strategy, (ids.shape[0], ids.shape[1] + num_new))
    if num_new:
        settings["max_new_tokens"] = num_new
    return ids, blank, real, settings


def drawn_settings(draw: random.Random, kind: str, strategy: dict, shape: tuple[int, int]) -> dict:
    settings = dict(strategy)
    if settings.get("order") == "drawn":
        settings["order"] = torch.tensor([[draw.randint(-2, 9) for _ in range(shape[1])] for _ in range(shape[0])])
    if draw.random() < 0.6:
        settings |= {"do_sample": True, "temperature": draw.choice([1.0, 2.5])}
        settings |= draw.choice([{}, {}, {"top_k": 5}, {"top_p": 0.8}])
    settings["eos_token_id"] = draw.choice([[], 3, [3, 4, 5], [3, 4, 5, 6, 7]])
    if draw.random() < 0.25 and kind != "masked_diffusion" and "cache_implementation" not in settings:
        settings["use_cache"] = False
    if draw.random() < 0.2:
        settings["repetition_penalty"] = 1.6
    parallel = {"group_size", "threshold", "entropy_budget", "tokens_per_step", "steps"} & set(settings)
    if draw.random() < 0.3 and not parallel and not isinstance(settings.get("order"), torch.Tensor):
        behind = draw.sample(range(12), 12)  # one of each, so that no place is left without a token
        settings["bad_words_ids"] = [list(pair) for pair in enumerate(behind)] + [[9, 8, 10]]
    return settings


def generated(model, ids, blank, real, settings, seeds):
    settings = {**settings, "pad_token_id": 0, "attention_mask": real, "seed": seeds}
    return model.generate_any_order(ids, blank, **settings)


def check_likelihood(model, kind, output, settings) -> None:
    written = output.commit_step >= 0
    assert (output.log_probs[~written] == 0).all()
    if settings.get("use_cache") is False and settings.get("strategy") == "dynamic":
        return  # the paper's variant, whose passes belong to no one order
    scored = {"scored_mask": written} if kind == "masked_diffusion" else {}
    recomputed = model.log_likelihood(output.sequences, output.group_ids, output.group_ids >= 0, **scored)
    assert (recomputed - output.log_probs)[written].abs().max() < TOLERANCE


def check_text(ids, blank, real, output, settings) -> int:
    """Given tokens stay, an end is an end, banned pairs are not written; returns how many rows ended before their last
    column.
    """
    width = ids.shape[1]
    text, new = output.sequences[:, :width], output.sequences[:, width:]
    assert torch.equal(text[~blank], ids[~blank])
    eos = settings["eos_token_id"]
    is_eos = torch.isin(output.sequences, torch.tensor(eos if isinstance(eos, list) else [eos]))
    written = output.commit_step >= 0
    assert torch.equal(written[:, :width], blank) and not (is_eos[:, :width] & blank).any()
    ended = 0
    for row in range(len(ids)):
        end = int(is_eos[row, width:].long().argmax()) if is_eos[row, width:].any() else new.shape[1]
        assert written[row, width : width + end + 1].all()
        behind = slice(width + end + 1, None)
        assert not written[row, behind].any() and (output.sequences[row, behind] == 0).all()
        ended += end < new.shape[1] - 1
        here = torch.cat([real[row], written[row, width:] | (torch.arange(new.shape[1]) < end)])
        check_bad_words(output.sequences[row, here].tolist(), written[row, here].tolist(), settings)
    return ended


def check_bad_words(tokens, written, settings) -> None:
    for words in settings.get("bad_words_ids", []):
        for start in range(len(tokens) - len(words) + 1):
            place = slice(start, start + len(words))
            assert tokens[place] != words or not any(written[place])


def check_alone(model, row, together, ids, blank, real, settings, seeds) -> None:
    new = together.sequences.shape[1] - ids.shape[1]
    here = real[row]
    columns = torch.cat([here, torch.ones(new, dtype=torch.bool)])
    if isinstance(settings.get("order"), torch.Tensor):
        settings = {**settings, "order": settings["order"][row : row + 1, columns]}
    alone = generated(model, ids[row : row + 1, here], blank[row : row + 1, here], None, settings, [seeds[row]])
    assert torch.equal(alone.sequences[0], together.sequences[row, columns])
    if settings.get("strategy") != "refine":  # whose rounds begin when the longest row is full
        assert torch.equal(alone.commit_step[0], together.commit_step[row, columns])
    assert (alone.log_probs[0] - together.log_probs[row, columns]).abs().max() < TOLERANCE


def run_case(model, kind: str, seed: int) -> int:
    """One drawn case; returns how many of its rows ended before their last column."""
    draw = random.Random(seed)
    ids, blank, real, settings = drawn_case(draw, kind)
    seeds = [draw.randrange(10**6) for _ in range(len(ids))]
    output = generated(model, ids, blank, real, settings, seeds)
    check_likelihood(model, kind, output, settings)
    ended = check_text(ids, blank, real, output, settings)
    rows = blank.any(dim=1) | ("max_new_tokens" in settings)  # a row with nothing to write is none alone
    for row in rows.nonzero().flatten().tolist():
        check_alone(model, row, output, ids, blank, real, settings, seeds)
    return ended


def run_cases(kind: str, seeds: range) -> None:
    model, ended, failures = exact_model(kind), 0, []
    for seed in seeds:
        try:
            ended += run_case(model, kind, seed)
        except Exception as error:
            failures.append((seed, repr(error)[:300]))
    print(f"{kind}: {len(seeds)} drawn cases, {ended} rows ended early, {len(failures)} failures")
    assert not failures, failures[:5]
    assert ended > len(seeds) // 8


QUICK = {"query_embed": 90, "left_token": 140, "decoupled_rope": 60, "masked_diffusion": 40}
FULL = {"query_embed": 1900, "left_token": 2300, "decoupled_rope": 1000, "masked_diffusion": 600}


@pytest.mark.parametrize("kind", QUICK)
def test_drawn_cases(kind):
    run_cases(kind, range(QUICK[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_many_drawn_cases(kind):
    run_cases(kind, range(1000, 1000 + FULL[kind]))


def test_time_that_is_up_leaves_the_likelihood_of_what_is_returned(monkeypatch):
    """The tokens of the last pass don't see each other, and what they and others have seen stays."""
    cases = 0
    for kind in ("left_token", "masked_diffusion"):
        model = exact_model(kind)
        for seed in range(60):
            clock, draw = itertools.count(), random.Random(seed)
            monkeypatch.setattr(decoder_module.time, "perf_counter", lambda clock=clock: float(next(clock)))
            ids, blank, real, settings = drawn_case(draw, kind)
            settings = {**settings, "max_time": 2.5, "bad_words_ids": None}
            output = generated(model, ids, blank, real, settings, list(range(len(ids))))
            check_likelihood(model, kind, output, settings)
            new = output.commit_step[:, ids.shape[1] :]
            eos = settings["eos_token_id"]
            is_eos = torch.isin(
                output.sequences[:, ids.shape[1] :], torch.tensor(eos if isinstance(eos, list) else [eos])
            )
            behind = is_eos.long().cumsum(1).clamp_max(1).bool()
            whole = (new >= 0) | behind
            assert torch.equal(whole, whole.long().cumprod(1).bool())  # an unbroken beginning
            cases += 1
    assert cases == 120
