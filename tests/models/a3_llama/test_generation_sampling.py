import pytest
import torch

from a3_hf.models.a3_llama.generation_sampling import (
    accept_drafts,
    choose_tokens,
    commit_scores,
    ngram_draft,
    slots_to_commit,
    uniform_noise,
)


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


def test_the_entropy_budget_is_spent_on_the_best_and_one_always_goes():
    entropy = torch.tensor([[0.5, 0.2, 0.4, 0.1], [3.0, 2.0, 9.0, 9.0]])
    is_open = torch.tensor([[True, True, True, False], [True, True, True, True]])
    chosen = slots_to_commit(-entropy, is_open, entropy=entropy, entropy_budget=0.6)
    assert chosen.tolist() == [[False, True, True, False], [False, True, False, False]]


def test_noise_is_uniform_and_knows_its_coordinates_alone():
    seeds, places = torch.arange(50), torch.arange(1, 41).expand(50, -1)
    noise = torch.stack([uniform_noise(seeds, places, step, purpose) for step in range(5) for purpose in range(2)])
    assert noise.min() >= 0 and noise.max() < 1
    counts = torch.histc(noise, bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # χ² with 19 degrees of freedom, p = 0.001
    flat = noise.flatten()
    assert len(flat.unique()) == flat.numel()
    for other in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):  # step and purpose, row, place
        assert torch.corrcoef(torch.stack([flat, other.flatten()]))[0, 1].abs() < 0.03
    alone = uniform_noise(seeds[7:8], places[7:8, 3:5], 2, 1)
    assert torch.equal(alone[0], noise[5, 7, 3:5])


@pytest.mark.parametrize("certain", [False, True])
def test_what_stands_follows_the_target_exactly(certain):
    """The accept rule, integrated: over a fine grid of both noises and all drafts, the token that comes out follows q."""
    q = torch.tensor([0.5, 0.2, 0.3, 0.0])
    p = torch.tensor([0.0, 0.0, 1.0, 0.0]) if certain else torch.tensor([0.1, 0.5, 0.3, 0.1])
    grid = (torch.arange(200) + 0.5) / 200
    accept, residual = (noise.flatten()[:, None] for noise in torch.meshgrid(grid, grid, indexing="ij"))
    out = torch.zeros(4)
    for token in p.nonzero().flatten().tolist():
        tokens = torch.full_like(accept, token, dtype=torch.long)
        rows = len(tokens)
        stands, replacement = accept_drafts(
            q.log().expand(rows, 1, -1),
            None if certain else p.log().expand(rows, 1, -1),
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            accept,
            residual,
        )
        final = torch.where(stands == 1, tokens[:, 0], replacement)
        out += p[token] * torch.bincount(final, minlength=4) / rows
    assert torch.allclose(out, q, atol=0.01)


def test_drafts_stand_up_to_the_first_that_falls():
    target = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), 5).float() * 9
    tokens = torch.tensor([[1, 0, 3], [1, 2, 3], [0, 0, 0]])
    is_draft = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    stands, replacement = accept_drafts(target, None, tokens, is_draft, None, None)
    assert stands.tolist() == [1, 2, 0] and replacement[0] == 2


def test_an_ngram_draft_is_what_followed_the_same_words():
    tokens = torch.tensor([[7, 8, 9, 5, 8, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]])
    known = torch.ones_like(tokens, dtype=torch.bool)
    known[:, 8:] = False
    # row 0: after "7 8" came 9, though after "8" alone 6 came later; row 1: nothing precedes
    drafts, matched = ngram_draft(tokens, known, torch.tensor([8, 8]))
    assert drafts[0] == 9 and matched.tolist() == [2, 0]
    known[0, 0] = False
    drafts, matched = ngram_draft(tokens, known, torch.tensor([8, 8]))
    assert drafts[0] == 6 and matched.tolist() == [1, 0]
