"""What users expect of `generate`: processors, stopping, copies, streamers, hooks, caches, and errors that tell."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TextStreamer
from transformers.generation import BaseStreamer, CompileConfig

from a3_hf.models.a3_llama.generation_decoder import NonFiniteLogitsError
from a3_hf.models.a3_llama.orders import GroupOrder
from tests.conftest import tiny_model
from tests.models.a3_llama.test_generation import STRATEGIES, problem

EVERY_STRATEGY = {**STRATEGIES, "refine": {"strategy": "refine", "refine_rounds": 2}}


# SlotNoise


def neighbours(number: int):
    """A problem of 8 rows, left-padded, whose row `number` is always the same one."""
    ids, blanks, mask = problem(lengths=(19, 12, 15, 9, 17, 11, 18, 14))
    ids[number], blanks[number], mask[number] = (tensor[1] for tensor in problem())
    return ids, blanks, mask


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_one_seed_gives_a_row_the_same_text_in_any_batch(model, name):
    settings = {**EVERY_STRATEGY[name], "do_sample": True, "seed": 3}
    ids, blanks, mask = (tensor[1:2] for tensor in problem())
    real = mask[0]
    alone = model.generate_any_order(ids[:, real], blanks[:, real], **settings)
    for number in (0, 5):
        ids, blanks, mask = neighbours(number)
        together = model.generate_any_order(ids, blanks, attention_mask=mask, **settings)
        assert torch.equal(together.sequences[number, real], alone.sequences[0])
        assert (together.log_probs[number, real] - alone.log_probs[0]).abs().max() < 1e-5


def test_copies_differ_and_the_first_is_the_text_alone(model):
    ids, blanks, mask = problem()
    settings = {"attention_mask": mask, "do_sample": True, "seed": 3}
    one = model.generate_any_order(ids, blanks, **settings)
    many = model.generate_any_order(ids, blanks, num_return_sequences=4, **settings)
    assert many.sequences.shape[0] == 12
    assert torch.equal(many.sequences[::4], one.sequences)
    assert len(many.sequences[:4].unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("draft", "order"),
    [
        ("model", "left_to_right"),
        ("ngram", "spans"),
        pytest.param("ngram", "left_to_right", marks=pytest.mark.slow),
        pytest.param("model", "spans", marks=pytest.mark.slow),
    ],
)
def test_speculative_sampling_follows_the_sequential_joint(draft, order):
    """Total variation between 100,000 samples and the enumerated joint of the sequential model, with text on both sides."""
    model = tiny_model(vocab_size=3, num_hidden_layers=2, hidden_size=16, intermediate_size=16, initializer_range=0.5)
    ids = torch.tensor([[1, 2, 0, 0, 0, 0, 0, 1]])
    blanks = torch.tensor([[False, False, True, True, True, True, True, False]])
    order = {"order": order, **({"span_length": 2} if order == "spans" else {})}
    one = model.generate_any_order(ids, blanks, seed=[0], **order)
    groups = one.group_ids  # a tensor, so that all rows share the order
    texts = ids.repeat(3**5, 1)
    texts[:, 2:7] = torch.tensor(list(itertools.product(range(3), repeat=5)))
    joint = model.log_likelihood(texts, groups.expand(len(texts), -1))[:, 2:7].double().sum(1).exp()
    assert abs(joint.sum() - 1) < 1e-5
    counts = torch.zeros(3**5)
    place = 3 ** torch.arange(4, -1, -1)
    passes = 0
    for seed in range(5):
        rows = 20_000
        output = model.generate_any_order(
            ids.expand(rows, -1),
            blanks.expand(rows, -1),
            strategy="speculative",
            draft=draft,
            draft_tokens=3,
            order=groups.expand(rows, -1),
            do_sample=True,
            seed=seed,
        )
        counts += torch.bincount((output.sequences[:, 2:7] * place).sum(1), minlength=3**5)
        passes = max(passes, output.num_forward_passes)
    share = counts / counts.sum()
    # the expected distance of an exact sampler is about Σ √(2 p (1 − p) / (π n)) / 2
    expected = (2 * joint * (1 - joint) / torch.pi / counts.sum()).sqrt().sum() / 2
    assert (share - joint).abs().sum() / 2 < 1.25 * expected
    assert passes <= 5


def test_a_broken_accept_rule_would_be_seen(monkeypatch):
    """The check above sees a decoder that lets every draft stand."""
    import a3_hf.models.a3_llama.generation_strategies as strategies

    real = strategies.accept_drafts

    def careless(target, draft, tokens, is_draft, accept_noise, residual_noise):
        return real(target, draft, tokens, is_draft, accept_noise * 0, residual_noise)

    monkeypatch.setattr(strategies, "accept_drafts", careless)
    with pytest.raises(AssertionError):
        test_speculative_sampling_follows_the_sequential_joint("model", "left_to_right")


@pytest.mark.parametrize("draft", ["model", "ngram"])
@pytest.mark.parametrize("batch", [False, True])
def test_greedy_speculative_is_greedy_sequential(model, draft, batch):
    ids, blanks, mask = problem(lengths=(40, 23, 31) if batch else (40,))
    ids = ids % 5  # words come again, so that n-grams find something
    for order in ("left_to_right", "random"):
        settings = {"attention_mask": mask, "order": order, "seed": 2}
        slow = model.generate_any_order(ids, blanks, 20, **settings)
        fast = model.generate_any_order(
            ids, blanks, 20, strategy="speculative", draft=draft, draft_tokens=5, **settings
        )
        assert torch.equal(slow.sequences, fast.sequences)
        assert torch.equal(slow.group_ids, fast.group_ids)
        assert (slow.log_probs - fast.log_probs).abs().max() < 1e-5
        assert fast.num_forward_passes <= int(blanks.sum(1).max()) + 20


def test_greedy_speculative_on_a_pretrained_model(stories, story_text):
    from transformers import AutoTokenizer

    from a3_hf import A3LlamaForCausalLM

    model = A3LlamaForCausalLM.from_pretrained(stories).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = story_text.read_text()
    prompts = [story.strip()[:80] for story in text.split("<|endoftext|>") if len(story) > 200][:100]
    assert len(prompts) == 100
    fewer = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        slow = model.generate_any_order(ids, max_new_tokens=16)
        fast = model.generate_any_order(ids, max_new_tokens=16, strategy="speculative", draft="ngram")
        assert torch.equal(slow.sequences, fast.sequences)
        assert fast.num_forward_passes <= 16
        fewer += fast.num_forward_passes < 16
    assert fewer > 0


# Refinement


def test_refine_never_lowers_the_exact_likelihood(model):
    ids, blanks, mask = problem(lengths=(40, 23, 31))
    settings = {"attention_mask": mask, "tokens_per_step": 6}
    first = model.generate_any_order(ids, blanks, strategy="dynamic", **settings)
    groups = GroupOrder.infilling(blanks, attention_mask=mask).group_ids
    before = (model.log_likelihood(first.sequences, groups, mask.long()) * blanks).sum(1)
    totals = [before]
    for rounds in (1, 2, 5):
        output = model.generate_any_order(ids, blanks, strategy="refine", refine_rounds=rounds, **settings)
        assert torch.equal(output.sequences[~blanks], ids[~blanks])
        totals.append((model.log_likelihood(output.sequences, groups, mask.long()) * blanks).sum(1))
        assert (totals[-1] - output.log_probs.sum(1)).abs().max() < 1e-4
    assert all((later >= earlier - 1e-5).all() for earlier, later in itertools.pairwise(totals))
    assert (totals[-1] > before + 1e-3).any()


def test_a_round_of_refine_reopens_the_fraction(model):
    ids, blanks, mask = problem(lengths=(40, 23, 31))
    settings = {"attention_mask": mask, "strategy": "refine", "refine_fraction": 0.5, "do_sample": True, "seed": 1}
    steps = model.generate_any_order(ids, blanks, refine_rounds=1, **settings).commit_step
    reopened = (steps > steps[blanks].min() + int(blanks.sum(1).max()) - 1).sum(1)
    quota = (blanks.sum(1) * 0.5).ceil().long()
    assert ((reopened == quota) | (reopened == 0)).all() and reopened.any()  # 0: the round did not raise the likelihood


# Processors


def test_repetition_penalty_left_to_right_is_generates(model):
    ids = problem()[0][:, :6]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, repetition_penalty=1.7, **settings)
    ours = model.generate_any_order(ids, max_new_tokens=12, repetition_penalty=1.7)
    assert torch.equal(ours.sequences, plain)
    assert not torch.equal(plain, model.generate(ids, **settings))
    own = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    assert torch.equal(model.generate_any_order(ids, max_new_tokens=12, logits_processor=own).sequences, plain)
    fast = model.generate_any_order(ids, max_new_tokens=12, repetition_penalty=1.7, strategy="speculative")
    assert torch.equal(fast.sequences, plain)


def test_processors_see_the_row_turned_to_the_slot(model):
    seen = []

    class Watch:
        def __call__(self, input_ids, scores):
            seen.append(input_ids)
            return scores

    ids = torch.tensor([[1, 5, 6, 0, 7, 0, 8]])
    blanks = torch.tensor([[False, False, False, True, False, True, False]])
    model.generate_any_order(ids, blanks, group_size=2, logits_processor=LogitsProcessorList([Watch()]))
    assert seen[0].tolist() == [[7, 1, 8, 1, 5, 6], [8, 1, 5, 6, 1, 7]]


@pytest.mark.parametrize("name", ["left_to_right", "confidence", "speculative", "speculative_random", "ngram"])
def test_bad_words_are_never_written(model, name):
    ids, blanks, mask = problem()
    settings = {**STRATEGIES[name], "attention_mask": mask}
    if settings["strategy"] == "dynamic":
        settings["tokens_per_step"] = 1
    free = model.generate_any_order(ids, blanks, **settings).sequences
    pairs = [(row[i : i + 2].tolist(), (row[i : i + 2]).tolist()) for row in free for i in range(18)]
    touched = torch.nn.functional.pad(blanks[:, 1:], (0, 1)) | blanks
    bad = [
        free[r, i : i + 2].tolist()
        for r in range(3)
        for i in range(18)
        if touched[r, i] and mask[r, i] and (blanks[r, i] or blanks[r, i + 1])
    ]
    bad = [words for words in bad if words in [pair for pair, _ in pairs]][:6]
    single = int(free[blanks][0])
    output = model.generate_any_order(ids, blanks, bad_words_ids=[[single], *bad], **settings).sequences
    assert single not in output[blanks].tolist()
    for row in range(3):
        for i in range(18):
            if mask[row, i] and (blanks[row, i] or blanks[row, i + 1]):
                assert output[row, i : i + 2].tolist() not in bad
    assert not torch.equal(output, free)


def test_suppressed_and_forced_tokens(model):
    ids = problem()[0][:, :6]
    free = model.generate_any_order(ids, max_new_tokens=8).sequences
    banned = free[:, 6:].unique().tolist()
    output = model.generate_any_order(ids, max_new_tokens=8, suppress_tokens=banned, forced_eos_token_id=2).sequences
    assert not set(output[:, 6:13].flatten().tolist()) & set(banned)
    assert (output[:, 13] == 2).all()


# Stopping


def test_eos_ends_a_left_to_right_continuation_as_in_generate(model):
    ids = problem()[0][:, :6]
    free = model.generate_any_order(ids, max_new_tokens=12).sequences
    eos = int(free[1, 9])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    for settings in ({}, {"strategy": "speculative"}, {"strategy": "speculative", "draft": "ngram"}):
        output = model.generate_any_order(ids, max_new_tokens=12, eos_token_id=eos, pad_token_id=0, **settings)
        assert torch.equal(output.sequences[:, : plain.shape[1]], plain)
        assert (output.sequences[:, plain.shape[1] :] == 0).all()
        first = 6 + (output.sequences[1, 6:] == eos).nonzero()[0, 0]
        assert (output.commit_step[1, first + 1 :] == -1).all() and (output.group_ids[1, first + 1 :] == -1).all()
    alone = model.generate_any_order(ids[1:2], max_new_tokens=12, eos_token_id=[eos, 60], pad_token_id=0)
    assert alone.num_forward_passes == int(first) - 6 + 1  # it stopped there


@pytest.mark.parametrize(("pad", "models_own", "expected"), [(7, 8, 7), (None, 8, 8), (None, None, "eos")])
def test_what_stands_behind_an_end(model, monkeypatch, pad, models_own, expected):
    monkeypatch.setattr(model.config, "pad_token_id", models_own)
    ids = problem()[0][:1, :6]
    eos = int(model.generate_any_order(ids, max_new_tokens=8).sequences[0, 8])
    output = model.generate_any_order(ids, max_new_tokens=8, eos_token_id=eos, pad_token_id=pad)
    behind = output.sequences[0][output.commit_step[0] < 0][6:]
    assert len(behind) and (behind == (eos if expected == "eos" else expected)).all()


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_eos_leaves_nothing_undefined(model, name):
    """Blanks inside the text are written without it; the continuation ends at its first one, whatever the order."""
    ids, blanks, mask = problem()
    settings = {**EVERY_STRATEGY[name], "attention_mask": mask, "do_sample": True, "temperature": 3.0, "seed": 1}
    eos = list(range(3, 13))
    output = model.generate_any_order(ids, blanks, 20, eos_token_id=eos, pad_token_id=0, **settings)
    inside, new = output.sequences[:, :19], output.sequences[:, 19:]
    assert not torch.isin(inside[blanks], torch.tensor(eos)).any()
    assert torch.equal(inside[~blanks], ids[~blanks])
    is_eos = torch.isin(new, torch.tensor(eos))
    assert is_eos.any(dim=1).any()
    for row in range(3):
        end = int(is_eos[row].long().argmax()) if is_eos[row].any() else 19
        assert (output.commit_step[row, 19 : 20 + end] >= 0).all() and not is_eos[row, :end].any()
        assert (new[row, end + 1 :] == 0).all() and (output.commit_step[row, 20 + end :] == -1).all()
        assert (output.log_probs[row, 20 + end :] == 0).all()


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_time_that_has_passed_still_gives_a_whole_text(model, name, monkeypatch):
    import a3_hf.models.a3_llama.generation_decoder as decoder_module

    clock = itertools.count()
    monkeypatch.setattr(decoder_module.time, "perf_counter", lambda: float(next(clock)))
    ids, blanks, mask = problem()
    output = model.generate_any_order(ids, blanks, 10, attention_mask=mask, max_time=4.5, **EVERY_STRATEGY[name])
    assert output.num_forward_passes <= 8
    assert (output.commit_step[:, :19] >= 0).equal(blanks)
    new = output.commit_step[:, 19:] >= 0
    assert (new.long().cumprod(1) == new.long()).all()  # an unbroken beginning
    assert name in ("right_to_left", "random", "spans", "speculative_random") or not new.all()
    assert torch.equal(output.sequences[:, :19][~blanks], ids[~blanks])


# Watching


class Record(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("put", value.tolist()))

    def put_draft(self, value, **kwargs):
        self.calls.append(("draft", value.tolist()))

    def end(self):
        self.calls.append(("end", None))


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_a_streamer_gets_the_text_in_order(model, name):
    ids, blanks, mask = (tensor[1:2] for tensor in problem())
    record = Record()
    output = model.generate_any_order(ids, blanks, 6, attention_mask=mask, streamer=record, **EVERY_STRATEGY[name])
    put = [token for kind, tokens in record.calls if kind == "put" for token in tokens]
    assert put == output.sequences[0, -18:].tolist() and record.calls[-1][0] == "end"
    first = int(blanks[0].long().argmax())
    if name == "left_to_right":
        assert record.calls[0] == ("put", ids[0, 19 - 12 : first].tolist())
        assert len([1 for kind, _ in record.calls if kind == "put"]) == output.num_forward_passes + 1
    if name == "right_to_left":
        assert any(kind == "draft" for kind, _ in record.calls)


def test_transformers_streamer_prints_the_continuation(stories, capsys):
    from transformers import AutoTokenizer, TextDiffusionStreamer

    from a3_hf import A3LlamaForCausalLM

    model, tokenizer = A3LlamaForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    model.generate_any_order(ids, max_new_tokens=20, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    text = tokenizer.decode(model.generate_any_order(ids, max_new_tokens=20).sequences[0], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()
    model.generate_any_order(ids, max_new_tokens=8, order="right_to_left", streamer=TextDiffusionStreamer(tokenizer))
    assert "\033[33m" in capsys.readouterr().out


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_history_logits_and_hooks(model, name):
    ids, blanks, mask = problem()
    seen = []
    output = model.generate_any_order(
        ids,
        blanks,
        attention_mask=mask,
        output_history=True,
        output_logits=True,
        commit_hook=lambda step, sequences, committed: seen.append((step, sequences.clone(), committed)),
        **EVERY_STRATEGY[name],
    )
    assert [step for step, _, _ in seen] == list(range(len(output.history)))
    for step, sequences, committed in seen:
        assert torch.equal(output.history[step][committed], sequences[committed])
    if name != "refine":
        assert torch.equal(output.history[-1][mask], output.sequences[mask])
        for step, text in enumerate(output.history):
            assert torch.equal(text >= 0, ~blanks & mask | (blanks & (output.commit_step <= step)))
        log_probs = output.logits.log_softmax(-1).gather(-1, output.sequences[..., None])[..., 0]
        assert (log_probs - output.log_probs)[blanks].abs().max() < 1e-5
    assert (output.logits[~blanks] == 0).all() and (output.logits[blanks] != 0).any(-1).all()


def test_a_logits_hook_decides(model):
    ids, blanks, mask = problem()

    def only_seven(step, columns, logits):
        assert logits.shape[:2] == columns.shape
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([7]), 0.0)

    output = model.generate_any_order(ids, blanks, attention_mask=mask, logits_hook=only_seven)
    assert (output.sequences[blanks] == 7).all()
    scored = model.log_likelihood(output.sequences, output.group_ids, mask.long())
    assert (scored - output.log_probs)[blanks].abs().max() < 1e-5  # the model's own


# Caches


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_a_prompt_cache_changes_nothing_and_stays_as_it_is(model, name):
    ids, blanks, mask = problem()
    blanks[:, :9] = False
    settings = {**EVERY_STRATEGY[name], "attention_mask": mask}
    fresh = model.generate_any_order(ids, blanks, **settings)
    lead = int(blanks.any(0).long().argmax())
    assert fresh.past_key_values.get_seq_length() == lead
    kept = fresh.past_key_values.layers[1].keys.clone()
    for _ in range(2):
        again = model.generate_any_order(ids, blanks, past_key_values=fresh.past_key_values, **settings)
        assert torch.equal(again.sequences, fresh.sequences)
        assert (again.log_probs - fresh.log_probs).abs().max() < 1e-5
        assert torch.equal(fresh.past_key_values.layers[1].keys, kept)
    assert again.past_key_values.get_seq_length() == lead


def test_one_prompt_serves_many_continuations(model):
    prompt = problem()[0][:1, :10]
    cache = model(prompt, use_cache=True).past_key_values
    plain = model.generate_any_order(prompt, max_new_tokens=6)
    assert torch.equal(
        model.generate_any_order(prompt, max_new_tokens=6, past_key_values=cache).sequences, plain.sequences
    )
    many = {"max_new_tokens": 6, "do_sample": True, "seed": 4, "num_return_sequences": 5}
    cached = model.generate_any_order(prompt, past_key_values=cache, **many)
    assert torch.equal(cached.sequences, model.generate_any_order(prompt, **many).sequences)
    suffix = torch.cat([prompt, torch.tensor([[0, 0, 9, 8]])], dim=1)
    blanks = torch.zeros_like(suffix, dtype=torch.bool).index_fill(1, torch.tensor([10, 11]), True)
    cached = model.generate_any_order(suffix, blanks, past_key_values=cache)
    assert torch.equal(cached.sequences, model.generate_any_order(suffix, blanks).sequences)
    assert cache.get_seq_length() == 10


def test_caches_that_do_not_belong(model):
    prompt = problem()[0][:2, :10]
    cache = model(prompt, use_cache=True).past_key_values
    new = {"max_new_tokens": 3}
    with pytest.raises(ValueError, match="past_key_values holds 10 tokens: expected at most 6, the columns"):
        model.generate_any_order(prompt[:, :6], past_key_values=cache, **new)
    with pytest.raises(ValueError, match=r"does not match input_ids at row 1, column 4"):
        other = prompt.clone()
        other[1, 4] = 59 - other[1, 4]
        model.generate_any_order(other, past_key_values=cache, **new)
    with pytest.raises(ValueError, match="another text"):
        tiny_model(seed=7).generate_any_order(prompt, past_key_values=cache, **new)
    with pytest.raises(ValueError, match="past_key_values has 3 layers of shape .*: expected 2 of"):
        tiny_model(num_hidden_layers=2).generate_any_order(prompt, past_key_values=cache, **new)
    with pytest.raises(ValueError, match="past_key_values has"):
        model.generate_any_order(prompt.repeat(2, 1), past_key_values=cache, **new)
    with pytest.raises(ValueError, match="past_key_values: expected use_cache=True"):
        model.generate_any_order(prompt, past_key_values=cache, use_cache=False, **new)


def test_the_cache_holds_keys_and_values_of_content_alone(model):
    output = model.generate_any_order(problem()[0], max_new_tokens=8, group_size=4)
    layers = output.past_key_values.layers
    held = sum(tensor.numel() for layer in layers for tensor in (layer.keys, layer.values)) // 3
    config = model.config
    kv_dim = config.num_key_value_heads * config.head_dim
    assert held == 2 * config.num_hidden_layers * kv_dim * 19


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["left_to_right", "right_to_left", "random", "spans"])
def test_a_static_cache_changes_nothing(name, implementation):
    model = tiny_model(attn_implementation=implementation)
    for rows in (slice(0, 3), slice(1, 2)):
        ids, blanks, mask = (tensor[rows] for tensor in problem())
        settings = {**STRATEGIES[name], "attention_mask": mask}
        grown = model.generate_any_order(ids, blanks, 5, **settings)
        static = model.generate_any_order(ids, blanks, 5, cache_implementation="static", **settings)
        assert torch.equal(static.sequences, grown.sequences)
        assert (static.log_probs - grown.log_probs).abs().max() < 1e-5


def test_a_compiled_step_changes_nothing(model):
    ids = problem()[0][:1]
    settings = {"max_new_tokens": 12, "group_size": 4}
    grown = model.generate_any_order(ids, **settings)
    compiled = model.generate_any_order(
        ids,
        cache_implementation="static",
        compile_config=CompileConfig(mode="default", fullgraph=False, dynamic=False, backend="aot_eager"),
        **settings,
    )
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled.sequences, grown.sequences)
    assert (compiled.log_probs - grown.log_probs).abs().max() < 1e-5


# Faults


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_nan_says_when_and_hands_back_what_was_committed(name):
    model = tiny_model()
    ids, blanks, mask = problem()
    settings = {**EVERY_STRATEGY[name], "attention_mask": mask}
    whole = model.generate_any_order(ids, blanks, **settings)
    calls = itertools.count()

    def spoil(module, inputs, output):
        return output * torch.nan if next(calls) >= 2 else output

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteLogitsError, match="NaN at step 2") as caught:
        model.generate_any_order(ids, blanks, **settings)
    output = caught.value.output
    assert caught.value.step == 2 and set(output.commit_step.unique().tolist()) == {-1, 0, 1}
    done = output.commit_step >= 0
    if name != "refine":
        assert torch.equal(done, (whole.commit_step >= 0) & (whole.commit_step < 2))
    assert torch.equal(output.sequences[done], whole.sequences[done]) or name == "refine"
    assert (output.log_probs[~done] == 0).all() and output.log_probs.isfinite().all()


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_bf16_runs(name):
    model = tiny_model().to(torch.bfloat16)
    ids, blanks, mask = problem()
    output = model.generate_any_order(ids, blanks, attention_mask=mask, **EVERY_STRATEGY[name])
    assert (output.commit_step >= 0).equal(blanks) and output.log_probs.isfinite().all()


class CountReadBacks(TorchDispatchMode):
    """Counts the values that Python reads from tensors: on a GPU each of them waits for the device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [{"group_size": 2}, {"strategy": "dynamic", "tokens_per_step": 2}, {"strategy": "speculative"}],
)
def test_a_step_reads_one_number_back_at_most(model, settings, monkeypatch):
    """That of the check for NaN, on a CPU at each step. `speculative` also reads how many tokens stand, which decides the
    shapes of the next pass: one transfer (`tolist`), which does not count here.
    """
    monkeypatch.setattr("a3_hf.models.a3_llama.input_validation.looks_at_values", lambda tensor: False)  # as on a GPU
    counts, passes = [], []
    for num_tokens in (8, 16):
        with CountReadBacks() as counter:
            output = model.generate_any_order(
                torch.arange(3, 9)[None], max_new_tokens=num_tokens, eos_token_id=[], **settings
            )
        counts.append(counter.number)
        passes.append(output.num_forward_passes)
    assert passes[1] > passes[0]
    assert counts[1] - counts[0] <= passes[1] - passes[0]


@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative", "refine"])
def test_what_is_handed_back_can_be_trained_on(strategy):
    model = tiny_model()
    ids = torch.arange(3, 9)[None]
    seen = {"output_logits": True, "output_history": True}
    output = model.generate_any_order(ids, strategy=strategy, max_new_tokens=4, **seen)
    tensors = [output.sequences, output.commit_step, output.log_probs, output.group_ids, output.logits, *output.history]
    tensors += [states for layer in output.past_key_values.layers for states in (layer.keys, layer.values)]
    assert not any(tensor.is_inference() for tensor in tensors)
    model.train()
    labels = output.sequences.masked_fill(output.commit_step < 0, -100)
    model(input_ids=output.sequences, group_ids=output.group_ids, labels=labels).loss.backward()
    assert model.model.query_embed.weight.grad.abs().sum() > 0
