"""Slots that start as the token on their left: LLaMA from left to right, no leak, sums to 1, cached as uncached, trained."""

import itertools
import json
import math
import shutil
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from a3_hf import A3LlamaConfig, A3LlamaForCausalLM, GroupOrder
from a3_hf.adapters.checkpoints import attach_adapter, load_model
from a3_hf.models.a3_llama.attention_masks import MaskCache, group_attention_mask, groups_of
from a3_hf.models.a3_llama.orders import ContentTokens, QuerySlots, left_tokens
from a3_hf.training import run as train
from a3_hf.training.base_trainer import row_generator
from a3_hf.training.model_inputs import model_inputs
from a3_hf.training.order_sampling import RowSpec, draw_rows
from a3_hf.training.recipes import parse_recipe
from tests.conftest import tiny_config, tiny_model


def left_model(seed: int = 3, **changes) -> A3LlamaForCausalLM:
    return tiny_model(seed, slot_start="left_token", **changes)


def ids_of(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def generator(*seeds):
    return [row_generator(*seeds, row) for row in range(2)]


def by_hand(input_ids, position_ids, group_ids, targets, target_groups, real, documents=None, target_documents=None):
    left = torch.full(targets.shape, -1)
    for row, slot in itertools.product(range(targets.shape[0]), range(targets.shape[1])):
        for column in range(input_ids.shape[1]):
            is_left = real[row, column] and position_ids[row, column] == targets[row, slot] - 1
            same = documents is None or documents[row, column] == target_documents[row, slot]
            if is_left and same and group_ids[row, column] < target_groups[row, slot]:
                left[row, slot] = input_ids[row, column]
    return left


@pytest.mark.parametrize("with_documents", [False, True])
def test_the_token_on_the_left_is_found_in_any_layout(with_documents):
    source = torch.Generator().manual_seed(1)
    ids = ids_of(2, 9)
    places = torch.stack([torch.randperm(9, generator=source) for _ in range(2)])
    groups = torch.randint(0, 4, (2, 9), generator=source)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    places[1] += 1
    places[1, 6:] = 0  # what padding has for a position is nobody's left
    groups[1, 6:] = 0
    targets = torch.randint(0, 9, (2, 12), generator=source)
    target_groups = torch.randint(0, 5, (2, 12), generator=source)
    targets[1, 0], target_groups[1, 0] = 1, 4
    documents = torch.randint(1, 3, (2, 9), generator=source) if with_documents else None
    target_documents = torch.randint(1, 3, (2, 12), generator=source) if with_documents else None
    expected = by_hand(ids, places, groups, targets, target_groups, real, documents, target_documents)
    content, slots = ContentTokens(ids, places, groups, documents), QuerySlots(targets, target_groups, target_documents)
    found = left_tokens(content, slots, key_mask=real)
    assert torch.equal(found, expected)
    assert (found >= 0).any() and (found < 0).any()


def test_from_left_to_right_it_is_llama_before_any_training(stories, tmp_path):
    double = {"dtype": torch.float64}
    llama = LlamaForCausalLM.from_pretrained(stories, **double).eval()
    model = A3LlamaForCausalLM.from_pretrained(stories, slot_start="left_token", **double).eval()
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llama(ids).logits
        assert (model(ids).logits - expected).abs().max() < 1e-5
        order = GroupOrder.left_to_right(torch.ones_like(ids))
        log_probs = model.log_likelihood(ids, order.group_ids)
    of_llama = expected.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    assert (log_probs[:, 1:] - of_llama).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    again = A3LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.slot_start == "left_token"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_causal_contract_is_that_of_groups_and_of_a_cache():
    model, ids = left_model(), ids_of(2, 8)
    with torch.no_grad():
        whole = model(ids).logits
        groups = torch.arange(8).expand(2, -1)
        assert (whole[:, :-1] - model(ids, group_ids=groups).logits[:, 1:]).abs().max() < 1e-5
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    assert (rest - whole[:, 5:]).abs().max() < 1e-5
    assert not torch.allclose(whole, tiny_model(3)(ids).logits, atol=1e-3)


def test_a_token_reaches_slots_of_later_groups_only():
    model, ids = left_model(), ids_of(1, 8)
    groups = torch.tensor([[0, 3, 1, 2, 2, 3, 1, 4]])
    with torch.no_grad():
        before = model(ids, group_ids=groups).logits
        for changed in range(8):
            other = ids.clone()
            other[0, changed] = (ids[0, changed] - 3 + 7) % 58 + 3
            difference = (model(other, group_ids=groups).logits - before).abs().amax(dim=-1)[0]
            later = groups[0] > groups[0, changed]
            assert (difference[later] > 1e-6).all()
            assert (difference[~later] == 0).all()


def test_the_chain_rule_sums_to_one():
    model = left_model(vocab_size=5, bos_token_id=1, eos_token_id=2)
    texts = torch.tensor([[1, *text] for text in itertools.product(range(5), repeat=4)])
    for groups in ([0, 1, 2, 3, 4], [0, 4, 2, 3, 1], [0, 2, 2, 1, 1], [0, 1, 1, 1, 1]):
        log_probs = model.log_likelihood(texts, torch.tensor(groups).expand(len(texts), -1)).sum(dim=1)
        assert math.isclose(float(log_probs.double().exp().sum()), 1.0, abs_tol=1e-4), groups


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "groupwise", "group_size": 2},
        {"strategy": "groupwise", "order": "random", "group_size": 3},
        {"strategy": "groupwise", "group_size": 2, "cache_implementation": "static"},
        {"strategy": "dynamic", "tokens_per_step": 2},
        {"strategy": "dynamic", "tokens_per_step": 2, "window": 3},
        {"strategy": "speculative", "draft_tokens": 3},
        {"strategy": "speculative", "draft_tokens": 3, "order": "random", "do_sample": True},
        {"strategy": "speculative", "draft_tokens": 3, "draft": "ngram", "do_sample": True},
        {"strategy": "refine"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_decoding_cached_is_decoding_uncached_and_its_log_probs_are_the_likelihood(settings):
    model, ids = left_model(), ids_of(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left
    mask[1, 10:] = 0  # and on the right
    blank = torch.zeros_like(ids, dtype=torch.bool)
    blank[:, 4:8] = True
    blank[2, 9:] = True
    output = model.generate_any_order(ids, blank, attention_mask=mask, seed=5, **settings)
    # Without a cache the other strategies encode what is known as one group, which is another factorisation.
    if settings["strategy"] in ("groupwise", "speculative") and "cache_implementation" not in settings:
        uncached = model.generate_any_order(ids, blank, attention_mask=mask, seed=5, use_cache=False, **settings)
        assert torch.equal(output.sequences, uncached.sequences)
        assert (output.log_probs - uncached.log_probs).abs().max() < 1e-4
    log_probs = model.log_likelihood(output.sequences, output.group_ids, mask)
    assert (log_probs[blank] - output.log_probs[blank]).abs().max() < 1e-4
    plain = tiny_model(3).generate_any_order(ids, blank, attention_mask=mask, seed=5, **settings)
    assert not torch.allclose(plain.log_probs, output.log_probs, atol=1e-3)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_draft_is_checked_without_sight_of_the_drafts_behind_it(do_sample):
    model, ids = left_model(), ids_of(3, 14)
    blank = torch.zeros_like(ids, dtype=torch.bool)
    blank[:, 3:12] = True
    for seed in range(3):
        settings = {"strategy": "speculative", "draft_tokens": 4, "order": "random", "do_sample": do_sample}
        output = model.generate_any_order(ids, blank, seed=seed, **settings)
        log_probs = model.log_likelihood(output.sequences, output.group_ids)
        assert (log_probs[blank] - output.log_probs[blank]).abs().max() < 1e-4


def test_the_cache_of_a_prompt_can_be_gone_on_with():
    model, ids = left_model(), ids_of(2, 7)
    settings = {"max_new_tokens": 5, "strategy": "groupwise", "group_size": 2, "seed": 1}
    first = model.generate_any_order(ids, **settings)
    again = model.generate_any_order(ids, past_key_values=first.past_key_values, **settings)
    assert torch.equal(first.sequences, again.sequences)
    assert (first.log_probs - again.log_probs).abs().max() < 1e-5


def kinds_of_orders(mask):
    yield GroupOrder.left_to_right(mask), 1
    yield GroupOrder.scattered(mask, group_size=1, generator=generator(1)), 1
    yield GroupOrder.scattered(mask, group_size=3, generator=generator(2)), 3
    infilling = [RowSpec(weight=1.0, group_sizes=range(2, 3), shapes=(("infilling", 1.0),))]
    yield draw_rows(infilling, mask, generator=generator(4)), 2
    partial = [RowSpec(1.0, range(2, 3), (("scattered", 1.0),), predict_last=Fraction(1, 2))]
    yield draw_rows(partial, mask, generator=generator(5)), 2


@pytest.mark.parametrize("ragged", [False, True])
def test_training_scores_what_the_likelihood_says(ragged):
    model, ids = left_model(), ids_of(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = not ragged
    for order, group_size in kinds_of_orders(mask):
        kept = MaskCache()
        arguments = model_inputs(
            order, ids, group_size=group_size, implementation="sdpa", kept=kept, slot_start="left_token"
        )
        loss = model(**arguments).loss
        scored = order.scored_mask
        expected = -model.log_likelihood(ids, order.group_ids, mask, scored_mask=scored)[scored].mean()
        assert torch.allclose(loss, expected, atol=1e-5)
        loss.backward()
    assert model.model.query_embed.weight.grad.abs().max() > 0


def test_documents_of_a_row_are_kept_apart():
    model, ids = left_model(), ids_of(1, 8)
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    given = torch.tensor([[True, False, False, False, True, False, False, False]])
    order = GroupOrder.scattered(torch.ones_like(ids), group_size=2, given_mask=given, generator=generator(5)[:1])
    arguments = model_inputs(
        order, ids, group_size=2, implementation="sdpa", document_ids=documents, slot_start="left_token"
    )
    arguments.pop("labels")
    with torch.no_grad():
        before = model(**arguments).logits
        layout = order.lay_out(ids, document_ids=documents)
        changed = ids.clone()
        changed[0, 3] = (ids[0, 3] - 3 + 5) % 58 + 3  # the last token of the first document
        other = model_inputs(
            order, changed, group_size=2, implementation="sdpa", document_ids=documents, slot_start="left_token"
        )
        other.pop("labels")
        difference = (model(**other).logits - before).abs().amax(dim=-1)
    assert (difference[layout.document_ids == 2] == 0).all()
    assert (difference[layout.document_ids == 1] > 0).any()


def test_what_cannot_be_found_is_asked_for():
    model, ids = left_model(), ids_of(1, 6)
    groups = torch.arange(6)[None]
    views = group_attention_mask("sdpa", *groups_of(groups, groups))
    with pytest.raises(ValueError, match="with prepared masks needs target_input_ids"):
        model(ids, attention_mask=views, target_position_ids=groups)
    with pytest.raises(ValueError, match="with inputs_embeds needs target_input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids), group_ids=groups)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="with a cache needs target_input_ids"):
        model(ids, group_ids=groups, past_key_values=cache)
    with pytest.raises(ValueError, match=r"target_input_ids has shape \(1, 5\)"):
        model(
            ids, group_ids=groups, target_position_ids=groups, target_group_ids=groups, target_input_ids=groups[:, 1:]
        )
    with pytest.raises(ValueError, match=r"target_input_ids has shape \(2, 6\)"):
        twice = groups.expand(2, -1)
        model(ids, group_ids=groups, target_position_ids=groups, target_group_ids=groups, target_input_ids=twice)
    with pytest.raises(ValueError, match="target_input_ids has no effect with slot_start='query_embed'"):
        tiny_model()(
            ids, group_ids=groups, target_position_ids=groups, target_group_ids=groups, target_input_ids=groups
        )
    with pytest.raises(ValueError, match="slot_start='right_token': expected 'query_embed' or 'left_token'"):
        A3LlamaConfig(slot_start="right_token")
    assert tiny_config().slot_start == "query_embed"


@pytest.mark.parametrize("rows", ["slots", "all"])
def test_an_adapter_of_a_plain_llama_holds_it(source, tmp_path, rows):
    out, path = tmp_path / "out", tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {source}\ntrain_file: {source / 'train.txt'}\nblock_size: 8\nmax_steps: 2\nuse_cpu: true\n"
        f"output_dir: {out}\nlora: {{r: 2, rows: {rows}}}\nslot_start: left_token\ncurriculum: {{stages: [{{name: ar}}]}}\n"
    )
    assert train.run(parse_recipe(path)) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["slot_start"] == "left_token" == load_model(str(out)).config.slot_start
    with pytest.raises(ValueError, match="slot_start='query_embed': the adapter .* was trained with 'left_token'"):
        load_model(str(out), slot_start="query_embed")
    base = A3LlamaForCausalLM.from_pretrained(source, slot_start="query_embed")
    with pytest.raises(ValueError, match="trained with slot_start='left_token', but the model has 'query_embed'"):
        attach_adapter(base, str(out))
    with pytest.raises(ValueError, match="slot_start='query_embed': the adapter .* was trained with 'left_token'"):
        train.run(
            parse_recipe(
                path,
                [
                    *("--model_name_or_path", str(out), "--output_dir", str(tmp_path / "again")),
                    *("--slot_start", "query_embed", "--tokenizer_name_or_path", str(source)),
                ],
            )
        )

    del settings["slot_start"]  # as they were saved when a LLaMA's slots started as query_embed
    (out / "adapter_config.json").write_text(json.dumps(settings))
    assert load_model(str(out)).config.slot_start == "query_embed"


def test_a_llamas_slots_start_as_the_token_on_the_left_and_every_config_says_it(source, tmp_path):
    source = shutil.copytree(source, tmp_path / "llama")
    settings = json.loads((source / "config.json").read_text())
    assert settings.pop("slot_start") == "query_embed"  # as the tests' own LLaMA says it
    (source / "config.json").write_text(json.dumps(settings))
    for start in ("left_token", "query_embed"):
        model = A3LlamaForCausalLM.from_pretrained(source, slot_start=start)
        model.save_pretrained(tmp_path / start)
        assert json.loads((tmp_path / start / "config.json").read_text())["slot_start"] == start
        for load in (A3LlamaForCausalLM, AutoModelForCausalLM):
            assert load.from_pretrained(tmp_path / start).config.slot_start == start
    assert A3LlamaForCausalLM.from_pretrained(source).config.slot_start == A3LlamaConfig().slot_start == "left_token"

    before = json.loads((tmp_path / "query_embed" / "config.json").read_text())
    del before["slot_start"]  # an A3 checkpoint from before there was a choice
    (tmp_path / "query_embed" / "config.json").write_text(json.dumps(before))
    for load in (A3LlamaForCausalLM, AutoModelForCausalLM):
        assert load.from_pretrained(tmp_path / "query_embed").config.slot_start == "query_embed"
