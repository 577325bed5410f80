"""Any-order decoding against a slow decoder that knows neither cache nor batch."""

import pytest
import torch

from a3_hf import A3GenerationConfig
from a3_hf.models.a3_llama.orders import GroupOrder
from tests.conftest import tiny_model
from tests.models.a3_llama.test_orders import ragged_mask

STRATEGIES = {
    "left_to_right": {"strategy": "groupwise", "group_size": 1},
    "right_to_left": {"strategy": "groupwise", "order": "right_to_left", "group_size": 2},
    "random": {"strategy": "groupwise", "order": "random", "group_size": 3, "seed": 5},
    "spans": {"strategy": "groupwise", "order": "spans", "span_length": 3, "group_size": 2, "seed": 5},
    "confidence": {"strategy": "dynamic", "tokens_per_step": 2},
    "entropy": {"strategy": "dynamic", "criterion": "entropy"},
    "margin": {"strategy": "dynamic", "criterion": "margin", "tokens_per_step": 3},
    "random_criterion": {"strategy": "dynamic", "criterion": "random", "tokens_per_step": 2, "seed": 3},
    "threshold": {"strategy": "dynamic", "threshold": 0.3},
    "entropy_budget": {"strategy": "dynamic", "entropy_budget": 4.0},
    "window": {"strategy": "dynamic", "tokens_per_step": 2, "window": 3},
    "criterion_temperature": {"strategy": "dynamic", "criterion_temperature": 1.0, "seed": 7},
    "speculative": {"strategy": "speculative", "draft_tokens": 3},
    "speculative_random": {"strategy": "speculative", "order": "random", "seed": 5},
    "ngram": {"strategy": "speculative", "draft": "ngram", "draft_tokens": 2},
}


def problem(side="left", lengths=(19, 12, 15)):
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), width), generator=generator)
    mask = ragged_mask(lengths, width, side)
    first = mask & (mask.long().cumsum(1) == 1)
    blanks = (torch.rand(len(lengths), width, generator=generator) < 0.5) & mask & ~first
    return ids, blanks, mask


def by_the_definition(model, ids, blanks, output):
    """Log-probabilities of each written token, one row and one group at a time, without a cache: the given tokens as
    singletons in text order, then what was written, in the order that the output tells.
    """
    log_probs = torch.zeros(ids.shape, dtype=model.dtype)
    greedy = torch.full(ids.shape, -1)
    for row in range(ids.shape[0]):
        groups = output.group_ids[row]
        for group in groups[blanks[row]].unique():
            known, asked = ((groups < group).nonzero().flatten(), (groups == group).nonzero().flatten())
            with torch.no_grad():
                logits = model(
                    output.sequences[row, known][None],
                    position_ids=known[None],
                    group_ids=groups[known][None],
                    target_position_ids=asked[None],
                    target_group_ids=torch.full((1, len(asked)), 10**6),
                    use_cache=False,
                ).logits[0]
            log_probs[row, asked] = logits.log_softmax(-1).gather(-1, output.sequences[row, asked][:, None])[:, 0]
            greedy[row, asked] = logits.argmax(-1)
    return log_probs, greedy


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_decoding_is_the_definition(name, implementation):
    model = tiny_model(attn_implementation=implementation)
    for row in range(3):
        ids, blanks, _ = (tensor[row : row + 1][:, problem()[2][row]] for tensor in problem())
        output = model.generate_any_order(ids, blanks, **STRATEGIES[name])
        log_probs, greedy = by_the_definition(model, ids, blanks, output)
        assert torch.equal(output.sequences[~blanks], ids[~blanks]) and (output.commit_step[~blanks] == -1).all()
        assert torch.equal(output.sequences[blanks], greedy[blanks])
        assert (output.log_probs - log_probs).abs().max() < 1e-4
        groups = torch.where(blanks, 100 + output.commit_step, (~blanks).cumsum(1))
        if STRATEGIES[name]["strategy"] != "speculative":  # there, one pass writes tokens that see each other
            assert all(torch.equal(a.unique(return_inverse=True)[1], b) for a, b in [(groups, output.group_ids)])
        assert output.num_forward_passes == int(output.commit_step.max()) + 1
        assert output.tokens_per_forward == pytest.approx(int(blanks.sum()) / output.num_forward_passes)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_is_the_same_alone_and_in_a_batch(model, name, side, do_sample):
    ids, blanks, mask = problem(side)
    seeds = {"seed": [11, 12, 13]}
    settings = {**STRATEGIES[name], **seeds, "do_sample": do_sample}
    together = model.generate_any_order(ids, blanks, attention_mask=mask.long(), **settings)
    for row in range(3):
        real = mask[row]
        settings["seed"] = [seeds["seed"][row]]
        alone = model.generate_any_order(ids[row : row + 1, real], blanks[row : row + 1, real], **settings)
        assert torch.equal(alone.sequences[0], together.sequences[row, real])
        assert torch.equal(alone.commit_step[0], together.commit_step[row, real])
        assert (alone.log_probs[0] - together.log_probs[row, real]).abs().max() < 1e-4
    assert torch.equal(together.sequences[~blanks], ids[~blanks])


@pytest.mark.parametrize("name", ["left_to_right", "random", "spans", "speculative", "speculative_random", "ngram"])
def test_without_cache_is_the_same(model, name):
    ids, blanks, mask = problem()
    settings = {"attention_mask": mask.long(), **STRATEGIES[name]}
    cached = model.generate_any_order(ids, blanks, **settings)
    uncached = model.generate_any_order(ids, blanks, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert (cached.log_probs - uncached.log_probs).abs().max() < 1e-4


def test_dynamic_without_cache_is_the_papers_variant(model):
    ids, blanks, _ = (tensor[:1] for tensor in problem(lengths=(19,)))
    output = model.generate_any_order(ids, blanks, strategy="dynamic", tokens_per_step=2, use_cache=False)
    steps = output.commit_step[0]
    for step in range(int(steps.max()) + 1):  # every filled token in one bidirectional group, every open blank asked
        known = (steps < step).nonzero().flatten()
        asked = (steps >= step).nonzero().flatten()
        with torch.no_grad():
            logits = model(
                output.sequences[:, known],
                position_ids=known[None],
                group_ids=torch.zeros_like(known)[None],
                target_position_ids=asked[None],
                target_group_ids=torch.ones_like(asked)[None],
                use_cache=False,
            ).logits[0]
        best = logits.log_softmax(-1).amax(-1).argsort(descending=True)[:2]
        assert set(asked[best].tolist()) == set((steps == step).nonzero().flatten().tolist())
        assert torch.equal(output.sequences[0, asked[best]], logits[best].argmax(-1))


def test_log_probs_are_the_log_likelihood_of_the_order(model):
    ids, blanks, mask = problem()
    for settings in [*STRATEGIES.values(), {"strategy": "refine"}]:
        output = model.generate_any_order(ids, blanks, attention_mask=mask.long(), **settings)
        scored = model.log_likelihood(output.sequences, output.group_ids, mask.long())
        assert (scored - output.log_probs)[blanks].abs().max() < 1e-4
        assert (output.group_ids == -1).equal(~mask)


RULES = [
    ({"tokens_per_step": 2}, lambda s, c, e: 2),
    ({"criterion": "entropy"}, lambda s, c, e: 1),
    ({"criterion": "margin", "tokens_per_step": 3}, lambda s, c, e: 3),
    ({"threshold": 0.3}, lambda s, c, e: max(1, int((c > 0.3).sum()))),
    ({"entropy_budget": 4.0}, lambda s, c, e: max(1, int((e.sort().values.cumsum(0) <= 4.0).sum()))),
    ({"tokens_per_step": 2, "window": 4}, lambda s, c, e: 2),
]


@pytest.mark.parametrize("settings, how_many", RULES)
def test_dynamic_against_a_slow_loop(model, settings, how_many):
    """Each step from scratch: which blanks compete, which are best, how many are committed."""
    ids, blanks, _ = (tensor[:1] for tensor in problem(lengths=(19,)))
    output = model.generate_any_order(ids, blanks, strategy="dynamic", **settings)
    tokens, groups = ids[0].clone(), torch.where(blanks[0], -1, (~blanks[0]).cumsum(0))
    step = 0
    while (groups < 0).any():
        known, asked = (groups >= 0).nonzero().flatten(), (groups < 0).nonzero().flatten()[: settings.get("window")]
        with torch.no_grad():
            logits = model(
                tokens[known][None],
                position_ids=known[None],
                group_ids=groups[known][None],
                target_position_ids=asked[None],
                target_group_ids=torch.full((1, len(asked)), 10**6),
            ).logits[0]
        probs = logits.softmax(-1)
        entropy, confidence = -(probs * probs.log()).sum(-1), probs.amax(-1)
        top = probs.topk(2, -1).values
        score = {"entropy": -entropy, "margin": top[:, 0] - top[:, 1]}.get(settings.get("criterion"), confidence)
        if "entropy_budget" in settings:
            score = -entropy
        best = asked[score.argsort(descending=True)[: how_many(score, confidence, entropy)]]
        assert set(best.tolist()) == set((output.commit_step[0] == step).nonzero().flatten().tolist())
        tokens[best] = logits.argmax(-1)[torch.isin(asked, best)][best.argsort().argsort()]
        groups[best], step = 100 + step, step + 1
    assert torch.equal(tokens, output.sequences[0])


def test_left_to_right_continuation_is_greedy_generate(model):
    ids = problem()[0][:, :6]
    plain = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate_any_order(ids, max_new_tokens=9)
    assert torch.equal(output.sequences, plain)
    assert output.num_forward_passes == 9 and output.tokens_per_forward == 1
    grouped = model.generate_any_order(ids, max_new_tokens=9, group_size=4)
    assert grouped.num_forward_passes == 3 and grouped.tokens_per_forward == 3


def test_blanks_and_new_tokens_together(model):
    ids, blanks, mask = problem()
    output = model.generate_any_order(ids, blanks, 5, attention_mask=mask.long(), strategy="dynamic")
    assert output.sequences.shape == (3, 24)
    assert (output.commit_step[:, 19:] >= 0).all() and torch.equal(output.commit_step[:, :19] >= 0, blanks)


def test_groups_given_by_the_caller(model):
    ids, blanks, mask = problem()
    order = GroupOrder.infilling(blanks, attention_mask=mask, order="right_to_left", group_size=2)
    given = model.generate_any_order(ids, blanks, attention_mask=mask.long(), order=order.group_ids)
    built = model.generate_any_order(ids, blanks, attention_mask=mask.long(), order="right_to_left", group_size=2)
    assert torch.equal(given.sequences, built.sequences) and torch.equal(given.commit_step, built.commit_step)


def test_sampling_follows_the_model_and_the_seed(model):
    ids = problem()[0][:1, :5]
    settings = {"max_new_tokens": 1, "do_sample": True}
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1)
    many = model.generate_any_order(ids.expand(4000, -1), seed=1, **settings).sequences[:, -1]
    share = torch.bincount(many, minlength=61) / 4000
    assert (share - expected).abs().sum() / 2 < 0.05  # total variation; sampling error is about 0.02
    again = model.generate_any_order(ids.expand(4000, -1), seed=1, **settings).sequences[:, -1]
    other = model.generate_any_order(ids.expand(4000, -1), seed=2, **settings).sequences[:, -1]
    assert torch.equal(many, again) and not torch.equal(many, other)
    top = model.generate_any_order(ids.expand(200, -1), seed=1, top_k=2, **settings).sequences[:, -1]
    assert set(top.tolist()) == set(expected.topk(2).indices.tolist())
    cold = model.generate_any_order(ids, seed=1, temperature=1e-4, **settings).sequences[0, -1]
    assert cold == expected.argmax()


def test_without_a_seed_torchs_own_generator_decides(model):
    ids = problem()[0][:, :5]
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate_any_order(ids, max_new_tokens=8, do_sample=True).sequences)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_config_round_trip_and_overrides(model, tmp_path):
    config = A3GenerationConfig(strategy="dynamic", tokens_per_step=3, do_sample=True, top_p=0.9, seed=4)
    config.save_pretrained(tmp_path)
    again = A3GenerationConfig.from_pretrained(tmp_path)
    assert (again.strategy, again.tokens_per_step, again.top_p, again.seed) == ("dynamic", 3, 0.9, 4)
    ids, blanks, mask = problem()
    first = model.generate_any_order(ids, blanks, generation_config=config, attention_mask=mask)
    second = model.generate_any_order(ids, blanks, generation_config=again, attention_mask=mask)
    assert torch.equal(first.sequences, second.sequences)
    override = model.generate_any_order(ids, blanks, generation_config=config, attention_mask=mask, tokens_per_step=99)
    assert override.num_forward_passes == 1


IDS, BLANKS, MASK = problem()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "no blank to fill"),
        ({"blank_mask": BLANKS & False}, "no blank to fill"),
        ({"blank_mask": BLANKS[:, :4]}, "blank_mask has shape"),
        ({"blank_mask": ~MASK, "attention_mask": MASK}, "blank_mask is True at padding"),
        ({"blank_mask": BLANKS, "attention_mask": MASK[:, 1:]}, "attention_mask has shape"),
        ({"blank_mask": BLANKS | True}, "input_ids: row 0 has no given token"),
        ({"max_new_tokens": 120}, "take 139 positions, 11 more than the model's context .*128"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        (
            {"max_new_tokens": 4, "strategy": "spiral"},
            "strategy='spiral': expected one of groupwise, dynamic",
        ),
        ({"max_new_tokens": 4, "order": "spiral"}, "order='spiral'.*left_to_right"),
        ({"max_new_tokens": 4, "order": "spans"}, "span_length=None .*: expected a number with order='spans'"),
        ({"max_new_tokens": 4, "order": torch.zeros(3, 4).long()}, "order has shape"),
        ({"max_new_tokens": 4, "group_size": 0}, "group_size=0"),
        ({"max_new_tokens": 4, "tokens_per_step": 2}, "tokens_per_step=2 has no effect with strategy='groupwise'"),
        ({"max_new_tokens": 4, "strategy": "dynamic", "order": "random"}, "order='random' has no effect"),
        ({"max_new_tokens": 4, "strategy": "dynamic", "criterion": "luck"}, "confidence, entropy, margin, random"),
        (
            {"max_new_tokens": 4, "strategy": "dynamic", "threshold": 1.5},
            r"threshold=1.5: expected a number in \(0, 1",
        ),
        (
            {"max_new_tokens": 4, "strategy": "dynamic", "threshold": 0.5, "tokens_per_step": 2},
            "tokens_per_step and threshold exclude each other",
        ),
        ({"max_new_tokens": 4, "groupsize": 2}, "groupsize=2 is not an option"),
        ({"max_new_tokens": 4, "num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_new_tokens": 4, "no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2 is not supported"),
        ({"max_new_tokens": 4, "strategy": "dynamic", "tokens_per_step": 0}, "tokens_per_step=0"),
        (
            {"max_new_tokens": 4, "strategy": "dynamic", "tokens_per_step": 4, "window": 3},
            "window=3: expected at least tokens_per_step=4",
        ),
        ({"max_new_tokens": 4, "strategy": "dynamic", "entropy_budget": -1.0}, "entropy_budget=-1.0"),
        (
            {"max_new_tokens": 4, "strategy": "dynamic", "entropy_budget": 1.0, "threshold": 0.5},
            "threshold and entropy_budget exclude each other",
        ),
        ({"max_new_tokens": 4, "strategy": "dynamic", "criterion_temperature": -1.0}, "criterion_temperature=-1.0"),
        ({"max_new_tokens": 4, "strategy": "dynamic", "draft": "ngram"}, "draft='ngram' has no effect"),
        ({"max_new_tokens": 4, "strategy": "speculative", "group_size": 2}, "group_size=2 has no effect"),
        ({"max_new_tokens": 4, "strategy": "speculative", "draft": "oracle"}, "one of model, ngram"),
        ({"max_new_tokens": 4, "strategy": "speculative", "order": torch.zeros(3, 23).long()}, "one token per group"),
        (
            {"max_new_tokens": 4, "bad_words_ids": [[3, 4]], "max_time": 9.0},
            "or strategy='speculative', without max_time",
        ),
        ({"max_new_tokens": 4, "strategy": "refine", "refine_fraction": 0.0}, "refine_fraction=0.0"),
        ({"max_new_tokens": 4, "max_time": 0}, "max_time=0"),
        ({"max_new_tokens": 4, "num_return_sequences": 2}, "num_return_sequences. different than 1"),
        (
            {"max_new_tokens": 4, "bad_words_ids": [[3, 4]], "group_size": 2},
            "bad_words_ids holds a sequence of several",
        ),
        ({"blank_mask": BLANKS, "attention_mask": MASK, "forced_eos_token_id": 2}, "needs max_new_tokens"),
        (
            {"max_new_tokens": 4, "cache_implementation": "static", "strategy": "dynamic"},
            "expected strategy='groupwise'",
        ),
        ({"max_new_tokens": 4, "cache_implementation": "quantized"}, "one of dynamic, static"),
        ({"max_new_tokens": 4, "streamer": object()}, "streamer with 3 rows: expected a batch of 1"),
        ({"max_new_tokens": 4, "seed": [1, 2]}, "seed holds 2 seeds"),
        ({"max_new_tokens": 4, "generation_config": {"group_size": 2}}, "generation_config is a dict"),
    ],
)
def test_bad_input_names_the_argument(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate_any_order(IDS, **arguments)


@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative"])
def test_padding_is_not_seen_where_all_rows_have_as_much_of_it(model, strategy):
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    alone = model.generate_any_order(ids, max_new_tokens=8, strategy=strategy)
    padded, mask = (torch.nn.functional.pad(one, (3, 0)) for one in (ids, torch.ones_like(ids)))
    beside = model.generate_any_order(padded, max_new_tokens=8, attention_mask=mask, strategy=strategy)
    assert torch.equal(alone.sequences, beside.sequences[:, 3:])
    assert (alone.log_probs - beside.log_probs[:, 3:]).abs().max() < 1e-4
