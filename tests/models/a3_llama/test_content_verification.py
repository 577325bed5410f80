"""`verify="content"`: drafts of slots, adapted or not, and the text of the plain LLaMA, which the same base without adapters
writes from left to right one token at a time.

fp64, so that rounding is far below the tolerance and any true effect.
"""

import itertools

import pytest
import torch
from peft import PeftModel

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import content_llama
from a3_hf.adapters.layers import attach
from a3_hf.models.a3_draft_head import drafter
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.drafter import attach_draft_head
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from a3_hf.models.a3_llama import generation_trees
from tests.conftest import tiny_model

SHAPE = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.8}
TOLERANCE = 1e-9


def adapted(slot_start: str, **settings) -> tuple[PeftModel, A3LlamaForCausalLM]:
    """A model with an adapter that changes what its slots say, and its base, whose slots are its content rows."""
    base = tiny_model(slot_start="left_token", **{**SHAPE, **settings}).double().eval()
    model = tiny_model(slot_start=slot_start, **{**SHAPE, **settings}).double().eval()
    model.load_state_dict(base.state_dict())
    model = attach(model, LoraArguments(r=4, rows="slots")).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    attach_draft_head(model, DraftHead(DraftHeadConfig.for_base(base.config, rank=2, sampler_size=4)).double())
    return model, base


@pytest.fixture(autouse=True)
def bushy_trees(monkeypatch):
    """And no pass without one, whatever the clock says."""
    monkeypatch.setattr(drafter, "LEAST_PROBABILITY", 0.0)
    monkeypatch.setattr(generation_trees, "PROBED_PASSES", 1000)


def prompts(side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 7, 4 and 6 tokens."""
    ids = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [6]])).long()
    return ids, mask if side == "right" else mask.flip(1)


@pytest.mark.parametrize("slot_start", ["left_token", "query_embed"])
@pytest.mark.parametrize("draft", ["model", "ngram", "head", "ngram+head"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_text_is_the_bases(slot_start, draft, side):
    model, base = adapted(slot_start)
    own, fewer = 0, 0
    for seed, settings in enumerate(
        (
            {},
            {"use_cache": False},
            {"eos_token_id": [3, 4, 5, 6]},
            {"repetition_penalty": 1.7, "suppress_tokens": [1]},
            {"bad_words_ids": [[2, 7], [8]], "num_return_sequences": 1},
            {"eos_token_id": [3], "forced_eos_token_id": 3, "use_cache": False},
        )
    ):
        if "head" in draft and not settings.get("use_cache", True):
            continue
        ids, mask = prompts(side, seed)
        settings = {"max_new_tokens": 12, "eos_token_id": [], "pad_token_id": 0, "attention_mask": mask, **settings}
        wanted = base.generate_any_order(ids, **settings)
        drafted = {"strategy": "speculative", "draft": draft, "draft_tokens": 3, "verify": "content"}
        output = model.generate_any_order(ids, **drafted, **settings)
        assert torch.equal(output.sequences, wanted.sequences) and torch.equal(output.group_ids, wanted.group_ids)
        assert (output.log_probs - wanted.log_probs).abs().max() < TOLERANCE
        own += not torch.equal(model.generate_any_order(ids, **settings).sequences, wanted.sequences)
        fewer += output.num_forward_passes < wanted.num_forward_passes
    assert own > 2 and (fewer > 0 or draft == "model")


@pytest.mark.parametrize("draft", ["ngram", "head", "ngram+head"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sampled_text_is_the_bases_for_the_same_seed(draft, implementation):
    """Its noise belongs to the place in the text, so that only the passes differ."""
    model, base = adapted("left_token", attn_implementation=implementation)
    tolerance = 1e-4 if implementation == "eager" else TOLERANCE  # LLaMA's own attention has a softmax in fp32
    fewer = 0
    for seed, settings in enumerate(
        (
            {},
            {"temperature": 0.5},
            {"top_k": 4, "eos_token_id": [3, 4]},
            {"top_p": 0.8, "repetition_penalty": 1.3},
            {"num_return_sequences": 2, "eos_token_id": [9]},
        )
    ):
        for side in ("left", "right"):
            ids, mask = prompts(side, seed)
            settings = {"do_sample": True, "seed": seed, "max_new_tokens": 9, "attention_mask": mask, **settings}
            settings = {"eos_token_id": [], "pad_token_id": 0, **settings}
            wanted = base.generate_any_order(ids, **settings)
            output = model.generate_any_order(ids, strategy="speculative", draft=draft, verify="content", **settings)
            assert torch.equal(output.sequences, wanted.sequences) and torch.equal(output.group_ids, wanted.group_ids)
            assert (output.log_probs - wanted.log_probs).abs().max() < tolerance
            fewer += output.num_forward_passes < wanted.num_forward_passes
    assert fewer or draft == "ngram"


def test_it_is_what_generate_writes():
    """Of the LLaMA itself, packed and not."""
    model, _ = adapted("left_token", attn_implementation="sdpa")
    llama = content_llama(model)
    ids, mask = prompts("left", 0)
    settings = {"max_new_tokens": 9, "attention_mask": mask, "pad_token_id": 0}
    wanted = llama.generate(ids, do_sample=False, eos_token_id=None, **settings)
    for packs in (False, True):
        if packs:
            model.get_base_model().pack_weights()
        for draft in ("ngram", "head"):
            output = model.generate_any_order(
                ids, strategy="speculative", draft=draft, verify="content", eos_token_id=[], **settings
            )
            assert torch.equal(output.sequences, wanted)


def test_infill_shows_the_text_after_a_blank_in_front(tokenizer):
    model, base = adapted("left_token", vocab_size=len(tokenizer))
    settings = {"suffix_template": "Later:{suffix}\n", "verify": "content", "strategy": "speculative"}
    text = "The dog <blank:5> and was happy."
    filled = model.infill(tokenizer, text, draft="ngram", **settings)
    assert filled == model.infill(tokenizer, text, draft="ngram+head", **settings)
    assert filled == base.infill(tokenizer, text, suffix_template=settings["suffix_template"])
    assert filled != model.infill(tokenizer, text, suffix_template=settings["suffix_template"])
    for shown in ("", None):  # in place; `None`: the model has no template of its own
        with pytest.raises(ValueError, match="no given text after a blank"):
            model.infill(tokenizer, text, **{**settings, "suffix_template": shown})


@pytest.mark.parametrize("draft", ["model", "ngram", "head"])
def test_samples_follow_the_bases_joint(draft):
    """Total variation between 100,000 samples and the enumerated joint of the base."""
    model, base = adapted("left_token", vocab_size=3, initializer_range=0.5)
    ids, new = torch.tensor([[1, 2, 1]]), 5
    texts = torch.cat([ids.expand(3**new, -1), torch.tensor(list(itertools.product(range(3), repeat=new)))], dim=1)
    groups = torch.arange(3 + new)[None].expand(len(texts), -1)
    joint = base.log_likelihood(texts, groups)[:, 3:].sum(1).exp()
    assert abs(joint.sum() - 1) < 1e-9
    counts, place = torch.zeros(3**new, dtype=torch.float64), 3 ** torch.arange(new - 1, -1, -1)
    for seed in range(5):
        output = model.generate_any_order(
            ids.expand(20_000, -1),
            max_new_tokens=new,
            strategy="speculative",
            draft=draft,
            draft_tokens=3,
            verify="content",
            do_sample=True,
            seed=seed,
            eos_token_id=[],
        )
        counts += torch.bincount((output.sequences[:, 3:] * place).sum(1), minlength=3**new)
    expected = (2 * joint * (1 - joint) / torch.pi / counts.sum()).sqrt().sum() / 2
    assert (counts / counts.sum() - joint).abs().sum() / 2 < 1.25 * expected


def test_a_batch_may_leave_drafts_and_come_back(monkeypatch):
    """Which the clock decides, pass by pass; the text is the same, also where the cache is compacted between."""
    monkeypatch.setattr(generation_trees, "COMPACT_EVERY", 2)
    for number in (1, 2, 1000):
        monkeypatch.setattr(generation_trees, "PROBED_PASSES", number)
        monkeypatch.setattr(generation_trees, "KEPT_PASSES", number)
        test_the_text_is_the_bases("left_token", "ngram+head", "left")


def test_a_cache_may_hold_all_but_the_last_token():
    model, base = adapted("left_token")
    ids = torch.randint(0, 13, (1, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 6, "strategy": "speculative", "verify": "content", "eos_token_id": []}
    wanted = model.generate_any_order(ids, **settings)
    cache = base(ids[:, :-1], use_cache=True).past_key_values
    assert torch.equal(model.generate_any_order(ids, past_key_values=cache, **settings).sequences, wanted.sequences)
    with pytest.raises(ValueError, match="a row's whole prompt: verify='content'"):
        model.generate_any_order(ids, past_key_values=wanted.cache, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify": "content"}, "verify='content' has no effect with strategy='groupwise'"),
        ({"verify": "base", "strategy": "speculative"}, "one of slots, content"),
        ({"verify": "content", "strategy": "speculative", "order": "right_to_left"}, "expected left_to_right"),
        ({"verify": "content", "strategy": "speculative"}, "no given text after a blank.*suffix_template"),
    ],
)
def test_what_it_can_not_check_is_said(settings, message):
    ids = torch.tensor([[1, 2, 0, 0, 3]])
    blanks = torch.tensor([[False, False, True, True, False]])
    with pytest.raises(ValueError, match=message):
        tiny_model().generate_any_order(ids, blanks, **settings)
