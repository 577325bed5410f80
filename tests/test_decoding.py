import pytest
import torch

from a3_hf.decoding import choose_tokens, commit_scores, slots_to_commit


def test_draws_follow_the_distribution_and_never_leave_its_support():
    scores = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    tokens = choose_tokens(scores.expand(20_000, -1), uniform)
    share = torch.bincount(tokens, minlength=5) / 20_000
    assert torch.allclose(share, scores.softmax(-1), atol=1e-3)
    extremes = torch.tensor([0.0, 1 - 2**-24])
    assert choose_tokens(scores.expand(2, -1), extremes).tolist() == [0, 3]
    assert choose_tokens(torch.tensor([-torch.inf, 0.0, -torch.inf]), torch.tensor(0.0)).item() == 1


def test_greedy_takes_the_likeliest():
    assert choose_tokens(torch.tensor([[0.0, 3.0, 1.0]]), None).tolist() == [1]


def test_criteria_against_their_definition():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    for row in range(2):
        for slot in range(5):
            p = sorted(probs[row, slot].tolist())
            entropy = -sum(q * torch.tensor(q).log().item() for q in p)
            expected = {"confidence": torch.tensor(p[-1]).log().item(), "entropy": -entropy, "margin": p[-1] - p[-2]}
            for criterion, value in expected.items():
                assert commit_scores(logits, criterion)[row, slot].item() == pytest.approx(value, abs=1e-5)
    noise = torch.rand(2, 5)
    assert commit_scores(logits, "random", noise) is noise


def test_entropy_of_excluded_tokens_is_finite():
    assert commit_scores(torch.tensor([[[0.0, -torch.inf]]]), "entropy").tolist() == [[0.0]]


def test_slots_to_commit_takes_the_best_open_ones():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.2, 0.1, 0.0]])
    is_open = torch.tensor([[True, True, True, True], [False, True, True, False]])
    chosen = slots_to_commit(scores, is_open, tokens_per_step=1)
    assert chosen.tolist() == [[False, True, False, False], [False, True, False, False]]
    chosen = slots_to_commit(scores, is_open, tokens_per_step=3)
    assert chosen.tolist() == [[False, True, True, True], [False, True, True, False]]


def test_slots_above_the_threshold_are_committed_and_the_best_always():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.3, 0.2, 0.1]])
    is_open = torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    chosen = slots_to_commit(scores, is_open, confidence=scores, threshold=0.4)
    assert chosen.tolist() == [[False, True, True], [True, False, False], [False] * 3]
