"""Decoupled RoPE against LLaMA from left to right, and against a slow model of its definition in any order."""

import itertools
import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from a3_hf import (
    A3LlamaForCausalLM,
    DecoupledRopeLlamaConfig,
    DecoupledRopeLlamaForCausalLM,
    DecoupledRopeLlamaModel,
    GroupOrder,
)
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import load_model
from a3_hf.data.arguments import DataArguments
from a3_hf.models.a3_llama.attention_masks import singleton_attention_mask
from a3_hf.models.a3_llama.generation_sampling import choose_tokens, uniform_noise
from a3_hf.models.a3_llama.generation_strategies import SAMPLE
from a3_hf.models.a3_llama.orders import seed_of
from a3_hf.training import run as train_module
from a3_hf.training.arguments import A3TrainingArguments, ModelArguments, Recipe
from a3_hf.training.base_trainer import EVALUATION_SEED, row_generator
from a3_hf.training.callbacks import InterruptCallback
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.dry_run import dry_run
from a3_hf.training.model_inputs import model_inputs
from a3_hf.training.recipes import parse_recipe
from a3_hf.training.trainer import EVALUATION_ORDERS
from tests.conftest import tiny_config
from tests.models.a3_llama.test_modeling import VARIANTS, leaks, llama_twin, random_ids, text_order
from tests.models.a3_llama.test_orders import generators, ragged_mask
from tests.training.test_trainer import make_trainer, naive_groups, rows


def tiny(seed: int = 42, *, dtype: torch.dtype = torch.float64, **changes) -> DecoupledRopeLlamaForCausalLM:
    config = tiny_config(**{"num_hidden_layers": 2, **changes})
    settings = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    implementation = {"attn_implementation": config._attn_implementation}
    return DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings, **implementation)).eval().to(dtype)


@pytest.fixture
def model() -> DecoupledRopeLlamaForCausalLM:
    return tiny()


def slow_logits(llama: LlamaForCausalLM, ids, positions, targets) -> torch.Tensor:
    """The definition (T, V), a token and a head at a time: keys turned by the token's own position, queries by that of the
    token asked for less one, RoPE as a product of complex numbers, and no token after the one at hand.
    """
    body, config = llama.model, llama.config
    width, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rope, caches, logits = body.rotary_emb, [([], []) for _ in body.layers], []

    def turned(states: torch.Tensor, position: int) -> torch.Tensor:
        states = states.view(-1, width)
        wave = torch.polar(torch.full_like(rope.inv_freq, rope.attention_scaling), rope.inv_freq * position)
        turned = torch.complex(states[:, : width // 2], states[:, width // 2 :]) * wave
        return torch.cat([turned.real, turned.imag], dim=1)

    for token, position, target in zip(ids, positions, targets, strict=True):
        state = body.embed_tokens.weight[token]
        for layer, (keys, values) in zip(body.layers, caches, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(state)
            queries = turned(attention.q_proj(normed), target - 1)
            keys.append(turned(attention.k_proj(normed), position))
            values.append(attention.v_proj(normed).view(-1, width))
            heads = []
            for head, query in enumerate(queries):
                key, value = (torch.stack([one[head // share] for one in cached]) for cached in (keys, values))
                heads.append((key @ query * width**-0.5).softmax(dim=0) @ value)
            state = state + attention.o_proj(torch.cat(heads))
            state = state + layer.mlp(layer.post_attention_layernorm(state))
        logits.append(llama.lm_head(body.norm(state)))
    return torch.stack(logits)


def token_by_token(llama: LlamaForCausalLM, ids, group_ids, mask) -> torch.Tensor:
    """(B, S, V) the slow model's logits of each token given those of lower groups; 0 where there are none."""
    logits = torch.zeros(*ids.shape, llama.config.vocab_size, dtype=llama.dtype)
    for row in range(len(ids)):
        columns = mask[row].nonzero().flatten()
        path = columns[group_ids[row, columns].argsort()]
        places = (mask[row].long().cumsum(0) - 1)[path].tolist()
        forecasts = slow_logits(llama, ids[row, path[:-1]].tolist(), places[:-1], places[1:])
        logits = logits.index_put((torch.tensor(row), path[1:]), forecasts)
    return logits


ORDERS = {
    "left_to_right": lambda mask, gens: GroupOrder.left_to_right(mask),
    "right_to_left": lambda mask, gens: GroupOrder.right_to_left(mask),
    "random": lambda mask, gens: GroupOrder.scattered(mask, group_size=1, generator=gens),
    "spans": lambda mask, gens: GroupOrder.spans(mask, span_length=4, group_size=1, generator=gens),
    "infilling": lambda mask, gens: GroupOrder.infilling(
        mask & (torch.arange(mask.shape[1]) % 4 > 1), attention_mask=mask, order="random", generator=gens
    ),
    # the first position is generated late: a query of position −1
    "late_start": lambda mask, gens: GroupOrder.right_to_left(
        mask, given_mask=mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    ),
}


# Parity with LLaMA


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_left_to_right_is_llama_bit_for_bit(name, implementation):
    model = tiny(attn_implementation=implementation, dtype=torch.float32, **VARIANTS[name])
    check_parity(model, llama_twin(model), random_ids())


def test_real_weights_from_left_to_right_are_llama_bit_for_bit(stories):
    model, llama = (cls.from_pretrained(stories).eval() for cls in (DecoupledRopeLlamaForCausalLM, LlamaForCausalLM))
    check_parity(model, llama, random_ids(2, 200, 512))


def check_parity(model, llama, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for dtype in (torch.float32, torch.float64):
        model, llama = model.to(dtype), llama.to(dtype)
        with torch.no_grad():
            expected = llama(ids).logits
            assert torch.equal(model(ids).logits, expected)  # the same products of the same shapes
            aligned = model(ids, position_ids=positions, target_position_ids=positions + 1)
            assert torch.equal(aligned.logits, expected)
            grouped = model(ids, group_ids=positions).logits[:, 1:]  # a column less goes in, and so other shapes
            shown = model(ids, group_ids=positions, attention_mask=torch.ones_like(ids)).logits[:, 1:]
    assert max((logits - expected[:, :-1]).abs().max() for logits in (grouped, shown)) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding_the_causal_contract_is_llamas(model, side):
    ids, mask = random_ids(3, 20), ragged_mask([20, 11, 15], 20, side)
    with torch.no_grad():
        expected = llama_twin(model)(ids, attention_mask=mask.long(), labels=ids, logits_to_keep=20)
        found = model(ids, attention_mask=mask.long(), labels=ids, logits_to_keep=20)
    assert torch.equal(found.logits[mask], expected.logits[mask]) and torch.equal(found.loss, expected.loss)


def test_the_weights_are_llamas(model):
    assert model.state_dict().keys() == llama_twin(model).state_dict().keys()


def test_transformers_generate_is_llamas(model):
    llama, ids, mask = llama_twin(model), random_ids(3, 9), ragged_mask([9, 4, 6], 9, "left").long()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    ways = [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 9},
        {"cache_implementation": "static", "disable_compile": True},
    ]
    for way in ways:
        texts = []
        for each in (model, llama):
            torch.manual_seed(5)
            texts.append(each.generate(ids, **settings, **{"do_sample": False, **way}))
        assert torch.equal(*texts), way


# The definition


@pytest.fixture
def flex_uncompiled():
    with torch.compiler.set_stance("force_eager"):  # compiling it for the CPU takes seconds a shape
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(
    "name, implementation, side",
    [
        *(
            (name, implementation, side)
            for name in ORDERS
            for implementation, side in (("sdpa", "left"), ("eager", "right"))
        ),
        ("random", "flex_attention", "left"),
    ],
)
def test_one_pass_is_token_by_token_in_values_and_gradients(name, implementation, side):
    ids, mask = random_ids(2, 11), ragged_mask([11, 7], 11, side)
    order = ORDERS[name](mask, generators(2))
    scored = order.group_ids > 0
    labels = ids.masked_fill(~scored, -100)
    model = tiny(attn_implementation=implementation)
    model.requires_grad_(implementation != "flex_attention")  # which has no backward on a CPU
    llama = llama_twin(model)
    fast = model(ids, group_ids=order.group_ids, attention_mask=mask.long(), labels=labels)
    slow = token_by_token(llama, ids, order.group_ids, mask)
    assert (fast.logits - slow)[scored].abs().max() < 1e-4
    loss = torch.nn.functional.cross_entropy(slow.flatten(0, 1), labels.flatten())
    assert fast.loss.item() == pytest.approx(loss.item(), abs=1e-4)
    if implementation == "flex_attention":
        return
    fast.loss.backward()
    loss.backward()
    expected = dict(llama.named_parameters())
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[key].grad, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ORDERS)
def test_no_leak(name, side):
    order = ORDERS[name](ragged_mask([13, 9], 13, side), generators(2))
    for row in range(2):
        assert leaks(tiny(), order, random_ids(2, 13), text_order, row) == []


def test_slots_are_the_tokens_they_ask_for_and_one_may_stand_behind_all(model):
    ids, mask = random_ids(2, 12), ragged_mask([12, 8], 12, "left")
    order = ORDERS["random"](mask, generators(2))
    places = (mask.long().cumsum(1) - 1).clamp_min(0)
    some = torch.tensor([[11, 4, 7], [5, 6, 11]])
    arguments = {"group_ids": order.group_ids, "attention_mask": mask.long()}
    with torch.no_grad():
        whole = model(ids, **arguments).logits
        slots = {"target_position_ids": places.gather(1, some), "target_group_ids": order.group_ids.gather(1, some)}
        few = model(ids, **arguments, **slots).logits
        assert (few - whole.gather(1, some[..., None].expand(-1, -1, 61))).abs().max() < 1e-4
        # all but the last token as content, and a slot for it
        last = order.group_ids[0].argmax()
        rest = torch.arange(12) != last
        behind = model(
            ids[:1, rest],
            position_ids=places[:1, rest],
            group_ids=order.group_ids[:1, rest],
            target_position_ids=places[:1, last : last + 1],
            target_group_ids=torch.tensor([[99]]),
        )
    assert (behind.logits[0, 0] - whole[0, last]).abs().max() < 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_passes_are_one_pass(implementation):
    model, ids = tiny(attn_implementation=implementation), random_ids(2, 14)
    mask = ragged_mask([14, 9], 14, "left")
    layout = ORDERS["random"](mask, generators(2)).lay_out(ids)
    ids, positions, mask = layout.input_ids, layout.position_ids, layout.attention_mask.long()
    targets = positions.roll(-1, dims=1)
    with torch.no_grad():
        whole = model(ids, position_ids=positions, target_position_ids=targets).logits
        for lengths in ([1] * 14, [5, 1, 6, 2]):
            cache, start, parts = DynamicCache(config=model.config), 0, []
            for length in lengths:
                part = slice(start, start + length)
                start += length
                parts.append(
                    model(
                        ids[:, part],
                        position_ids=positions[:, part],
                        target_position_ids=targets[:, part],
                        attention_mask=mask[:, :start],
                        past_key_values=cache,
                    ).logits
                )
            assert (torch.cat(parts, dim=1) - whole)[mask.bool()].abs().max() < 1e-4
        kept = [
            model(ids, position_ids=positions, target_position_ids=targets, logits_to_keep=keep).logits
            for keep in (2, torch.tensor([3, 0]), torch.tensor([[3, 0], [8, 8]]))
        ]
    assert (kept[0] - whole[:, -2:]).abs().max() < 1e-4 and (kept[1] - whole[:, [3, 0]]).abs().max() < 1e-4
    assert (kept[2][1] - whole[1, [8, 8]]).abs().max() < 1e-4


@pytest.mark.parametrize("rows_of_order", [[0, 1, 2, 3], [0, 3, 1, 2], [0, 2, 3, 1], [1, 3, 0, 2]])
def test_probabilities_of_all_texts_sum_to_one(rows_of_order):
    """Over all texts of four tokens whose first of the order is given."""
    model = tiny(vocab_size=4)
    given = rows_of_order.index(0)
    texts = [list(text) for text in itertools.product(range(4), repeat=3)]
    ids = torch.tensor([[*text[:given], 2, *text[given:]] for text in texts])
    group_ids = torch.tensor([rows_of_order]).expand_as(ids)
    log_probs = model.log_likelihood(ids, group_ids)
    assert float(log_probs.sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert (log_probs[:, given] == 0).all() and (log_probs.sum(1).exp().max() < 0.9)


def test_likelihood_does_not_depend_on_the_batch_or_on_what_else_is_scored(model):
    ids, lengths = random_ids(3, 15), [15, 8, 11]
    mask = ragged_mask(lengths, 15, "right")
    order = ORDERS["random"](mask, generators(3))
    together, greedy = model.log_likelihood_and_greedy(ids, order.group_ids, mask)
    for padding in (-1, 3, 10**6):  # groups of padding are nobody's
        groups = order.group_ids.masked_fill(~mask, padding)
        wanted = order.scored_mask & (torch.arange(15) > torch.tensor([[2], [6], [4]]))
        few = model.log_likelihood(ids, groups, mask, scored_mask=wanted)
        assert (few - together * wanted).abs().max() < 1e-4
    expected = token_by_token(llama_twin(model), ids, order.group_ids, mask)
    for row, length in enumerate(lengths):
        alone = model.log_likelihood(ids[row : row + 1, :length], order.group_ids[row : row + 1, :length])
        assert (alone[0] - together[row, :length]).abs().max() < 1e-4
    slow = expected.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert ((slow - together) * order.scored_mask).abs().max() < 1e-4 and (together[~order.scored_mask] == 0).all()
    assert torch.equal(greedy, (expected.argmax(-1) == ids) & order.scored_mask)


def test_gradient_checkpointing_changes_nothing():
    ids, gradients = random_ids(), []
    groups = ORDERS["random"](torch.ones_like(ids), generators(2)).group_ids
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, group_ids=groups, labels=ids.masked_fill(groups == 0, -100)).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# Generation


def problem(side="left", lengths=(17, 11, 14)):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (len(lengths), max(lengths)), generator=generator)
    mask = ragged_mask(lengths, max(lengths), side)
    first = mask & (mask.long().cumsum(1) == 1)
    return ids, (torch.rand(ids.shape, generator=generator) < 0.5) & mask & ~first, mask


def slow_fill(llama, ids, blank, path, *, new_from, seed=None, eos=-1):
    """One row, written column by column along `path`, everything from scratch for each: the tokens and their
    log-probabilities. Nothing is written behind an EOS, and no EOS where something stands behind it.
    """
    tokens, log_probs, end = ids.clone(), torch.zeros(len(ids), dtype=llama.dtype), len(ids)
    encoded = (~blank).nonzero().flatten().tolist()
    for step, column in enumerate(path):
        if column > end:
            continue
        with torch.no_grad():
            logits = slow_logits(llama, tokens[encoded].tolist(), encoded, [*encoded[1:], column])[-1]
        scores = logits.clone()
        if 0 <= eos and column < max(new_from, *encoded):
            scores[eos] = -torch.inf  # a text does not end before other text
        uniform = None
        if seed is not None:
            place = torch.tensor([[int(blank[: column + 1].sum())]])
            uniform = uniform_noise(torch.tensor([seed_of(seed)]), place, step, SAMPLE)[0, 0]
        tokens[column] = choose_tokens(scores, uniform)
        log_probs[column] = logits.log_softmax(-1)[tokens[column]]
        encoded.append(column)
        if tokens[column] == eos and column >= new_from:
            end = min(end, column)
    return tokens, log_probs.masked_fill(torch.arange(len(ids)) > end, 0.0), end


WAYS = {
    "left_to_right": {},
    "right_to_left": {"order": "right_to_left"},
    "random": {"order": "random"},
    "spans": {"order": "spans", "span_length": 3},
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_generation_is_a_slow_loop(model, name, do_sample):
    ids, blanks, mask = problem()
    settings = {**WAYS[name], "seed": [11, 12, 13], "do_sample": do_sample}
    output = model.generate_any_order(ids, blanks, attention_mask=mask, **settings)
    llama, written = llama_twin(model), 0
    for row in range(3):
        real = mask[row]
        blank, steps = blanks[row, real], output.commit_step[row, real]
        path = sorted(blank.nonzero().flatten().tolist(), key=lambda column: int(steps[column]))
        seed = settings["seed"][row] if do_sample else None
        tokens, log_probs, _ = slow_fill(llama, ids[row, real], blank, path, new_from=len(blank), seed=seed)
        assert output.sequences[row, real].tolist() == tokens.tolist()
        assert (output.log_probs[row, real] - log_probs).abs().max() < 1e-4
        written += len(path)
    assert torch.equal(output.sequences[~blanks], ids[~blanks]) and (output.commit_step[~blanks] == -1).all()
    assert output.num_forward_passes == int(blanks.sum(1).max())
    assert output.tokens_per_forward == pytest.approx(written / 3 / output.num_forward_passes)
    scored = model.log_likelihood(output.sequences, output.group_ids, mask)
    assert (scored - output.log_probs)[blanks].abs().max() < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_neither_batch_nor_padding_nor_cache_changes_a_row(model, name, do_sample, side):
    ids, blanks, mask = problem(side)
    settings = {**WAYS[name], "do_sample": do_sample, "max_new_tokens": 3}
    seeds = [11, 12, 13]
    together = model.generate_any_order(ids, blanks, attention_mask=mask, seed=seeds, **settings)
    for other in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        again = model.generate_any_order(ids, blanks, attention_mask=mask, seed=seeds, **settings, **other)
        assert torch.equal(again.sequences, together.sequences)
        assert (again.log_probs - together.log_probs).abs().max() < 1e-4
    for row in range(3):
        real = mask[row]
        in_all = torch.cat([real, torch.ones(3, dtype=torch.bool)])
        alone = model.generate_any_order(
            ids[row : row + 1, real], blanks[row : row + 1, real], seed=seeds[row : row + 1], **settings
        )
        assert torch.equal(alone.sequences[0], together.sequences[row, in_all])
        assert (alone.log_probs[0] - together.log_probs[row, in_all]).abs().max() < 1e-4


def test_an_even_batch_with_padding_is_the_same_without(model):
    ids = random_ids(2, 8)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    alone = model.generate_any_order(ids, max_new_tokens=5)
    output = model.generate_any_order(padded, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(output.sequences[:, 3:], alone.sequences)
    assert (output.log_probs[:, 3:] - alone.log_probs).abs().max() < 1e-4
    static = {"cache_implementation": "static", "disable_compile": True}
    for other in (static, {"use_cache": False}):  # without a mask
        again = model.generate_any_order(ids, max_new_tokens=5, order="right_to_left", **other)
        plain = model.generate_any_order(ids, max_new_tokens=5, order="right_to_left")
        assert torch.equal(again.sequences, plain.sequences) and (again.log_probs - plain.log_probs).abs().max() < 1e-4


@pytest.mark.parametrize("use_cache", [True, False])
def test_eos_ends_the_continuation_in_any_order(use_cache):
    """Rows that ask for nothing for some steps keep their last token back: its query is for the slot that comes next."""
    model, (ids, blanks, mask) = tiny(), problem(lengths=(11, 6, 9))
    blanks[0] = False  # this row's given tokens wait as well, where the order begins elsewhere
    blank = torch.nn.functional.pad(blanks, (0, 6), value=True)
    real = torch.nn.functional.pad(mask, (0, 6), value=True)
    order = GroupOrder.infilling(blank, attention_mask=real, order="random", generator=generators(3, seed=1)).group_ids
    settings = {"attention_mask": mask, "order": order, "use_cache": use_cache, "pad_token_id": 0}
    free = model.generate_any_order(ids, blanks, 6, **settings)
    waited = 0
    for eos in set(free.sequences[:, 11:].flatten().tolist()):
        output = model.generate_any_order(ids, blanks, 6, eos_token_id=eos, **settings)
        for row in range(3):
            columns = real[row].nonzero().flatten()
            path = order[row, columns].argsort()[int((~blank[row, columns]).sum()) :].tolist()
            text = torch.nn.functional.pad(ids[row], (0, 6))[columns]
            new_from = len(columns) - 6
            tokens, log_probs, end = slow_fill(
                llama_twin(model), text, blank[row, columns], path, new_from=new_from, eos=eos
            )
            tokens[end + 1 :] = 0
            assert output.sequences[row, columns].tolist() == tokens.tolist()
            assert (output.log_probs[row, columns] - log_probs).abs().max() < 1e-4
            skipped = [column > end for column in path]
            waited += any(one and not other for one, other in itertools.pairwise(skipped))
    assert waited > 0, "no row waited: the test tests nothing"


def test_a_prompts_cache_serves_whatever_comes_after_it(model):
    prompt, mask = random_ids(3, 9), ragged_mask([9, 5, 7], 9, "left")
    first = model.generate_any_order(prompt, attention_mask=mask, max_new_tokens=4)
    assert first.past_key_values.get_seq_length() == 9
    again = model.generate_any_order(
        prompt, attention_mask=mask, max_new_tokens=4, order="right_to_left", past_key_values=first.past_key_values
    )
    fresh = model.generate_any_order(prompt, attention_mask=mask, max_new_tokens=4, order="right_to_left")
    assert torch.equal(again.sequences, fresh.sequences) and (again.log_probs - fresh.log_probs).abs().max() < 1e-4

    ids = random_ids(1, 14)
    blanks = (torch.arange(14) >= 6) & (torch.arange(14) < 10)  # what follows the prompt stands further on
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    given = model.generate_any_order(ids, blanks[None], past_key_values=cache)
    plain = model.generate_any_order(ids, blanks[None])
    assert torch.equal(given.sequences, plain.sequences) and (given.log_probs - plain.log_probs).abs().max() < 1e-4
    assert cache.get_seq_length() == 6
    other = ids.clone()
    other[0, 2] += 1
    with pytest.raises(ValueError, match="past_key_values does not match input_ids"):
        model.generate_any_order(other, blanks[None], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds 6 tokens: expected at most 5"):
        model.generate_any_order(ids, blanks[None].roll(-1, 1), past_key_values=cache)


def test_left_to_right_continuation_is_greedy_generate(model):
    ids = random_ids(2, 6)
    plain = llama_twin(model).generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate_any_order(ids, max_new_tokens=9).sequences, plain)


def test_infilling_rewriting_and_scoring(tokenizer):
    model = tiny(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    text = "The dog ran home. Tom was happy."
    filled = model.infill(
        tokenizer, ["The dog <blank:3> home.", "Tom <blank:2>, <blank:auto> dog."], order="random", seed=1
    )
    assert filled[0].startswith("The dog ") and filled[0].endswith(" home.") and filled[1].endswith(" dog.")
    output = model.infill(tokenizer, "Tom <blank:1..3> home.", return_outputs=True)
    assert set(output.length_scores[0][0]) == {1, 2, 3}
    rewritten = model.rewrite(tokenizer, text, [(8, 11)])
    assert rewritten.startswith("The dog ") and rewritten.endswith(" home. Tom was happy.")
    scored = model.score(tokenizer, text, order="random", num_orders=3)
    expected = model.log_likelihood(scored.token_ids.expand(3, -1), scored.group_ids)
    assert torch.allclose(scored.totals, expected.sum(1), atol=1e-4) and scored.spread.max() > 0
    with pytest.raises(ValueError, match="not defined for groups larger than one"):
        model.score(tokenizer, text, group_size=2)


# Checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_go_round_and_come_from_llama(tmp_path, tied):
    model, ids = tiny(tie_word_embeddings=tied, dtype=torch.float32), random_ids()
    llama_twin(model).save_pretrained(tmp_path / "llama")
    model.save_pretrained(tmp_path / "own")
    for folder in ("llama", "own"):
        again, info = DecoupledRopeLlamaForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and again.config.model_type == "decoupled_rope_llama"
        assert torch.equal(again(ids).logits, model(ids).logits)
        body = DecoupledRopeLlamaModel.from_pretrained(tmp_path / folder)
        assert torch.equal(body.norm.weight, model.model.norm.weight)
    groups = ORDERS["random"](torch.ones_like(ids), generators(2)).group_ids
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "own"), load_model(str(tmp_path / "own"))):
        assert type(again) is DecoupledRopeLlamaForCausalLM
        assert torch.equal(again(ids, group_ids=groups).logits, model(ids, group_ids=groups).logits)
    assert type(load_model(str(tmp_path / "llama"))) is A3LlamaForCausalLM
    chosen = load_model(str(tmp_path / "llama"), architecture="decoupled_rope")
    assert type(chosen) is DecoupledRopeLlamaForCausalLM
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "own")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="'decoupled_rope_llama': A3 expects"):
        load_model(str(tmp_path / "own"), architecture="a3")


def test_a_checkpoint_carries_no_code(tmp_path):
    """Remote code is one flat folder, and this model's imports A3's: the package has to be installed."""
    tiny().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_checkpoints_of_other_models_and_incomplete_ones_raise(tmp_path):
    A3LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "a3")
    with pytest.raises(
        ValueError, match="'a3_llama': Decoupled RoPE expects 'llama' or 'decoupled_rope_llama'. To use an A3"
    ):
        DecoupledRopeLlamaForCausalLM.from_pretrained(tmp_path / "a3")
    LlamaForCausalLM.from_pretrained(tmp_path / "a3").save_pretrained(tmp_path / "inside")
    DecoupledRopeLlamaForCausalLM.from_pretrained(tmp_path / "inside")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2': Decoupled RoPE expects"):
        DecoupledRopeLlamaForCausalLM.from_pretrained(tmp_path / "gpt2")
    state = {key: weight.clone() for key, weight in tiny().state_dict().items()}
    lacking = {key: weight for key, weight in state.items() if "layers.1.mlp.up_proj" not in key}
    for number, (weights, message) in enumerate(
        [
            (lacking, "missing keys.*layers.1.mlp.up_proj"),
            ({**state, "model.extra.weight": torch.ones(2)}, "unexpected"),
        ]
    ):
        tiny().save_pretrained(tmp_path / str(number), state_dict=weights)
        with pytest.raises(ValueError, match=message):
            DecoupledRopeLlamaForCausalLM.from_pretrained(tmp_path / str(number))


# Training

STAGES = [{"name": "ar", "until": 1}, {"name": "permute", "until": 2}, {"name": "permute", "shapes": {"infilling": 1}}]
MIXED = [
    {"name": "ar", "until": 1},
    {
        "name": "permute",
        "shapes": {"scattered": 1, "spans": 1, "infilling": 1},
        "span_length": 2,
        "predict_last": 0.5,
        "rehearsal": 0.3,
    },
]


def test_training_equals_a_plain_loop(tmp_path):
    train = rows([9, 4, 7, 2, 8, 3, 9, 5])
    settings = {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0}
    stages = STAGES[:2]
    trainer = make_trainer(
        tmp_path, train, model=tiny(), stages=[stages[0], {"name": "permute"}], max_steps=2,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    llama = llama_twin(tiny())
    optimizer = torch.optim.SGD(llama.parameters(), lr=1e-2)
    for step, kind in enumerate(("contiguous", "scattered")):
        total, tokens = torch.zeros(()), 0
        for index, row in enumerate(train[4 * step : 4 * step + 4]):
            groups = torch.tensor([naive_groups(row, kind, 1, row_generator(42, step, index))])
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = token_by_token(llama, ids, groups, torch.ones_like(ids).bool())
            total = total + torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
            tokens += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        assert losses[step] == pytest.approx(total.item() / tokens, abs=2e-5), f"step {step}"
    trained = trainer.model.state_dict()
    for name, weight in llama.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_what_the_trainer_hands_over_is_the_likelihood(model):
    ids, mask = random_ids(3, 12), ragged_mask([12, 7, 10], 12, "right")
    for order in (
        ORDERS["random"](mask, generators(3)),
        ORDERS["random"](mask, generators(3)).scoring_last(Fraction(1, 3)),
        ORDERS["infilling"](mask, generators(3)),
    ):
        arguments = model_inputs(order, ids, group_size=1, implementation="sdpa", one_stream=True)
        expected = model.log_likelihood(ids, order.group_ids, mask)[order.scored_mask]
        with torch.no_grad():
            assert model(**arguments).loss.item() == pytest.approx(-expected.mean().item(), abs=1e-4)
            chunked = model(**arguments, chunked_loss=True, num_items_in_batch=2)
        assert chunked.loss.item() == pytest.approx(-expected.sum().item() / 2, rel=1e-4)
        assert chunked.token_losses.shape == arguments["labels"].shape and chunked.logits is None
        assert chunked.token_losses.sum().item() == pytest.approx(-expected.sum().item(), rel=1e-4)


def test_rehearsal_shapes_and_partial_prediction_train_with_both_losses(tmp_path):
    logged = []
    for loss in ("plain", "chunked"):
        trainer = make_trainer(tmp_path, rows([9] * 16), rows([6, 9]), model=tiny(), stages=MIXED, loss=loss)
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        logged[-1] += [trainer.evaluate()[f"eval_loss{name}"] for name in ("", "_left_to_right", "_scattered_1")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4) and len(logged[0]) == 7


def test_evaluation_is_of_the_orders_of_single_tokens_as_a3s(tmp_path):
    evaluation = rows([9, 4, 7], seed=3)
    trainer = make_trainer(tmp_path, evaluation=evaluation, model=tiny())
    metrics = trainer.evaluate()
    assert {name for name in metrics if "loss" in name} == {
        "eval_loss",
        "eval_loss_left_to_right",
        "eval_loss_scattered_1",
    }
    tokens = sum(label != -100 for row in evaluation for label in row["labels"])
    for name, kind in (("left_to_right", "contiguous"), ("scattered_1", "scattered")):
        index, total = list(EVALUATION_ORDERS).index(name), 0.0
        for number, row in enumerate(evaluation):
            groups = torch.tensor([naive_groups(row, kind, 1, row_generator(EVALUATION_SEED, index, number))])
            scored = trainer.model.log_likelihood(torch.tensor([row["input_ids"]]), groups)[0]
            total -= scored[torch.tensor(row["labels"]) != -100].sum().item()
        assert metrics[f"eval_loss_{name}"] == pytest.approx(total / tokens, abs=1e-4)
    two = metrics["eval_loss_left_to_right"] + metrics["eval_loss_scattered_1"]
    assert metrics["eval_loss"] == pytest.approx(two / 2, abs=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"stages": [{"name": "expand", "group_size": [1, 2]}]},
            r"stage 1 \('expand'\): group_size=\(1, 2\).*not defined",
        ),
        ({"stages": [{"name": "permute", "group_size": {"draw": [1, 3]}}]}, "Decoupled RoPE is not defined for groups"),
        ({"stages": [{"name": "ar"}], "content_loss_weight": 0.1}, "content_loss_weight=0.1.*two streams"),
        ({"stages": [{"name": "ar"}], "distillation_weight": 0.1}, "distillation_weight=0.1.*two streams"),
    ],
)
def test_what_needs_groups_or_two_streams_is_refused_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows([6] * 4), model=tiny(), **settings)


def recipe(source, output_dir, stages=({"name": "ar", "until": 3}, {"name": "permute"}), **changes) -> Recipe:
    model, data = changes.pop("model", {}), changes.pop("data", {})
    training, lora = changes.pop("training", {}), changes.pop("lora", None)
    return Recipe(
        model=ModelArguments(**{"model_name_or_path": str(source), "architecture": "decoupled_rope", **model}),
        data=DataArguments(
            train_file=str(source / "train.txt"),
            validation_file=str(source / "validation.txt"),
            block_size=8,
            cache_dir=str(source / "cache"),
            **data,
        ),
        training=A3TrainingArguments(
            str(output_dir),
            max_steps=9,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-2,
            logging_steps=1,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=1000,
            use_cpu=True,
            disable_tqdm=True,
            seed=11,
            **training,
        ),
        curriculum=Curriculum.from_config(list(stages), unit="steps"),
        lora=lora,
    )


class Crash(Exception):
    pass


class Crashing(InterruptCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Crash


def test_a_recipe_trains_it_and_a_resume_ends_in_the_same_weights(source, tmp_path, monkeypatch, capsys):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train_module.run(recipe(source, unbroken)) == 0
    assert "scattered_1" in capsys.readouterr().out
    model = load_model(str(unbroken))
    assert type(model) is DecoupledRopeLlamaForCausalLM
    history = json.loads((unbroken / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 3, 9]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.1
    # the losses before are those of the LLaMA it was
    start = load_model(str(source), architecture="decoupled_rope")
    assert start.config.model_type == "decoupled_rope_llama"

    monkeypatch.setattr(train_module, "InterruptCallback", Crashing)
    with pytest.raises(Crash):
        train_module.run(recipe(source, broken))
    monkeypatch.undo()
    torch.manual_seed(99)
    assert train_module.run(recipe(source, broken)) == 0
    weights, expected = (load_file(folder / "model.safetensors") for folder in (broken, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_recipe_chooses_the_architecture(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\ntrain_file: t.txt\noutput_dir: o\ncurriculum: {stages: [{name: ar}]}\n")
    assert parse_recipe(path).model.architecture == "a3"
    assert parse_recipe(path, ["--architecture", "decoupled_rope"]).model.architecture == "decoupled_rope"
    with pytest.raises(ValueError, match="architecture"):
        parse_recipe(path, ["--architecture", "three_streams"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": [{"name": "permute", "group_size": 2}]}, "not defined for groups larger than one"),
        ({"data": {"documents": "isolated"}}, "documents='isolated'"),
        ({"lora": LoraArguments(r=2)}, "lora: expected architecture 'a3'"),
        ({"training": {"content_loss_weight": 0.5}}, "content_loss_weight=0.5"),
    ],
)
def test_what_a_recipe_can_not_have_is_said_before_the_model_is_loaded(source, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train_module, "load_to_train", None)
    with pytest.raises(ValueError, match=message):
        train_module.run(recipe(source, tmp_path, **changes))


def test_a_dry_run_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="architecture='decoupled_rope': expected 'a3', the only one with formulas"):
        dry_run(recipe(source, tmp_path), accelerate_configs=tmp_path, tflops=1.0)


# Bad input

IDS = random_ids(2, 6)
GROUPS = torch.arange(6).expand(2, -1)
PAIRS = GROUPS // 2
RIGHT = ragged_mask([6, 4], 6, "right").long()
ALIGNED = {"position_ids": GROUPS, "target_position_ids": GROUPS + 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"group_ids": PAIRS},
            "several tokens in group 0 of row 0: expected one. Decoupled RoPE is not defined for groups larger than one",
        ),
        (
            {
                "group_ids": GROUPS,
                "target_position_ids": GROUPS[:, 2:4],
                "target_group_ids": GROUPS[:, 2:3].expand(2, 2),
            },
            "holds 3 at row 0, slot 1: expected 2, which the token before it predicts. Decoupled RoPE is not defined "
            "for groups",
        ),
        (
            {"group_ids": GROUPS, "target_position_ids": GROUPS[:, :2] + 6, "target_group_ids": GROUPS[:, :2] * 0 + 9},
            "expected 7, which the token before it predicts. Decoupled RoPE is not defined",
        ),
        ({"group_ids": GROUPS[:, :5]}, "group_ids has shape"),
        ({"group_ids": GROUPS.float()}, "group_ids has dtype torch.float32: expected integers"),
        ({"group_ids": GROUPS, "position_ids": GROUPS[:, :3]}, "position_ids has shape"),
        ({"group_ids": GROUPS, "attention_mask": torch.ones(2, 5)}, "attention_mask has shape"),
        ({"group_ids": GROUPS, "target_position_ids": GROUPS}, "target_group_ids None"),
        ({"target_group_ids": GROUPS}, "target_group_ids needs group_ids"),
        ({"target_position_ids": GROUPS}, "target_position_ids needs position_ids"),
        ({"position_ids": GROUPS, "target_position_ids": GROUPS[:, :4]}, "target_position_ids has shape"),
        ({"group_ids": GROUPS, "logits_to_keep": 1}, "logits_to_keep does not work with group_ids"),
        ({"group_ids": GROUPS, "labels": IDS[:, :4]}, "labels has shape"),
        ({**ALIGNED, "labels": IDS[:, :4]}, "labels has shape"),
        ({"group_ids": GROUPS, "labels": IDS}, "row 0, slot 0, which sees no token"),
        ({"group_ids": 5 - GROUPS, "labels": IDS, "attention_mask": RIGHT}, "labels holds a token at padding"),
        ({"group_ids": GROUPS, "past_key_values": DynamicCache()}, "don't work with group_ids"),
        ({"group_ids": GROUPS, "use_cache": True}, "don't work with group_ids"),
        (
            {"group_ids": GROUPS, "document_ids": GROUPS},
            "document_ids: expected None, as Decoupled RoPE can't separate documents",
        ),
        (
            {**ALIGNED, "target_document_ids": GROUPS},
            "document_ids: expected None, as Decoupled RoPE can't separate documents",
        ),
        (
            {**ALIGNED, "content_logits_at": (GROUPS[0], GROUPS[0])},
            "content_logits_at: expected None, as there is one stream",
        ),
        ({"content_hidden_state": True}, "content_hidden_state=True: expected False, as there is one stream"),
        ({**ALIGNED, "attention_mask": singleton_attention_mask("sdpa", 6, IDS.device)}, "masks for two streams"),
        ({"chunked_loss": True, "labels": IDS}, "chunked_loss=True: expected labels, and"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_bad_input_names_the_argument(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(IDS, **arguments)


def test_a_likelihood_of_groups_is_not_defined(model):
    with pytest.raises(ValueError, match="not defined for groups larger than one"):
        model.log_likelihood(IDS, PAIRS)
    with pytest.raises(ValueError, match="group_ids has shape"):
        model.log_likelihood(IDS, PAIRS[:, :3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strategy": "dynamic"}, "strategy='dynamic': expected 'groupwise'. Decoupled RoPE is not defined"),
        ({"strategy": "speculative"}, "strategy='speculative': expected 'groupwise'"),
        ({"strategy": "refine"}, "strategy='refine': expected 'groupwise'"),
        ({"group_size": 2}, "group_size=2: expected 1. Decoupled RoPE is not defined for groups larger than one"),
        ({"order": torch.arange(10).expand(2, -1) // 2}, "order has 2 tokens in a group"),
        ({"max_time": 1.0}, "max_time=1.0"),
    ],
)
def test_generation_of_several_tokens_at_once_is_not_defined(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate_any_order(IDS, max_new_tokens=4, **arguments)
