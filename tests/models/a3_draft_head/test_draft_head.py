"""Draft heads against slow forms of the same: a slot at a time through LLaMA's own modules, and every path of a tree.

fp64, so that rounding is far below the tolerance and any true effect.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from a3_hf.models.a3_draft_head import drafter as drafter_module
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.drafter import Drafter, attach_draft_head
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import ADAPTER_SCALE, WEIGHT_OF_FURTHER, DraftHead
from a3_hf.models.a3_llama.generation_trees import DraftTree, Pace
from tests.conftest import tiny_model

SHAPE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "initializer_range": 0.8,
    "slot_start": "left_token",
}
TOLERANCE = 1e-6  # LLaMA norms in fp32
EOS = torch.tensor([3])


def base_and_head(**settings):
    base = tiny_model(**SHAPE).double().eval().requires_grad_(False)
    sizes = {"num_drafts": 3, "first_layer": 2, "rank": 3, "sampler_size": 7, "num_candidates": 11, **settings}
    torch.manual_seed(3)
    head = DraftHead(DraftHeadConfig.for_base(base.config, **sizes)).double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    head.candidates.copy_(torch.randperm(13)[: len(head.candidates)].sort().values)
    return base, head.attach_to(base)


def normed(vector: torch.Tensor) -> torch.Tensor:
    return vector / (vector.pow(2).mean() + torch.finfo(vector.dtype).eps).sqrt()


def slow_states(head: DraftHead, base, ids: torch.Tensor, next_id: int) -> list[torch.Tensor]:
    """The states (D,) of the slots behind a text (C,), by LLaMA's own modules."""
    config, adapters = base.config, dict(head.named_parameters())
    output = base(ids[None], use_cache=True, kept_layer=head.config.first_layer)
    embedding = base.model.embed_tokens.weight

    def adapted(layer: int, name: str, weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        if not head.config.rank:
            return weight @ row
        up, down = (adapters[f"adapters.{layer}.{name}.{kind}"] for kind in ("up", "down"))
        return (weight + ADAPTER_SCALE * up @ down) @ row

    results = []
    for distance in range(head.config.num_drafts):
        row = head.from_state @ normed(output.kept_hidden_state[0, -1])
        row = row + head.from_token @ normed(embedding[next_id]) + head.start[distance]
        rope = base.model.rotary_emb(row[None, None], position_ids=torch.tensor([[len(ids) + distance]]))
        for index in range(head.config.first_layer, config.num_hidden_layers):
            layer, cached = base.model.layers[index], output.cache.layers[index]
            attention, mlp = layer.self_attn, layer.mlp
            query = adapted(index, "q", attention.q_proj.weight, layer.input_layernorm(row))
            query = query.view(1, config.num_attention_heads, 1, -1)
            query, _ = apply_rotary_pos_emb(query, query, *rope)
            keys, values = (
                repeat_kv(states, attention.num_key_value_groups) for states in (cached.keys, cached.values)
            )
            weights = (query @ keys.transpose(2, 3) * attention.scaling).softmax(dim=-1)
            row = row + adapted(index, "o", attention.o_proj.weight, (weights @ values).flatten())
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            gate, up = adapted(index, "gate_up", both, layer.post_attention_layernorm(row)).chunk(2)
            row = row + adapted(index, "down", mlp.down_proj.weight, mlp.act_fn(gate) * up)
        results.append(base.model.norm(row))
    return results


def slow_log_probs(head: DraftHead, base, state: torch.Tensor, distance: int, previous: int) -> torch.Tensor:
    if distance and len(head.samplers):
        sampler = head.samplers[distance - 1]
        told = torch.cat([state, normed(base.model.embed_tokens.weight[previous])])
        state = state + sampler.up @ F.silu(sampler.down @ told)
    return (base.lm_head.weight[head.candidates.long()] @ state).log_softmax(dim=-1)


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"sampler_size": 0}, {"first_layer": 4}, {"first_layer": 0}])
def test_the_loss_and_its_gradients_are_those_of_one_slot_at_a_time(settings):
    base, head = base_and_head(**settings)
    ids = torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4], labels[1, :6], labels[1, 8:], labels[2, 5:] = -100, -100, -100, -100
    output = head(ids, labels)
    output.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in head.named_parameters() if parameter.grad is not None
    }
    head.zero_grad()

    numbers = {token: number for number, token in enumerate(head.candidates.tolist())}
    losses = [[] for _ in range(3)]
    for row, targets in zip(ids, labels.tolist(), strict=True):
        for last in range(len(row) - 2):
            states = slow_states(head, base, row[: last + 1], int(row[last + 1]))
            for distance in range(3):
                goal = last + 2 + distance
                if goal < len(row) and targets[goal] in numbers:
                    log_probs = slow_log_probs(head, base, states[distance], distance, int(row[goal - 1]))
                    losses[distance].append(-log_probs[numbers[targets[goal]]])
    assert [len(one) for one in losses] == output.num_scored.tolist() and min(map(len, losses)) > 2
    loss = sum(WEIGHT_OF_FURTHER**distance * sum(one) for distance, one in enumerate(losses)) / len(losses[0])
    loss.backward()
    assert abs(loss - output.loss) < TOLERANCE
    for distance, one in enumerate(losses):
        assert abs(torch.stack(one).mean() - output.losses[distance]) < TOLERANCE
    for name, gradient in gradients.items():
        assert (dict(head.named_parameters())[name].grad - gradient).abs().max() < TOLERANCE, name
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


@pytest.mark.parametrize(("width", "most_nodes", "least"), [(1, 8, 0.0), (3, 6, 0.0), (2, 20, 0.0), (4, 8, 0.05)])
def test_a_tree_holds_the_likeliest_paths(width, most_nodes, least, monkeypatch):
    """Of two texts of different lengths in one batch, padded on the left, compared with all paths of each alone."""
    monkeypatch.setattr(drafter_module, "LEAST_PROBABILITY", least)
    base, head = base_and_head()
    drafter = Drafter(head.eval()).ready()
    texts = [torch.tensor([1, 4, 2, 7, 3]), torch.tensor([6, 2, 9])]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    batch = torch.stack([texts[0], F.pad(texts[1], (2, 0))])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    output = base(batch, attention_mask=mask, position_ids=positions, use_cache=True, kept_layer=2)
    tree = drafter.propose(
        output.kept_hidden_state[:, -1],
        torch.tensor([8, 10]),
        torch.tensor([5, 3]),
        output.cache,
        mask.bool(),
        most_nodes=most_nodes,
        width=width,
        deepest=torch.tensor([3, 2]),
        never=EOS,
    )
    for row, (text, next_id, deepest) in enumerate(zip(texts, (8, 10), (3, 2), strict=True)):
        states = slow_states(head, base, text, next_id)
        paths, level = {}, {(): 1.0}
        for distance in range(deepest):
            longer = {}
            for path, probability in level.items():
                log_probs = slow_log_probs(head, base, states[distance], distance, path[-1] if path else next_id)
                likely, choice = log_probs.exp().topk(min(width, 11))
                for one, number in zip(likely.tolist(), choice.tolist(), strict=True):
                    token = int(head.candidates[number])
                    if token != EOS and one * probability > least:
                        longer[(*path, token)] = one * probability
            level = dict(sorted(longer.items(), key=lambda item: -item[1])[:most_nodes])
            paths |= level
        wanted = set(sorted(paths, key=paths.get, reverse=True)[:most_nodes])
        found, all_paths = set(), []
        for token, parent, is_node in zip(tree.tokens[row], tree.parents[row], tree.is_node[row], strict=True):
            before = all_paths[parent] if parent >= 0 else ()
            all_paths.append((*before, int(token)))
            if is_node:
                found.add(all_paths[-1])
        assert found == wanted and len(found) > 1


def random_tree(num_nodes: int, seed: int) -> DraftTree:
    draw = torch.Generator().manual_seed(seed)
    parents = torch.stack([torch.randint(-1, node, (2,), generator=draw) for node in range(num_nodes)], dim=1)
    tokens = torch.arange(num_nodes).expand(2, -1)  # no two children of a node share a token
    is_node = torch.tensor([[True] * num_nodes, [True] * (num_nodes - 2) + [False] * 2])
    return DraftTree(tokens, parents, is_node)


def test_guesses_in_eight_bits_are_nearly_the_same():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    exact = rows @ weight.T
    error = (drafter_module.in_eight_bits(weight)(rows) - exact).std() / exact.std()
    assert error < 0.05

    def fails(*_):
        raise RuntimeError("no kernels")

    # In a torch without the operators, or built without their kernels, products are plain.
    for absent in (SimpleNamespace(), SimpleNamespace(linear_dynamic=None, linear_prepack=fails)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops, "quantized", absent)
            assert torch.equal(drafter_module.in_eight_bits(weight)(rows), F.linear(rows, weight))


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 0.6), True), ((1.0, 0.3), False)])
def test_a_batch_keeps_to_what_is_faster(seconds, faster):
    """Two tokens a pass with drafts and one without, at these costs of a pass; then the costs change places."""
    now = 0.0
    pace = Pace(lambda: now)
    taken = []
    for number in range(400):
        with_drafts = pace.drafts
        cost = seconds[0] if with_drafts else seconds[1]
        if number >= 200:
            cost = 1.0 if with_drafts is faster else 0.1  # the other one is faster from here
        taken.append(with_drafts)
        now += cost
        pace.after_pass(2 if with_drafts else 1)
    assert taken[:4] == [True] * 4 and taken[4:8] == [False] * 4
    assert taken[8:200].count(faster) > 170
    assert taken[300:].count(not faster) > 85


@pytest.mark.parametrize("seed", range(5))
def test_ancestry_and_walk_follow_parents(seed):
    tree = random_tree(7, seed)
    ancestry = tree.ancestry()
    for row, node in itertools.product(range(2), range(7)):
        above, one = {node}, node
        while (one := int(tree.parents[row, one])) >= 0:
            above.add(one)
        assert set(ancestry[row, node].nonzero().flatten().tolist()) == above
    chosen = torch.randint(0, 9, (2, 8), generator=torch.Generator().manual_seed(seed + 100))
    chosen[:, 0] = 0  # both texts go to node 0
    rows, tokens, written = tree.walk(chosen)
    for row in range(2):
        at, path = 0, []
        while True:
            token = int(chosen[row, at])
            path.append((at, token))
            is_child = token < 7 and tree.is_node[row, token] and tree.parents[row, token] + 1 == at
            if not is_child:
                break
            at = token + 1
        count = int(written[row].sum())
        assert list(zip(rows[row, :count].tolist(), tokens[row, :count].tolist(), strict=True)) == path
    assert written.sum() > 2


def test_a_trained_head_saves_passes_and_not_a_token():
    """On the text that its base writes, learnt by heart; stored and loaded."""
    base, _ = base_and_head()
    prompt = torch.tensor([[1, 4, 2]])
    settings = {"max_new_tokens": 40, "eos_token_id": []}
    wanted = base.generate_any_order(prompt, **settings)
    torch.manual_seed(0)
    head = (
        DraftHead(DraftHeadConfig.for_base(base.config, first_layer=2, rank=4, sampler_size=16))
        .double()
        .attach_to(base)
    )
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        head(wanted.sequences, wanted.sequences).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attach_draft_head(base, head)
    for draft in ("head", "ngram+head"):
        output = base.generate_any_order(prompt, strategy="speculative", draft=draft, verify="content", **settings)
        assert torch.equal(output.sequences, wanted.sequences)
        assert output.num_forward_passes < 20
    default = base.generate_any_order(prompt, strategy="speculative", **settings)
    assert default.num_forward_passes == output.num_forward_passes
    chain = base.generate_any_order(
        prompt, strategy="speculative", draft_width=1, draft="head", verify="content", **settings
    )
    assert torch.equal(chain.sequences, wanted.sequences) and 10 <= chain.num_forward_passes < 20


def test_a_head_is_stored_without_its_base_and_follows_its_dtype(tmp_path):
    base, head = base_and_head()
    head.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 60_000
    loaded = DraftHead.from_pretrained(tmp_path, dtype=torch.float64)
    ours, theirs = head.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    attach_draft_head(base, str(tmp_path))
    assert not [name for name, _ in base.named_parameters() if "draft" in name or "sampler" in name]
    prompt = torch.tensor([[1, 4, 2]])
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        text = base.to(dtype).generate_any_order(prompt, max_new_tokens=6, strategy="speculative", eos_token_id=[])
        assert text.sequences.shape == (1, 9) and base.drafter.head.start.dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_drafts": 0}, "num_drafts=0: expected 1 to 16"),
        ({"first_layer": 5}, "first_layer=5: expected 0 to 4"),
        ({"num_candidates": 14}, "num_candidates=14: expected 2 to 13"),
        ({"rank": -1}, "rank=-1: expected 0 to 16"),
        ({"sampler_size": -1}, "sampler_size=-1: expected at least 0"),
    ],
)
def test_sizes_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        base_and_head(**settings)


def test_a_head_of_another_model_is_refused():
    base, head = base_and_head()
    base.config.model_type = "decoupled_rope_llama"
    with pytest.raises(ValueError, match="its base is of type 'decoupled_rope_llama': expected 'a3_llama'"):
        head.attach_to(base)
    with pytest.raises(ValueError, match="its base has num_hidden_layers=3: expected 4"):
        head.attach_to(tiny_model(**{**SHAPE, "num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft": "head"}, "draft='head' with verify=None and use_cache=True: expected verify='content'"),
        (
            {"draft": "ngram+head", "verify": "content", "use_cache": False},
            "expected verify='content' and use_cache=True",
        ),
        ({"draft": "head", "verify": "content"}, "the model has no draft head; attach_draft_head attaches one"),
        ({"draft": "ngram", "draft_width": 2}, "draft_width=2 has no effect with draft='ngram'"),
        ({"draft_width": 2}, "draft_width=2 has no effect with draft=None"),
    ],
)
def test_options_of_heads_are_checked(settings, message):
    base = tiny_model(**SHAPE)
    with pytest.raises(ValueError, match=message):
        base.generate_any_order(torch.tensor([[1, 4, 2]]), max_new_tokens=4, strategy="speculative", **settings)


def test_a_head_serves_by_default_only_where_it_can():
    """Other calls of a model with a head are those of the same model without one."""
    base, head = base_and_head()
    blank = torch.tensor([[False, False, False, True, True, False]])
    ids = torch.tensor([[1, 4, 2, 0, 0, 7]])
    cache = base.generate_any_order(ids[:, :3], max_new_tokens=2, eos_token_id=[]).cache
    calls = [
        (ids, {"blank_mask": blank}),
        (ids[:, :3], {"max_new_tokens": 6, "order": "right_to_left"}),
        (ids[:, :3], {"max_new_tokens": 6, "order": "random", "seed": 1}),
        (ids[:, :3], {"max_new_tokens": 6, "order": torch.tensor([[0, 1, 2, 8, 7, 6, 5, 4, 3]])}),
        (ids[:, :3], {"max_new_tokens": 6, "use_cache": False}),
        (ids[:, :3], {"max_new_tokens": 6, "past_key_values": cache}),
    ]
    settings = {"strategy": "speculative", "eos_token_id": []}
    without = [base.generate_any_order(given, **settings, **call) for given, call in calls]
    attach_draft_head(base, head)
    for (given, call), wanted in zip(calls, without, strict=True):
        output = base.generate_any_order(given, **settings, **call)
        assert torch.equal(output.sequences, wanted.sequences) and torch.equal(output.group_ids, wanted.group_ids)
        assert output.num_forward_passes == wanted.num_forward_passes
        assert (output.log_probs - wanted.log_probs).abs().max() < TOLERANCE
