"""Masked diffusion against slow and obvious forms of itself: a plain loss, one blank at a time, all masks, all orders."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, TrainingArguments

from a3_hf.data.arguments import DataArguments
from a3_hf.data.collator import RowCollator
from a3_hf.data.packing import load_rows
from a3_hf.models.a3_llama.generation_decoder import CRITERION, SAMPLE
from a3_hf.models.a3_llama.generation_sampling import uniform_noise
from a3_hf.models.a3_llama.orders import seed_of
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.corruption import check_mask_token, mask_by_count, mask_by_rate, spread_counts
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training.base_trainer import NonFiniteLossError
from a3_hf.training.masked_diffusion_trainer import DiffusionTrainer
from tests.conftest import tiny_config

MASK = 60


def llama_settings(**changes) -> dict:
    settings = {**tiny_config().to_dict(), "attn_implementation": "sdpa", **changes}
    del settings["model_type"]
    return settings


def tiny_diffusion(seed: int = 42, *, dtype: torch.dtype = torch.float64, **changes) -> MaskedDiffusionLlamaForCausalLM:
    torch.manual_seed(seed)
    config = MaskedDiffusionLlamaConfig(**llama_settings(**{"mask_token_id": MASK, **changes}))
    return MaskedDiffusionLlamaForCausalLM(config).eval().to(dtype)


@pytest.fixture
def model() -> MaskedDiffusionLlamaForCausalLM:
    return tiny_diffusion()


def tokens(rows: int, length: int, *, seed: int = 3, most: int = MASK) -> torch.Tensor:
    ids = torch.randint(3, most, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def problem(lengths=(11, 7, 9), side="left"):
    """Ids, blanks and the mask of rows of several lengths, padded at one side."""
    width = max(lengths)
    ids, blanks, real = tokens(len(lengths), width), *torch.zeros(2, len(lengths), width).bool()
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        real[row, columns] = True
        blanks[row, columns] = torch.rand(length, generator=generator) < 0.6
        blanks[row, columns.start] = False
    return ids, blanks, real


# The model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_with_a_causal_mask_it_is_llama(implementation, padded):
    dtype = torch.float64 if implementation == "sdpa" else torch.float32  # LLaMA's eager has no padding in float64
    model = tiny_diffusion(attn_implementation=implementation, dtype=dtype)
    llama = LlamaForCausalLM(LlamaConfig(**llama_settings(attn_implementation=implementation))).eval().to(dtype)
    llama.load_state_dict(model.state_dict())
    ids, _, real = problem()
    settings = {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp_min(0)} if padded else {}
    words = torch.arange(61) != MASK
    with torch.no_grad():
        expected = llama(ids, **settings).logits[..., words]
        bidirectional = model(ids, **settings).logits
        patterned = model(ids, **settings, visible_mask=torch.ones(11, 11).tril().bool()).logits
    shown = real if padded else torch.ones_like(real)
    assert (patterned[..., words] - expected)[shown].abs().max() < (1e-6 if dtype is torch.float64 else 1e-3)
    assert (bidirectional[..., words] - expected)[shown].abs().max() > 0.1
    assert (patterned[..., MASK] == -torch.inf).all() and (bidirectional[..., MASK] == -torch.inf).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_token_sees_every_other(implementation):
    model = tiny_diffusion(attn_implementation=implementation)
    ids = tokens(1, 8)
    with torch.no_grad():
        before = model(ids).logits
        for column in range(8):
            changed = ids.clone()
            changed[0, column] = 2
            after = model(changed).logits
            assert ((after - before).nan_to_num(0.0).abs().amax(-1) > 1e-4).all()


def test_the_logits_of_a_column_are_those_of_the_state_before_it(model):
    ids, _, real = problem(side="left")
    columns = torch.tensor([[3, 10], [6, 5], [4, 8]])
    with torch.no_grad():
        whole = model(ids, attention_mask=real).logits
        asked = model(ids, attention_mask=real, target_columns=columns).logits
    assert (asked - whole.gather(1, (columns - 1)[..., None].expand_as(asked))).nan_to_num(0.0).abs().max() < 1e-6


def test_padding_anywhere_changes_nothing(model):
    ids, _, _ = problem(lengths=(6,))
    spread = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0]])
    wide = torch.full_like(spread, 7).masked_scatter(spread.bool(), ids)
    labels, weights = torch.full_like(ids, -100), torch.rand(1, 6)
    labels[0, [2, 3, 5]] = torch.tensor([9, 10, 11])
    wide_labels = torch.full_like(wide, -100).masked_scatter(spread.bool(), labels)
    with torch.no_grad():
        narrow = model(ids, labels=labels, loss_weights=weights)
        padded = model(
            wide,
            attention_mask=spread,
            labels=wide_labels,
            loss_weights=torch.zeros(1, 12).masked_scatter(spread.bool(), weights),
        )
    assert narrow.loss > 0 and (narrow.loss - padded.loss).abs() < 1e-5
    assert (padded.token_losses[spread.bool()] - narrow.token_losses[0]).abs().max() < 1e-4


def plain_loss(model, rows: list[tuple[list[int], list[int], float]], num_items: int) -> torch.Tensor:
    """Σ weight · −log p over labels, of (masked ids, labels, weight) one row and one token at a time, over `num_items`."""
    total = torch.zeros(())
    for ids, labels, weight in rows:
        logits = LlamaForCausalLM.forward(model, torch.tensor([ids]), use_cache=False).logits[0]
        logits = torch.cat([logits[:, :MASK], logits[:, MASK + 1 :]], dim=1)  # the mask token is no word
        for column, label in enumerate(labels):
            if label != -100:
                total = total - weight * logits[column - 1].log_softmax(-1)[label]
    return total / num_items


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        assert (got[name] - expected[name]).abs().max() < tolerance, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_loss_and_its_gradients_are_the_plain_ones(implementation):
    model = tiny_diffusion(attn_implementation=implementation)
    ids, blanks, real = problem(side="right")
    weights = torch.tensor([[2.0], [1.0], [5.0]])
    masked = ids.masked_fill(blanks, MASK)
    labels = ids.masked_fill(~blanks, -100)
    output = model(masked, attention_mask=real, labels=labels, loss_weights=weights, num_items_in_batch=17)
    output.loss.backward()
    got = gradients(model)
    rows = [(masked[row, real[row]].tolist(), labels[row, real[row]].tolist(), float(weights[row])) for row in range(3)]
    expected = plain_loss(model, rows, 17)
    expected.backward()
    assert (output.loss - expected).abs() < 1e-5 and output.logits is None
    assert_same(got, gradients(model))
    assert (output.token_losses > 0).equal(blanks)
    assert ((output.token_losses * weights).sum() / 17 - output.loss).abs() < 1e-5
    with torch.no_grad():
        mean = model(masked, attention_mask=real, labels=labels).loss
    assert (mean - output.token_losses[blanks].mean()).abs() < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_documents_of_a_row_are_as_rows_of_their_own(implementation):
    model = tiny_diffusion(attn_implementation=implementation)
    ids = tokens(1, 9)
    ids[0, 4] = 1
    documents = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    labels = torch.full_like(ids, -100)
    labels[0, [1, 3, 5]] = torch.tensor([8, 9, 10])
    with torch.no_grad():
        together = model(ids, attention_mask=documents > 0, labels=labels, document_ids=documents).token_losses
        alone = [model(ids[:, part], labels=labels[:, part]).token_losses for part in (slice(0, 4), slice(4, 7))]
    assert (together[:, :7] - torch.cat(alone, dim=1)).abs().max() < 1e-4


def test_a_checkpoint_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = MaskedDiffusionLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.mask_token_id == MASK and again.config.is_causal is False
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "masked_diffusion_llama"
    ids = tokens(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        LlamaForCausalLM(LlamaConfig(**llama_settings())).state_dict()
    )


def test_it_loads_a_llama(source):
    llama = LlamaForCausalLM.from_pretrained(source)
    model = MaskedDiffusionLlamaForCausalLM.from_pretrained(source)
    assert model.config.mask_token_id is None and not model.config.is_causal
    assert_same(dict(model.named_parameters()), dict(llama.named_parameters()), tolerance=1e-12)


def test_half_a_checkpoint_or_another_models_is_refused(model, source, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="missing keys: model.layers.3"):
        MaskedDiffusionLlamaForCausalLM.from_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'gpt2': masked diffusion expects"):
        MaskedDiffusionLlamaForCausalLM.from_pretrained(tmp_path)


# The mask token


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_mask_token_changes_no_probability(source, tied):
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = tiny_diffusion(mask_token_id=None, tie_word_embeddings=tied)
    ids, state = tokens(2, 9), torch.get_rng_state()
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        mean = model.get_input_embeddings().weight.mean(dim=0)
        assert model.set_mask_token(tokenizer) == 61 == model.config.mask_token_id
        after = model(ids).logits.log_softmax(-1)
    assert torch.equal(torch.get_rng_state(), state)
    assert after.shape[-1] == 62 == model.config.vocab_size
    assert (after[..., :61] - before).abs().max() < 1e-6 and (after[..., 61] == -torch.inf).all()
    assert (model.get_input_embeddings().weight[61] - mean).abs().max() < 1e-6
    embedding = model.get_input_embeddings().weight[61].detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight[61] += 1.0
    assert model.set_mask_token(tokenizer) == 61  # a trained one stays as it is
    assert torch.equal(model.get_input_embeddings().weight[61], embedding + 1.0)


def test_a_special_token_or_a_spare_row_may_be_the_mask_token(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = tiny_diffusion(mask_token_id=None)
    assert model.set_mask_token(tokenizer, 0) == 0  # <unk>
    assert model.config.vocab_size == 61
    assert (
        model.get_input_embeddings().weight[0] - model.get_input_embeddings().weight[1:].mean(dim=0)
    ).abs().max() < 1e-6
    spare = tiny_diffusion(mask_token_id=None, vocab_size=64)
    assert spare.set_mask_token(tokenizer) == 61 and spare.config.vocab_size == 64
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    own = tiny_diffusion(mask_token_id=None, vocab_size=64)
    assert own.set_mask_token(tokenizer) == tokenizer.mask_token_id == 61


@pytest.mark.parametrize(
    ("mask_token_id", "message"),
    [
        (17, "mask_token_id=17 is a text token of the tokenizer, 'w14'"),
        (1, "is the tokenizer's bos token"),
        (2, "is the tokenizer's eos token"),
        (99, "is not one of the model's 61 ids"),
        (-1, "is not one of the model's 61 ids"),
        (True, "is not one of the model's 61 ids"),
    ],
)
def test_a_mask_token_that_is_a_real_word_is_refused(model, source, tmp_path, mask_token_id, message):
    tokenizer = AutoTokenizer.from_pretrained(source)
    with pytest.raises(ValueError, match=message):
        model.set_mask_token(tokenizer, mask_token_id)
    with pytest.raises(ValueError, match=message):
        check_mask_token(tokenizer, mask_token_id, vocab_size=61)
    model.config.mask_token_id = mask_token_id
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, processing_class=tokenizer)
    with pytest.raises(ValueError, match=message):
        model.infill(tokenizer, "w1 <blank:2>")


def test_without_a_mask_token_nothing_is_masked(source, tmp_path):
    model = tiny_diffusion(mask_token_id=None)
    ids = tokens(1, 6)
    for call in (
        lambda: model.generate_any_order(ids, max_new_tokens=2),
        lambda: model.log_likelihood_bound(ids),
        lambda: make_trainer(tmp_path, model=model),
    ):
        with pytest.raises(ValueError, match="no mask token .* Call model.set_mask_token"):
            call()
    with pytest.raises(ValueError, match="mask_token_id is not set"):
        model.infill(AutoTokenizer.from_pretrained(source), "w1 <blank:2>")
    with pytest.raises(ValueError, match="mask_token_id=61: expected an id below vocab_size=61"):
        tiny_diffusion(mask_token_id=61)


# Likelihood


def by_the_order(model, ids: torch.Tensor, order: list[int]) -> list[float]:
    """The log-probability of each column in turn, those before it in `order` known beside the given ones."""
    row, found = ids.clone(), []
    row[order] = MASK
    for column in order:
        with torch.no_grad():
            found.append(float(model(row[None]).logits[0, column - 1].log_softmax(-1)[ids[column]]))
        row[column] = ids[column]
    return found


@pytest.mark.parametrize(("length", "given"), [(5, None), (6, [0, 3])])
def test_the_exact_bound_is_the_mean_over_all_orders(model, length, given):
    ids = tokens(1, length)[0]
    given_mask = None if given is None else torch.isin(torch.arange(length), torch.tensor(given))[None]
    is_open = [column for column in range(1, length) if column not in (given or [])]
    orders = list(itertools.permutations(is_open))
    mean = sum(sum(by_the_order(model, ids, list(order))) for order in orders) / len(orders)
    assert float(model.exact_bound(ids[None], given_mask=given_mask)) == pytest.approx(mean, abs=1e-4)


def test_the_monte_carlo_bound_converges_to_the_exact_one(model):
    ids, _, real = problem(lengths=(9, 5, 7))
    exact = model.exact_bound(ids, real)
    errors = {}
    for num_samples in (5, 500):
        bounds = torch.stack([model.log_likelihood_bound(ids, real, num_samples=num_samples, seed=s) for s in range(4)])
        errors[num_samples] = (bounds - exact).pow(2).mean().sqrt()
        assert bounds.std(dim=0).min() > 0  # other seeds, other masks
    assert errors[500] < 0.3 and errors[500] < errors[5] / 5
    single = torch.stack([model.log_likelihood_bound(ids, real, num_samples=1, seed=seed) for seed in range(400)])
    standard_error = single.std(dim=0) / math.sqrt(len(single))
    assert ((single.mean(dim=0) - exact).abs() < 4 * standard_error).all() and (standard_error < exact.abs() / 20).all()


def test_a_bound_depends_on_its_own_row_alone(model, monkeypatch):
    ids, _, real = problem()
    together = model.log_likelihood_bound(ids, real, num_samples=20, seed=4)
    monkeypatch.setattr(
        "a3_hf.models.masked_diffusion_llama.likelihood_masked_diffusion.TOKENS_PER_PASS", 35
    )  # three rows a pass
    again = model.log_likelihood_bound(ids, real, num_samples=20, seed=4)
    alone = torch.cat(
        [model.log_likelihood_bound(ids[[row]][:, real[row]], num_samples=20, seed=4) for row in range(3)]
    )
    assert (together - alone).abs().max() < 1e-4 and (together - again).abs().max() < 1e-4
    nothing_open = model.log_likelihood_bound(ids, real, real)
    assert torch.equal(nothing_open, torch.zeros(3)) and torch.equal(model.exact_bound(ids, real, real), torch.zeros(3))


def test_the_likelihood_of_an_order_is_the_chain_rule(model):
    ids = tokens(1, 7)
    order = [4, 1, 6, 2, 5]  # 0 and 3 are given
    groups = torch.zeros(1, 7, dtype=torch.long)
    groups[0, order] = torch.arange(1, 6)
    expected = torch.zeros(1, 7)
    expected[0, order] = torch.tensor(by_the_order(model, ids[0], order))
    assert (model.log_likelihood(ids, groups) - expected).abs().max() < 1e-4
    wanted = torch.isin(torch.arange(7), torch.tensor([6, 3, 5]))[None]
    partly, greedy = model.log_likelihood_and_greedy(ids, groups, scored_mask=wanted)
    assert (partly - expected * wanted).abs().max() < 1e-4
    best, _ = model.log_likelihood_and_greedy(ids.scatter(1, torch.tensor([[5]]), model_choice(model, ids, 5)), groups)
    assert not greedy.any() and best[0, 5] > expected[0, 5]
    padded = nn.functional.pad(ids, (2, 1)), nn.functional.pad(groups, (2, 1), value=-1)
    real = nn.functional.pad(torch.ones(1, 7), (2, 1))
    assert (model.log_likelihood(*padded, real)[:, 2:-1] - expected).abs().max() < 1e-4


def model_choice(model, ids, column):
    with torch.no_grad():
        return model(ids.scatter(1, torch.tensor([[column]]), MASK)).logits[:, [column - 1]].argmax(-1)


def test_the_likelihoods_of_all_texts_sum_to_one():
    model = tiny_diffusion(vocab_size=5, mask_token_id=0)
    texts = torch.tensor([[1, *rest] for rest in itertools.product(range(1, 5), repeat=3)])
    for groups in ([0, 2, 1, 3], [0, 1, 1, 2]):
        log_probs = model.log_likelihood(texts, torch.tensor([groups]).expand_as(texts)).sum(dim=1)
        assert float(log_probs.exp().sum()) == pytest.approx(1.0, abs=1e-4)


def test_masks_are_drawn_as_they_should_be():
    is_open = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1]]).bool().expand(4000, -1)
    noise = torch.rand(4000, 10, generator=torch.Generator().manual_seed(0))
    rates = torch.tensor([0.25, 1.0]).repeat(2000)[:, None]
    masked, weights = mask_by_rate(is_open, rates, noise)
    assert not (masked & ~is_open).any() and torch.equal(weights, 1.0 / rates)
    assert masked[1::2].equal(is_open[1::2]) and float(masked[::2, is_open[0]].float().mean()) == pytest.approx(
        0.25, abs=0.02
    )
    counts = torch.arange(1, 9).repeat(500)[:, None]
    masked, weights = mask_by_count(is_open, counts, noise)
    assert (
        not (masked & ~is_open).any() and torch.equal(masked.sum(1), counts[:, 0]) and torch.equal(weights, 8 / counts)
    )
    assert (masked[:, is_open[0]].float().mean(0) - 4.5 / 8).abs().max() < 0.03
    drawn = Counter(spread_counts(torch.full((4000,), 8), torch.rand(4000), 3).flatten().tolist())
    assert set(drawn) == set(range(1, 9)) and max(drawn.values()) < 1.15 * min(drawn.values())
    assert spread_counts(torch.tensor([8, 0]), torch.tensor([0.1, 0.9]), 4).tolist() == [[1, 3, 5, 7], [1, 1, 1, 1]]


# Generation


def slow_fill(
    model, ids, blanks, *, criterion, tokens_per_step=1, seed=0, do_sample=False, temperature=1.0, top_k=None
):
    """One row, one slot at a time: the texts after each step."""
    row, is_open, number = ids.clone(), blanks.clone(), blanks.cumsum(0)
    texts, step = [], 0

    def chance(column, purpose):
        return float(uniform_noise(torch.tensor([seed_of(seed)]), number[None, [column]], step, purpose))

    while is_open.any():
        with torch.no_grad():
            logits = model(row.masked_fill(is_open, MASK)[None]).logits[0].double()
        found = []
        for column in is_open.nonzero().flatten().tolist():
            probs = logits[column - 1].softmax(-1)
            best = probs.sort(descending=True).values
            score = {
                "confidence": float(best[0]),
                "entropy": float(torch.special.xlogy(probs, probs).sum()),
                "margin": float(best[0] - best[1]),
                "random": chance(column, CRITERION),
            }[criterion]
            token = int(probs.argmax())
            if do_sample:
                scaled = logits[column - 1] / temperature
                if top_k is not None:
                    scaled[scaled < scaled.topk(top_k).values[-1]] = -torch.inf
                token = int((scaled.softmax(-1).cumsum(0) <= chance(column, SAMPLE)).sum())
            found.append((-score, column, token))
        for _, column, token in sorted(found)[:tokens_per_step]:
            row[column], is_open[column] = token, False
        step += 1
        texts.append(row.masked_fill(is_open, -1))
    return texts


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "random"])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_the_slow_one_row_by_row(model, criterion, tokens_per_step, sampling, side):
    ids, blanks, real = problem(side=side)
    settings = {"criterion": criterion, "tokens_per_step": tokens_per_step, **sampling}
    junk = ids.masked_fill(blanks, 5)
    output = model.generate_any_order(
        junk, blanks, attention_mask=real.long(), seed=[7, 8, 9], output_history=True, **settings
    )
    for row in range(3):
        texts = slow_fill(model, ids[row, real[row]], blanks[row, real[row]], seed=7 + row, **settings)
        assert torch.equal(output.sequences[row, real[row]], texts[-1])
        for step, text in enumerate(texts):
            assert torch.equal(output.history[step][row, real[row]], text)
    assert torch.equal(output.sequences[~blanks], junk[~blanks])
    most = int(blanks.sum(1).max())
    assert output.num_forward_passes == math.ceil(most / tokens_per_step) == int(output.commit_step.max()) + 1
    assert output.tokens_per_forward == pytest.approx(int(blanks.sum()) / 3 / output.num_forward_passes)


def test_the_log_probs_are_the_likelihood_of_the_order_taken(model):
    ids, blanks, real = problem()
    for settings in (
        {"tokens_per_step": 2},
        {"threshold": 0.3},
        {"entropy_budget": 4.0},
        {"window": 2, "tokens_per_step": 2},
        {"criterion": "random", "do_sample": True, "seed": 1, "temperature": 2.0},
        {"steps": 3},
    ):
        output = model.generate_any_order(ids, blanks, attention_mask=real, **settings)
        scored = model.log_likelihood(output.sequences, output.group_ids, real.long())
        assert (scored - output.log_probs).abs().max() < 1e-4 and (output.log_probs < 0).equal(blanks)
        assert (output.group_ids == -1).equal(~real) and (output.group_ids == 0).equal(real & ~blanks)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_steps_spread_the_blanks_evenly(model, steps):
    ids, blanks, real = problem()
    output = model.generate_any_order(ids, blanks, attention_mask=real, steps=steps)
    for row in range(3):
        number = int(blanks[row].sum())
        per_step = Counter(output.commit_step[row, blanks[row]].tolist())
        taken = min(steps, number)
        assert [per_step[step] for step in range(taken)] == [
            number // taken + (step < number % taken) for step in range(taken)
        ]
        alone = model.generate_any_order(ids[[row]][:, real[row]], blanks[[row]][:, real[row]], steps=steps)
        assert torch.equal(alone.sequences[0], output.sequences[row, real[row]])


def test_the_mask_token_is_never_written(model):
    with torch.no_grad():
        model.lm_head.weight[MASK] = model.lm_head.weight.abs().sum(0) * 10  # far the likeliest, or the least likely
        model.lm_head.weight[MASK - 1] = -model.lm_head.weight[MASK]
    ids, blanks, real = problem()
    for settings in ({}, {"do_sample": True, "temperature": 5.0, "seed": 2, "tokens_per_step": 4}):
        output = model.generate_any_order(ids, blanks, attention_mask=real, **settings)
        assert not (output.sequences == MASK).any() and output.log_probs.isfinite().all()


def test_an_eos_ends_the_continuation(model):
    ids = tokens(2, 4)
    free = model.generate_any_order(ids, max_new_tokens=8)
    eos = int(free.sequences[0, free.commit_step[0] == 0])  # the first that is written: nothing stands behind it
    output = model.generate_any_order(ids, max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    alone = model.generate_any_order(ids[:1], max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(alone.sequences[0], output.sequences[0])
    assert alone.num_forward_passes == int(alone.commit_step.max()) + 1  # nothing is asked behind the end
    for row in range(2):
        ends = (output.sequences[row, 4:] == eos).nonzero().flatten().tolist()
        end = 4 + ends[0] if ends else 11
        assert (output.commit_step[row, 4 : end + 1] >= 0).all() and not (output.sequences[row] == MASK).any()
        for tensor, value in (
            (output.sequences, 0),
            (output.commit_step, -1),
            (output.log_probs, 0),
            (output.group_ids, int(output.commit_step[row].max()) + 2),  # seen as mask tokens, as what comes later is
        ):
            assert (tensor[row, end + 1 :] == value).all()
    scored = model.log_likelihood(output.sequences, output.group_ids, scored_mask=output.commit_step >= 0)
    assert (scored - output.log_probs).abs().max() < 1e-5
    assert (output.sequences[0, 4:] == eos).any()
    inside = torch.zeros(2, 4).bool()
    inside[:, 2] = True
    assert not (model.generate_any_order(ids, inside, eos_token_id=eos).sequences[:, 2] == eos).any()


def test_what_looks_on_and_what_steers_is_a3s_own(model):
    ids, blanks, real = problem()
    seen = []
    output = model.generate_any_order(
        ids,
        blanks,
        attention_mask=real,
        num_return_sequences=2,
        do_sample=True,
        seed=3,
        output_logits=True,
        suppress_tokens=[5, 6],
        repetition_penalty=1.3,
        logits_hook=lambda step, columns, logits: logits.index_fill(-1, torch.tensor([7]), -torch.inf),
        commit_hook=lambda step, sequences, committed: seen.append(committed.clone()),
    )
    assert output.sequences.shape == (6, 11) and torch.stack(seen).sum(0).equal(blanks.repeat_interleave(2, 0).long())
    written = output.sequences[output.commit_step >= 0]
    assert not torch.isin(written, torch.tensor([5, 6, 7, MASK])).any()
    chosen = output.logits.log_softmax(-1).gather(-1, output.sequences[..., None])[..., 0]
    assert (chosen - output.log_probs)[output.commit_step >= 0].abs().max() < 1e-4
    late = model.generate_any_order(ids, blanks, attention_mask=real, max_time=1e-9)
    assert late.num_forward_passes == 1 and not (late.sequences == MASK).any()


def test_infilling_and_scoring_of_text(source):
    model, tokenizer = tiny_diffusion(mask_token_id=0), AutoTokenizer.from_pretrained(source)
    output = model.infill(tokenizer, ["w1 <blank:2> w5", "w3 w4 <blank:1..3>"], return_outputs=True)
    assert output.texts[0].startswith("w1") and output.texts[0].endswith("w5") and output.lengths[0] == (2,)
    assert set(output.length_scores[1][0]) == {1, 2, 3}
    assert model.rewrite(tokenizer, "w1 w2 w3", [(3, 5)]).endswith(" w3")
    score = model.score(tokenizer, "w1 w2 w3", order="random", num_orders=2)
    ids = score.token_ids
    for number in range(2):
        order = score.group_ids[number].argsort()[1:].tolist()
        row, total = ids.clone(), 0.0
        row[order] = 0
        for column in order:
            with torch.no_grad():
                total += float(model(row[None]).logits[0, column - 1].log_softmax(-1)[ids[column]])
            row[column] = ids[column]
        assert float(score.totals[number]) == pytest.approx(total, abs=1e-4)


# Training


def rows_of(lengths, *, seed=0) -> list[dict]:
    made = []
    for index, ids in enumerate(tokens(len(lengths), max(lengths), seed=seed).tolist()):
        ids = ids[: lengths[index]]
        labels = [-100, *ids[1:]]
        if index % 3 == 2:
            labels[-2:] = [-100, -100]  # given text at the end as well
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def make_trainer(output_dir, train=None, evaluation=None, *, model=None, **settings) -> DiffusionTrainer:
    own = ("masking", "low_discrepancy", "anneal_steps", "eval_samples", "processing_class", "callbacks")
    arguments = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **{name: value for name, value in settings.items() if name not in own},
    }
    return DiffusionTrainer(
        tiny_diffusion() if model is None else model,
        TrainingArguments(str(output_dir), **arguments),
        data_collator=RowCollator(pad_token_id=0),
        train_dataset=train,
        eval_dataset=evaluation,
        **{name: value for name, value in settings.items() if name in own},
    )


@pytest.mark.parametrize("masking", ["rate", "count"])
@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_the_loss_of_a_step_is_the_plain_loop(tmp_path, masking, low_discrepancy):
    rows = rows_of([9, 6, 8, 5])
    trainer = make_trainer(
        tmp_path, rows, masking=masking, low_discrepancy=low_discrepancy, max_steps=1, max_grad_norm=0.0, seed=5
    )
    drawn, draw = [], trainer.draw

    def keep(is_open, micro_batch):
        drawn.append((is_open, *draw(is_open, micro_batch)))
        return drawn[-1][1:]

    trainer.draw = keep
    texts, compute_loss = [], trainer.compute_loss

    def watched(model, inputs, **kwargs):
        texts.append(inputs["input_ids"].clone())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)  # the step is the gradient
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    plain, masked_rows, scored = tiny_diffusion(), [], 0
    for ids, (is_open, masked, weights) in zip(texts, drawn, strict=True):
        assert not (masked & ~is_open).any() and weights.shape == (2, 1) and (weights >= 1).all()
        scored += int(is_open.sum())
        for row in range(2):
            real = ids[row] != 0
            if masking == "count":
                assert float(weights[row]) == pytest.approx(int(is_open[row].sum()) / int(masked[row].sum()))
            hidden = ids[row].masked_fill(masked[row], MASK)[real].tolist()
            labels = ids[row].masked_fill(~masked[row], -100)[real].tolist()
            masked_rows.append((hidden, labels, float(weights[row])))
    assert scored == sum(label != -100 for row in rows for label in row["labels"])
    expected = plain_loss(plain, masked_rows, scored)
    expected.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    step = {
        name: (before[name] - weight.detach()) / trainer.state.log_history[0]["learning_rate"]
        for name, weight in trainer.model.named_parameters()
    }
    assert_same(step, gradients(plain), tolerance=1e-3 * max(1.0, expected.item()))


def test_the_loss_is_the_exact_bound_in_expectation(tmp_path):
    model, ids = tiny_diffusion(), tokens(1, 6)
    exact = -float(model.exact_bound(ids)) / 5
    for masking in ("rate", "count"):
        trainer = make_trainer(tmp_path, rows_of([6]), model=model, masking=masking)
        trainer._train_batch_size = 600
        is_open = (torch.arange(6) > 0).expand(600, 6)
        losses = []
        with torch.no_grad():
            for trainer.state.global_step in range(6):
                masked, weights = trainer.draw(is_open, 0)
                batch = ids.expand(600, 6)
                hidden = batch.masked_fill(masked, MASK)
                output = model(hidden, labels=batch.masked_fill(~masked, -100))
                losses.append((output.token_losses * weights).sum(1) / 5)
        losses = torch.cat(losses)
        # the weights 1/t have a heavy tail, those L/l do not
        assert float(losses.mean()) == pytest.approx(exact, rel=0.15 if masking == "rate" else 0.02)


def test_a_rows_masks_depend_on_neither_ranks_nor_padding(tmp_path):
    trainer = make_trainer(tmp_path, rows_of([9] * 8), low_discrepancy=True, seed=5)
    trainer.state.global_step = 3
    is_open = torch.ones(4, 9).bool() & (torch.arange(9) > 0)
    trainer._train_batch_size, trainer.args.gradient_accumulation_steps = 4, 1
    whole = trainer.draw(is_open, 0)
    trainer._train_batch_size, trainer.args.gradient_accumulation_steps = 2, 2
    halves = [trainer.draw(is_open[:2], micro_batch) for micro_batch in (0, 1)]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))
    padded = trainer.draw(nn.functional.pad(is_open[:2], (3, 4)), 1)
    assert torch.equal(padded[0][:, 3:-4], halves[1][0]) and not padded[0][:, :3].any() and not padded[0][:, -4:].any()
    rates = 1 / whole[1].flatten()  # one in each quarter of (0, 1]
    assert sorted((rates * 4).ceil().tolist()) == [1, 2, 3, 4]
    trainer.low_discrepancy, drawn = False, []
    for seed, trainer.state.global_step in ((5, 3), (5, 4), (6, 3)):
        trainer.args.seed = seed
        drawn += [trainer.draw(is_open[:2], micro_batch)[1] for micro_batch in (0, 1)]
    assert len(set(torch.cat(drawn).flatten().tolist())) == 12  # seed, step, micro-batch and row each change the draw


def test_attention_opens_step_by_step(tmp_path):
    trainer = make_trainer(tmp_path, rows_of([9, 9]), anneal_steps=4)
    causal, shares = torch.ones(40, 40).tril().bool(), []
    for trainer.state.global_step in range(4):
        visible = trainer.visible_mask(40)
        assert (visible | ~causal).all() and torch.equal(visible, trainer.visible_mask(40))
        shares.append(float(visible[~causal].float().mean()))
    assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75], abs=0.06) and shares[0] == 0.0
    trainer.state.global_step = 4
    assert trainer.visible_mask(40) is None
    trainer.train()  # and it is handed on
    with pytest.raises(ValueError, match="anneal_steps=2 needs an attention implementation that supports any mask"):
        make_trainer(tmp_path, rows_of([9]), model=tiny_diffusion(attn_implementation="flex_attention"), anneal_steps=2)


def test_the_annealed_loss_is_that_of_the_mask(tmp_path):
    model = tiny_diffusion()
    trainer = make_trainer(tmp_path, rows_of([9, 7]), model=model, anneal_steps=4, seed=1)
    trainer._train_batch_size, trainer.state.global_step = 2, 2
    batch = RowCollator(pad_token_id=0)(rows_of([9, 7]))
    with torch.no_grad():
        got = trainer.compute_loss(model, batch, num_items_in_batch=14)
        is_open = batch["labels"] != -100
        masked, weights = trainer.draw(is_open, 0)
        expected = model(
            batch["input_ids"].masked_fill(masked, MASK),
            attention_mask=batch["attention_mask"],
            labels=batch["labels"].masked_fill(~masked, -100),
            loss_weights=weights,
            visible_mask=trainer.visible_mask(9),
            num_items_in_batch=14,
        ).loss
        bidirectional = model(
            batch["input_ids"].masked_fill(masked, MASK),
            attention_mask=batch["attention_mask"],
            labels=batch["labels"].masked_fill(~masked, -100),
            loss_weights=weights,
            num_items_in_batch=14,
        ).loss
    assert torch.equal(got, expected) and (got - bidirectional).abs() > 1e-4


def test_evaluation_is_a_bound_in_nats_per_token(tmp_path):
    rows = rows_of([6, 4, 7, 5, 6])
    model = tiny_diffusion()
    trainer = make_trainer(tmp_path, evaluation=rows, model=model, eval_samples=100)
    state = torch.get_rng_state()
    loss = trainer.evaluate()["eval_loss"]
    assert torch.equal(torch.get_rng_state(), state)
    total = scored = 0
    for row in rows:
        ids, given = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]) == -100
        total -= float(model.exact_bound(ids, given_mask=given))
        scored += int((~given).sum())
    assert loss == pytest.approx(total / scored, rel=0.02)
    few = make_trainer(tmp_path, evaluation=rows, model=model, eval_samples=3).evaluate()["eval_loss"]
    other_batches = make_trainer(tmp_path, evaluation=rows, model=model, eval_samples=3, per_device_eval_batch_size=5)
    assert few == pytest.approx(other_batches.evaluate()["eval_loss"], abs=1e-5) and few != loss
    with pytest.raises(ValueError, match="no token to score"):
        make_trainer(tmp_path, evaluation=[{**row, "labels": [-100] * len(row["labels"])} for row in rows]).evaluate()


def adapt(source, output_dir, *, resume=None, **settings):
    """Six steps on the fixture's text, from the fixture's LLaMA with a mask token of its own."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = MaskedDiffusionLlamaForCausalLM.from_pretrained(source)
    model.set_mask_token(tokenizer)
    data = DataArguments(
        train_file=str(source / "train.txt"),
        validation_file=str(source / "validation.txt"),
        block_size=8,
        cache_dir=str(source / "cache"),
        **settings.pop("data", {}),
    )
    train, evaluation = load_rows(data, tokenizer, seed=0)
    trainer = make_trainer(
        output_dir,
        train,
        evaluation,
        model=model,
        processing_class=tokenizer,
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "eval_on_start": True, "seed": 11, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_training_lowers_the_bound_and_resumes_to_the_same_bits(source, tmp_path):
    unbroken = adapt(source, tmp_path / "unbroken", anneal_steps=2, eval_strategy="steps", eval_steps=6)
    losses = [entry["eval_loss"] for entry in unbroken.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.5
    logged = [entry for entry in unbroken.state.log_history if "loss" in entry]
    assert len(logged) == 6 and all(entry["tokens_per_second"] > 0 and entry["peak_memory_mib"] > 0 for entry in logged)
    settings = {"anneal_steps": 2, "eval_strategy": "steps", "eval_steps": 6}
    resumed = adapt(source, tmp_path / "resumed", resume=str(tmp_path / "unbroken" / "checkpoint-3"), **settings)
    assert resumed.state.global_step == 6
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    model = MaskedDiffusionLlamaForCausalLM.from_pretrained(tmp_path / "unbroken" / "checkpoint-6")
    assert model.config.mask_token_id == 61 and model.config.vocab_size == 62


def test_isolated_documents_are_trained_apart(source, tmp_path):
    trainer = adapt(source, tmp_path, data={"documents": "isolated"}, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "document_ids" in batch
    trainer.state.global_step, trainer._micro_batch = 0, 0
    trainer.model.eval()
    with torch.no_grad():
        batch["document_ids"] = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]] * 2) * batch["attention_mask"]
        batch["labels"][:, 4] = -100
        apart = trainer.compute_loss(trainer.model, batch)
        trainer._micro_batch = 0
        joined = trainer.compute_loss(
            trainer.model, {name: value for name, value in batch.items() if name != "document_ids"}
        )
    assert (apart - joined).abs() > 1e-4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = tiny_diffusion()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    trainer = make_trainer(tmp_path, rows_of([9, 6, 8, 5]), model=model)
    with pytest.raises(NonFiniteLossError, match="step 1: the loss is not finite"):
        trainer.train()


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "groupwise"}, "strategy='groupwise': masked diffusion expects 'dynamic'"),
        ({"use_cache": True}, "use_cache=True: expected False"),
        ({"steps": 0}, "steps=0: expected a whole number of at least 1"),
        ({"steps": 2, "tokens_per_step": 2}, "steps=2 and tokens_per_step=2 exclude each other"),
        ({"steps": 2, "threshold": 0.5}, "steps=2 and threshold=0.5 exclude each other"),
        ({"group_size": 2}, "group_size=2 has no effect with strategy='dynamic'"),
        ({"criterion": "surest"}, "criterion='surest': expected one of"),
        ({"blank_mask": torch.zeros(1, 6).bool()}, "no blank to fill"),
        ({"blank_mask": torch.tensor([[1, 0, 0, 0, 0, 0]]).bool()}, "input_ids: row 0 starts with a blank"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1]])}, "blank_mask is True at padding"),
        ({"input_ids": torch.tensor([[1, 5, MASK, 5, 5, 5]])}, "holds the mask token, 60, as text at row 0, column 2"),
        ({"max_new_tokens": 200}, "take 206 positions, 78 more than the model's context"),
        ({"past_key_values": None}, "past_key_values=None is not an option"),
    ],
)
def test_generation_refuses(model, settings, message):
    blanks = torch.tensor([[0, 1, 0, 0, 0, 1]]).bool()
    with pytest.raises(ValueError, match=message):
        model.generate_any_order(**{"input_ids": tokens(1, 6), "blank_mask": blanks, **settings})


@pytest.mark.parametrize(
    ("blank", "message"),
    [
        ([1, 0, 0, 0, 0, 0], "input_ids: row 1 starts with a blank"),
        ([1] * 6, "input_ids: row 1 has no given token"),
    ],
)
def test_messages_count_the_rows_that_were_given_and_not_their_copies(model, blank, message):
    blanks = torch.tensor([[0, 1, 0, 0, 0, 1], blank]).bool()
    with pytest.raises(ValueError, match=message):
        model.generate_any_order(tokens(2, 6), blanks, num_return_sequences=2, do_sample=True)


def test_generate_points_to_the_method_that_works(model):
    with pytest.raises(ValueError, match="Use generate_any_order"):
        model.generate(tokens(1, 6), max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: expected a whole number of at least 1"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        (
            {"given_mask": torch.zeros(1, 6).bool()},
            "the first token of row 0 is open, but nothing predicts it",
        ),
        ({"given_mask": torch.zeros(1, 5).bool()}, "given_mask has shape"),
        ({"attention_mask": torch.zeros(2, 6).bool()}, "attention_mask has shape"),
        ({"input_ids": torch.tensor([[1, 2, 3, 4, MASK, 5]])}, "holds the mask token, 60, as text at row 0, column 4"),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids has shape"),
    ],
)
def test_the_bound_refuses(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.log_likelihood_bound(**{"input_ids": tokens(1, 6), **settings})
    if "num_samples" not in settings:
        with pytest.raises(ValueError, match=message):
            model.exact_bound(**{"input_ids": tokens(1, 6), **settings})


def test_other_likelihoods_refuse(model):
    with pytest.raises(
        ValueError, match="input_ids: row 0 has 13 open tokens, .* at most 12. Use log_likelihood_bound"
    ):
        model.exact_bound(tokens(1, 14))
    ids, groups = tokens(1, 4), torch.arange(4)[None]
    with pytest.raises(ValueError, match="first token of row .* is open"):
        model.log_likelihood(ids, groups.flip(1))
    with pytest.raises(ValueError, match=r"group_ids has dtype torch.float32: expected integers"):
        model.log_likelihood(ids, groups.float())
    with pytest.raises(ValueError, match="scored_mask has shape"):
        model.log_likelihood(ids, groups, scored_mask=torch.ones(1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": True}, "bidirectional and can't cache"),
        ({"past_key_values": ()}, "bidirectional and can't cache"),
        ({"labels": torch.full((1, 6), 5)}, "labels holds a token at row 0, column 0"),
        (
            {"labels": torch.full((1, 6), 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
            "labels holds a token at row 0, column 0",
        ),
        (
            {
                "labels": torch.tensor([[-100, 5, 5, 5, -100, -100]]),
                "document_ids": torch.tensor([[1, 1, 1, 2, 2, 2]]),
            },
            "labels holds a token at row 0, column 3",
        ),
        ({"labels": torch.full((1, 5), 5)}, "labels has shape"),
        ({"loss_weights": torch.ones(1, 6)}, "loss_weights needs labels"),
        ({"labels": torch.full((1, 6), -100), "loss_weights": torch.ones(1, 3)}, "loss_weights has shape"),
        (
            {"labels": torch.full((1, 6), -100), "target_columns": torch.ones(1, 1).long()},
            "labels and target_columns exclude each other",
        ),
        ({"input_ids": None}, "expected exactly one of input_ids and inputs_embeds"),
    ],
)
def test_forward_refuses(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": tokens(1, 6), **settings})


def test_other_attention_refuses_documents(model):
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention': document_ids and visible_mask expect"):
        model(tokens(1, 6), document_ids=torch.ones(1, 6).long())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "all"}, "masking='all': expected one of rate, count"),
        ({"anneal_steps": -1}, "anneal_steps=-1: expected at least 0"),
        ({"eval_samples": 0}, "eval_samples=0: expected at least 1"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False: expected"),
    ],
)
def test_the_trainer_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows_of([6]), **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [9, -100, 6]}, "row 0 of the batch scores its first token, which nothing predicts"),
        ({"labels": [9, 5, 6]}, "row 0 of the batch has no given token"),
        ({"attention_mask": [1, 1, 0]}, "row 0 of the batch has labels at padding"),
        ({"input_ids": [1, MASK, 6]}, "holds the mask token, 60, as text at row 0, column 1"),
    ],
)
def test_training_refuses_rows(tmp_path, row, message):
    trainer = make_trainer(tmp_path, rows_of([6]))
    batch = {"input_ids": [1, 5, 6], "attention_mask": [1, 1, 1], "labels": [-100, 5, 6], **row}
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(trainer.model, {name: torch.tensor([values]) for name, values in batch.items()})
