"""Documents of one row, each scored as if it stood alone; masks that are kept."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from a3_hf import GroupOrder
from a3_hf.models.a3_llama import attention_masks as masks
from a3_hf.models.a3_llama.attention_masks import (
    MaskCache,
    group_attention_mask,
    groups_of,
    sees_something,
    tree_attention_mask,
)
from a3_hf.models.a3_llama.orders import ContentTokens
from a3_hf.training.model_inputs import model_inputs
from tests.conftest import tiny_model
from tests.models.a3_llama.test_modeling import ROUNDING, flex_uncompiled  # noqa: F401
from tests.models.a3_llama.test_orders import BUILDERS, generators, ragged_mask

LENGTH = 15


def isolated(name: str, side: str = "right"):
    """Tokens, documents and an order of two rows of three documents, whose first tokens (and some others) are given."""
    real = ragged_mask([LENGTH, 11], LENGTH, side)
    ids = torch.randint(3, 61, real.shape, generator=torch.Generator().manual_seed(1))
    place = real.long().cumsum(1) - 1
    documents = (1 + (place >= 4).long() + (place >= 9).long()).masked_fill(~real, 0)
    first = real & ((place == 0) | (place == 4) | (place == 9))
    drawn = BUILDERS[name](real, generators(2))
    # the builders' own orders with the documents' first tokens in front of them all
    groups = (drawn.group_ids + LENGTH).masked_fill(first, 0) + (first.long().cumsum(1) - 1).masked_fill(~first, 0)
    return ids, documents, GroupOrder(groups.masked_fill(~real, -1), real, (drawn.given_mask & real) | first)


def text_order(model, order, ids, documents, inputs_embeds=None):
    content = {"input_ids": ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    mask = order.attention_mask.long()
    return model(
        **content, group_ids=order.group_ids, attention_mask=mask, document_ids=documents, use_cache=False
    ).logits


def generation_order(model, order, ids, documents, inputs_embeds=None):
    layout = order.lay_out(ids, document_ids=documents)
    index = order.generation_order()[..., None]
    fields = {name: field for name, field in layout._asdict().items() if name != "labels"}
    if inputs_embeds is not None:
        fields["inputs_embeds"] = inputs_embeds.gather(1, index.expand_as(inputs_embeds))
        del fields["input_ids"]
    logits = model(**fields, use_cache=False).logits
    return torch.empty_like(logits).scatter(1, index.expand_as(logits), logits)


LAYOUTS = pytest.mark.parametrize("layout", [text_order, generation_order])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize(
    "name, side, implementation",
    [
        *itertools.product(BUILDERS, ["left", "right"], ["sdpa", "eager"]),
        ("scattered", "left", "flex_attention"),  # slow without its kernel: two orders will do
        ("spans", "right", "flex_attention"),
    ],
)
@LAYOUTS
@torch.no_grad()
def test_changing_a_document_changes_no_logit_of_another(layout, name, side, implementation):
    ids, documents, order = isolated(name, side)
    model = tiny_model(attn_implementation=implementation, num_hidden_layers=2)
    before = layout(model, order, ids, documents)
    for document in (1, 2, 3):
        changed = torch.where(documents == document, (ids + 7) % 61, ids)
        moved = (layout(model, order, changed, documents) - before).abs().amax(dim=-1) > ROUNDING
        assert not (moved & (documents != document) & (documents > 0)).any()
        # what is not in its document's first group sees the change
        of_it = documents == document
        lowest = order.group_ids.masked_fill(~of_it, 99).amin(dim=1, keepdim=True)
        assert moved[of_it & (order.group_ids > lowest)].all()


@pytest.mark.parametrize("name", BUILDERS)
@LAYOUTS
def test_no_gradient_crosses_from_one_document_to_another(layout, name):
    ids, documents, order = isolated(name)
    model = tiny_model(num_hidden_layers=2)
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = layout(model, order, ids, documents, embeds)
    for document in (1, 2, 3):
        own = documents == document
        (gradient,) = torch.autograd.grad(
            logits[own & order.scored_mask].logsumexp(-1).sum(), embeds, retain_graph=True
        )
        reached = (gradient != 0).any(dim=-1)
        assert not (reached & ~own).any() and reached[own & order.given_mask].all()


@LAYOUTS
@pytest.mark.parametrize("name", BUILDERS)
def test_a_row_of_documents_is_each_document_alone(layout, name):
    ids, documents, order = isolated(name)
    model, alone = tiny_model(), tiny_model()
    labels = ids.masked_fill(~order.scored_mask, -100)
    loss = cross_entropy(layout(model, order, ids, documents).transpose(1, 2), labels, reduction="sum")
    total = 0.0
    for row in range(2):
        for document in (1, 2, 3):
            own = documents[row] == document
            # its positions start from 0: RoPE knows distances only
            logits = alone(ids[row, own][None], group_ids=order.group_ids[row, own][None], use_cache=False).logits
            total = total + cross_entropy(logits[0], labels[row, own], reduction="sum")
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    loss.backward()
    total.backward()
    for (weight_name, joint), single in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (joint.grad - single.grad).norm() <= 1e-4 * single.grad.norm() + 1e-6, weight_name


@LAYOUTS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_one_document_a_row_is_as_none_bit_for_bit(layout, implementation):
    ids, documents, order = isolated("scattered")
    model = tiny_model(attn_implementation=implementation)
    one = layout(model, order, ids, (documents > 0).long())
    assert torch.equal(one[order.attention_mask], layout(model, order, ids, None)[order.attention_mask])


def test_slots_elsewhere_carry_their_documents(model):
    ids, documents, order = isolated("scattered")
    ids, documents, groups = (tensor[:1] for tensor in (ids, documents, order.group_ids))
    positions = torch.arange(LENGTH)[None]
    asked = torch.tensor([[3, 8, 14]])
    some = model(
        ids,
        position_ids=positions,
        group_ids=groups,
        document_ids=documents,
        target_position_ids=asked,
        target_group_ids=groups.gather(1, asked),
        target_document_ids=documents.gather(1, asked),
    ).logits
    every = model(ids, group_ids=groups, document_ids=documents).logits
    assert (some - every[:, [3, 8, 14]]).abs().max() < 2e-5


def test_sees_something_knows_documents():
    groups, documents = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 1, 3]])
    content = ContentTokens(None, groups, groups, documents)
    seen = sees_something(content, content.slots(), None, 0)
    assert seen.tolist() == [[False, False, True, False]]


DOCUMENTS = torch.tensor([[1, 1, 2, 2]])
GROUPS = torch.arange(4)[None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"document_ids": DOCUMENTS}, "document_ids: expected group_ids"),
        ({"document_ids": DOCUMENTS[:, :3], "group_ids": GROUPS}, "document_ids has shape"),
        ({"document_ids": DOCUMENTS.float(), "group_ids": GROUPS}, "document_ids has dtype torch.float32"),
        ({"target_document_ids": DOCUMENTS, "group_ids": GROUPS}, "needs document_ids"),
        (
            {
                "document_ids": DOCUMENTS,
                "group_ids": GROUPS,
                "target_position_ids": GROUPS,
                "target_group_ids": GROUPS,
            },
            "target_document_ids has shape None",
        ),
        (
            {
                "document_ids": DOCUMENTS,
                "group_ids": GROUPS,
                "attention_mask": group_attention_mask("sdpa", *groups_of(GROUPS, GROUPS)),
            },
            "no prepared masks",
        ),
        (
            {"document_ids": DOCUMENTS, "group_ids": GROUPS, "labels": torch.tensor([[-100, 5, 5, 5]])},
            "row 0, slot 2, which sees no token",
        ),
    ],
)
def test_bad_documents_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, 4, 1, 5]]), **arguments)


# Masks that are kept


@pytest.mark.usefixtures("flex_uncompiled")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_masks_are_made_once_while_groups_stay(implementation, monkeypatch):
    made = []
    monkeypatch.setattr(
        masks, "group_attention_mask", lambda *args, **kwargs: made.append(1) or group_attention_mask(*args, **kwargs)
    )
    kept, model = MaskCache(), tiny_model(attn_implementation=implementation, num_hidden_layers=2)
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    for number, size in ((1, 4), (1, 4), (2, 3), (3, 4), (3, 4)):
        order = GroupOrder.scattered(real, group_size=size, generator=generators(2, seed=len(made)))
        with torch.no_grad():
            inputs = {"group_size": size, "implementation": implementation}
            arguments, num_made = model_inputs(order, ids, **inputs, kept=kept), len(made)
            fast = model(**arguments)
            slow = model(**model_inputs(order, ids, **inputs))
        assert torch.equal(fast.logits, slow.logits) and torch.equal(fast.loss, slow.loss)
        del made[num_made:]  # those that the passes made for themselves
        assert len(made) == number, "a mask is made when the groups change, and only then"


def test_rows_that_differ_share_no_mask():
    kept, groups = MaskCache(), torch.tensor([[0, 1, 1], [0, 1, 2]])
    real = torch.ones_like(groups, dtype=torch.bool)
    assert kept.masks("sdpa", ContentTokens(None, groups, groups), real) is None
    alike = groups[:1].expand(2, -1)
    padded = real & (torch.arange(3) < 2)
    assert kept.masks("sdpa", ContentTokens(None, alike, alike), padded) is None
    assert kept.masks("sdpa", ContentTokens(None, alike, alike), real)[0].mask.shape == (1, 1, 6, 3)


def test_a_trees_mask_is_the_same_for_every_implementation():
    ancestry = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]]).bool()
    key_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    dense = tree_attention_mask("sdpa", ancestry, 5, 7, key_mask)[0].mask
    for text in range(2):
        for row in range(5):
            for key in range(7):
                seen = ancestry[text, row - 2, key - 4] if row >= 2 and key >= 4 else key <= row + 2
                assert dense[text, 0, row, key] == bool(seen and key_mask[text, key])
    flex = tree_attention_mask("flex_attention", ancestry, 5, 7, key_mask)[0].mask
    places = torch.arange(2)[:, None, None], 0, torch.arange(5)[None, :, None], torch.arange(7)[None, None]
    assert torch.equal(flex.mask_mod(*places), dense[:, 0])
    with pytest.raises(ValueError, match="flash_attention_2"):
        tree_attention_mask("flash_attention_2", ancestry, 5, 7, None)
