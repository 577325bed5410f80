import itertools

import pytest
import torch

from a3_hf.models.a3_llama.likelihood import token_log_probs
from tests.conftest import tiny_model
from tests.models.a3_llama.test_orders import generators, ragged_mask


@pytest.mark.parametrize("seed", range(6))
def test_probabilities_of_all_texts_sum_to_one(seed):
    """The chain rule on a toy vocabulary: Σ_x p(x) = 1 over every text, under a random grouping."""
    model = tiny_model(vocab_size=4)
    texts = torch.tensor(list(itertools.product(range(4), repeat=5)))
    texts = torch.cat([torch.ones(len(texts), 1, dtype=torch.long), texts], dim=1)
    groups = torch.randint(1, 2 + seed, (5,), generator=torch.Generator().manual_seed(seed))
    groups = torch.cat([torch.zeros(1, dtype=torch.long), groups]).expand(len(texts), -1)
    total = model.log_likelihood(texts, groups).double().sum(1).exp().sum()
    assert abs(total.item() - 1) < 1e-5


def test_it_is_the_sum_over_single_passes(model):
    ids = torch.randint(3, 61, (2, 12), generator=generators(1)[0])
    mask = ragged_mask([12, 7], 12, "left").long()
    groups = torch.randint(0, 5, (2, 12), generator=generators(1)[0])
    result = model.log_likelihood(ids, groups, mask)
    for row in range(2):
        lowest = groups[row][mask[row].bool()].min()
        for i in range(12):
            if mask[row, i] == 0 or groups[row, i] == lowest:
                assert result[row, i] == 0
                continue
            known = mask[row].bool() & (groups[row] < groups[row, i])
            places = mask[row].cumsum(0) - 1
            with torch.no_grad():
                logits = model(
                    ids[row, known][None],
                    position_ids=places[known][None],
                    group_ids=groups[row, known][None],
                    target_position_ids=places[i].view(1, 1),
                    target_group_ids=groups[row, i].view(1, 1),
                ).logits[0, 0]
            assert result[row, i].item() == pytest.approx(logits.log_softmax(-1)[ids[row, i]].item(), abs=1e-5)


def test_chunks_of_slots_change_nothing(model, monkeypatch):
    ids = torch.randint(3, 61, (2, 12), generator=generators(1)[0])
    groups = torch.arange(12).expand(2, -1)
    whole = model.log_likelihood(ids, groups)
    monkeypatch.setattr("a3_hf.models.a3_llama.likelihood.SLOTS_PER_CHUNK", 5)
    assert (model.log_likelihood(ids, groups) - whole).abs().max() < 1e-6


def test_scoring_some_tokens_is_scoring_all_and_looking_at_some(model):
    ids = torch.randint(3, 61, (3, 12), generator=generators(1)[0])
    mask = ragged_mask([12, 7, 9], 12, "left").long()
    groups = torch.randint(0, 5, (3, 12), generator=generators(1)[0])
    wanted = torch.rand(3, 12, generator=generators(1)[0]) < 0.3
    wanted[1] = False
    every, greedy = model.log_likelihood_and_greedy(ids, groups, mask)
    some, some_greedy = model.log_likelihood_and_greedy(ids, groups, mask, scored_mask=wanted)
    assert (some - every.masked_fill(~wanted, 0.0)).abs().max() < 1e-5
    assert torch.equal(some_greedy, greedy & wanted) and (some[1] == 0).all()


def test_greedy_says_which_tokens_the_model_would_write(model):
    ids = torch.randint(3, 61, (1, 8), generator=generators(1)[0])
    blanks = torch.arange(8)[None] >= 5
    written = model.generate_any_order(ids, blanks).sequences
    groups = torch.arange(8)[None]
    assert model.log_likelihood_and_greedy(written, groups, scored_mask=blanks)[1].sum() == 3
    written[0, 6] = (written[0, 6] + 1) % 61
    greedy = model.log_likelihood_and_greedy(written, groups)[1][0]
    assert greedy[5] and not greedy[6] and not greedy[0]


def test_token_log_probs_is_log_softmax():
    logits, ids = torch.randn(3, 4, 9), torch.randint(0, 9, (3, 4))
    expected = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    assert torch.allclose(token_log_probs(logits, ids), expected, atol=1e-6)


def test_bad_input(model):
    with pytest.raises(ValueError, match="group_ids has shape"):
        model.log_likelihood(torch.zeros(2, 5).long(), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="group_ids has dtype"):
        model.log_likelihood(torch.zeros(2, 5).long(), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="scored_mask has shape"):
        model.log_likelihood(torch.zeros(2, 5).long(), torch.zeros(2, 5).long(), scored_mask=torch.ones(2, 4).bool())
