"""Where a text ends, what may be written, and what stands left of what: by position, and with the model's own EOS."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList

from a3_hf.models.auto import ARCHITECTURES
from tests.conftest import tiny_config, tiny_model
from tests.models.a3_llama.test_generation_drawn import exact_model

KINDS = ["query_embed", "left_token", "decoupled_rope", "masked_diffusion"]


def made(kind: str, **changes):
    if kind in ("query_embed", "left_token"):
        return tiny_model(slot_start=kind, **changes)
    own = {"mask_token_id": 60} if kind == "masked_diffusion" else {}
    settings = tiny_config(**changes).to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "slot_start")}
    torch.manual_seed(42)
    return ARCHITECTURES[kind].model(ARCHITECTURES[kind].config(**settings, **own)).eval()


def prompt(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(3))


# The model's own EOS


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_eos_ends_a_continuation(kind):
    """Issue: a chat model ran on past its end, where `generate` stops."""
    model, ids = made(kind), prompt()
    free = model.generate_any_order(ids, max_new_tokens=8, eos_token_id=[])
    eos = int(free.sequences[0, 6:][free.commit_step[0, 6:] == (3 if kind != "masked_diffusion" else 0)])
    model.generation_config.eos_token_id = [eos, 59]
    ended = model.generate_any_order(ids, max_new_tokens=8)
    explicit = model.generate_any_order(ids, max_new_tokens=8, eos_token_id=[eos, 59])
    assert torch.equal(ended.sequences, explicit.sequences) and not torch.equal(ended.sequences, free.sequences)
    assert (ended.commit_step[0] == -1)[6:].any()
    for off in ({"eos_token_id": []}, {"eos_token_id": None}):
        assert torch.equal(model.generate_any_order(ids, max_new_tokens=8, **off).sequences, free.sequences)
    model.generation_config.eos_token_id = -1  # none, as in `generate`
    assert torch.equal(model.generate_any_order(ids, max_new_tokens=8).sequences, free.sequences)
    model.generation_config.eos_token_id = 61
    with pytest.raises(ValueError, match="eos_token_id holds 61"):
        model.generate_any_order(ids, max_new_tokens=8)


@pytest.mark.parametrize("slot_start", ["query_embed", "left_token"])
def test_left_to_right_it_stops_where_generate_stops(slot_start):
    model, ids = tiny_model(slot_start=slot_start), prompt(3)
    free = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config.eos_token_id = int(free[1, 9])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for settings in ({}, {"strategy": "speculative"}, {"strategy": "speculative", "draft": "ngram"}):
        output = model.generate_any_order(ids, max_new_tokens=12, pad_token_id=0, **settings)
        assert torch.equal(output.sequences[:, : plain.shape[1]], plain)


# What is left to write


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_left_to_write_it_says_so(kind):
    """Issue: token 0 was written in silence."""
    model, ids = made(kind), prompt()
    with pytest.raises(ValueError, match="suppress_tokens and bad_words_ids exclude all of the model's 61 tokens"):
        model.generate_any_order(ids, max_new_tokens=2, suppress_tokens=list(range(61)))

    def nothing(step, columns, logits):
        return torch.full_like(logits, -torch.inf)

    def broken(input_ids, scores):
        return scores * torch.nan

    for hook in ({"logits_hook": nothing}, {"logits_processor": LogitsProcessorList([broken])}):
        for sampled in ({}, {"do_sample": True, "seed": 1}):
            with pytest.raises(ValueError, match="exclude all tokens at step 0"):
                model.generate_any_order(ids, max_new_tokens=2, **hook, **sampled)


@pytest.mark.parametrize("strategy", ["dynamic", "speculative", "refine", "groupwise"])
def test_every_strategy_says_so(strategy):
    ends = {"eos_token_id": 5, "suppress_tokens": [one for one in range(61) if one != 5]}
    with pytest.raises(ValueError, match="exclude all tokens at step"):  # EOS has no place left of the last column
        order = {"order": "right_to_left"} if strategy in ("speculative", "groupwise") else {"seed": 3}
        criterion = {"criterion": "random"} if strategy in ("dynamic", "refine") else {}
        tiny_model(slot_start="left_token").generate_any_order(
            prompt(8), max_new_tokens=5, strategy=strategy, **order, **criterion, **ends
        )


# Sampling at the edges of numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1e-30, 1e-20, 1e-5, 1e30])
def test_extreme_temperatures_draw_from_what_is_allowed(kind, temperature):
    """Beside −inf logits; issue: NaN probabilities wrote token 0."""
    model, ids = made(kind), prompt(8)
    suppressed = list(range(30))
    settings = {"max_new_tokens": 4, "suppress_tokens": suppressed, "eos_token_id": []}
    strategies = [{"strategy": "dynamic"}] if kind == "masked_diffusion" else [{"strategy": "groupwise"}]
    if kind == "left_token":
        strategies += [{"strategy": name} for name in ("dynamic", "speculative", "refine")]
    for strategy in strategies:
        greedy = model.generate_any_order(ids, **settings, **strategy).sequences
        drawn = model.generate_any_order(ids, do_sample=True, temperature=temperature, seed=1, **settings, **strategy)
        assert not torch.isin(drawn.sequences[:, 6:], torch.tensor(suppressed)).any()
        if temperature < 1:
            assert torch.equal(drawn.sequences, greedy)
        else:
            assert len(drawn.sequences[:, 6:].unique()) > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1e-39, 1e-46, float("inf"), float("nan")])
def test_temperatures_without_a_meaning_are_refused(kind, temperature):
    with pytest.raises(ValueError, match="temperature="):
        made(kind).generate_any_order(prompt(), max_new_tokens=2, do_sample=True, temperature=temperature)


# By position


def layouts(length: int, width: int):
    """Where `length` real tokens may lie among `width` columns."""
    places = [range(length), range(width - length, width), range(1, length + 1), [0, *range(width - length + 1, width)]]
    for columns in places:
        yield torch.zeros(width, dtype=torch.bool).index_fill(0, torch.tensor(list(columns)), True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_left_is_found_by_position(kind):
    """Issue: behind right padding, and in a mask with holes, the token in the column to the left was taken."""
    model, text = exact_model(kind), torch.tensor([10, 8, 9, 11])
    settings = {"max_new_tokens": 5, "eos_token_id": []}
    alone = model.generate_any_order(text[None], **settings)
    for real in layouts(4, 7):
        ids = torch.full((1, 7), 2).masked_scatter(real[None], text)
        output = model.generate_any_order(ids, attention_mask=real[None], **settings)
        here = torch.cat([real, torch.ones(5, dtype=torch.bool)])
        assert torch.equal(output.sequences[0, here], alone.sequences[0])
        assert (output.log_probs[0, here] - alone.log_probs[0]).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_banned_pair_is_not_written_over_padding(kind):
    """Issue: under right padding a banned pair was written, for neighbours were looked for by column."""
    model = exact_model(kind)
    pairs = [list(pair) for pair in itertools.product(range(12), range(12)) if sum(pair) % 3 == 1]
    for real in layouts(4, 7):
        ids = torch.full((1, 7), 2).masked_scatter(real[None], torch.tensor([10, 8, 9, 11]))
        output = model.generate_any_order(
            ids, attention_mask=real[None], max_new_tokens=6, eos_token_id=[], bad_words_ids=pairs
        )
        text = output.sequences[0, torch.cat([real, torch.ones(6, dtype=torch.bool)])].tolist()
        assert all(list(pair) not in pairs for pair in itertools.pairwise(text[3:]))


def test_processors_see_a_padded_row_as_they_see_it_alone():
    """The end of what they get is what they get alone; in front stands the row's first token."""
    seen = []

    def watch(input_ids, scores):
        seen.append(input_ids)
        return scores

    model, text = tiny_model(slot_start="left_token"), torch.tensor([1, 5, 0, 7])
    blank = torch.tensor([False, False, True, False])
    for real in layouts(4, 7):
        seen.clear()
        ids = torch.full((1, 7), 2).masked_scatter(real[None], text)
        blanks = torch.zeros(1, 7, dtype=torch.bool).masked_scatter(real[None], blank)
        model.generate_any_order(ids, blanks, attention_mask=real[None], logits_processor=[watch])
        assert seen[0].tolist() == [[1, 1, 1, 7, 1, 5]]


@pytest.mark.parametrize("draft", ["model", "ngram"])
@pytest.mark.parametrize("order", ["right_to_left", "random", "left_to_right"])
def test_speculation_with_ends_writes_what_one_token_at_a_time_does(draft, order):
    """In any order; an EOS is never a draft."""
    model, ends = exact_model("left_token"), 0
    for seed in range(12):
        ids = torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(seed))
        settings = {
            "max_new_tokens": 9,
            "eos_token_id": [3, 4, 5, 6],
            "order": order,
            "seed": [1, 2, seed],
            "pad_token_id": 0,
        }
        slow = model.generate_any_order(ids, **settings)
        fast = model.generate_any_order(ids, strategy="speculative", draft=draft, draft_tokens=3, **settings)
        assert torch.equal(slow.sequences, fast.sequences)
        assert (slow.log_probs - fast.log_probs).abs().max() < 1e-9
        ends += int((slow.commit_step[:, 5:] < 0).any(dim=1).sum())
    assert ends > 2 or order == "right_to_left"
