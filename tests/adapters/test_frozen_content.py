"""Training passes whose content rows have no gradient, against the one pass over all rows: values and gradients."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.models.a3_llama import frozen_content
from a3_hf.models.a3_llama.attention_masks import (
    content_attention_mask,
    group_attention_mask,
    groups_of,
    singleton_attention_mask,
    slots_attention_mask,
)
from tests.conftest import tiny_model

GROUPS = torch.tensor([[0, 2, 1, 1, 3, 2, 4, 4, 3], [0, 1, 1, 2, 2, 3, 3, 4, 4]])
IDS = torch.randint(3, 61, GROUPS.shape, generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(GROUPS == 0, -100)
MASK = torch.tensor([[1] * 9, [0] + [1] * 8])
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
POSITIONS = torch.arange(9).expand(2, -1)
PASSES = {
    "groups": {"group_ids": GROUPS, "labels": LABELS},
    "padding": {
        "group_ids": GROUPS,
        "attention_mask": MASK,
        "labels": LABELS.masked_fill(GROUPS < 2, -100),
    },
    "documents": {
        "group_ids": GROUPS,
        "document_ids": DOCUMENTS,
        "labels": LABELS.masked_fill((DOCUMENTS == 1) & (GROUPS < 3), -100),
    },
    "few slots": {
        "group_ids": GROUPS,
        "target_position_ids": POSITIONS[:, 3:6],
        "target_group_ids": GROUPS[:, 3:6],
        "labels": LABELS[:, 3:6],
    },
    "left to right": {"labels": IDS},
    "left to right, padding": {"attention_mask": MASK.flip(1), "labels": IDS.masked_fill(MASK.flip(1) == 0, -100)},
    "content logits": {
        "group_ids": GROUPS,
        "labels": LABELS,
        "content_logits_at": (torch.tensor([0, 1]), torch.tensor([8, 7])),
    },
    "chunked": {"group_ids": GROUPS, "labels": LABELS, "chunked_loss": True},
}


def adapted(**settings):
    """A model in float64 with adapters of slots that are not what they were at the start."""
    model = attach(tiny_model(**settings), LoraArguments(r=4, rows="slots")).double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    return model


def values_and_gradients(model, arguments, monkeypatch, *, frozen: bool):
    """The loss, logits and gradients of a pass, and how often layers ran content rows on their own."""
    passes = []
    run = frozen_content.run_on_frozen_content
    monkeypatch.setattr(
        "a3_hf.models.a3_llama.modeling_a3_llama.run_on_frozen_content",
        lambda *given, **words: passes.append(1) or run(*given, **words),
    )
    model.get_base_model().model.content_is_frozen = frozen
    model.zero_grad()
    output = model(IDS, **arguments)
    output.loss.backward()
    learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    learned["loss"] = output.loss.detach()
    for name in ("logits", "content_logits", "token_losses"):
        if output.get(name) is not None:
            learned[name] = output[name].detach()
    return learned, len(passes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slot_start", ["left_token", "query_embed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PASSES)
def test_values_and_gradients_are_those_of_one_pass(name, implementation, slot_start, checkpointing, monkeypatch):
    model = adapted(attn_implementation=implementation, slot_start=slot_start)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    expected, none = values_and_gradients(model, PASSES[name], monkeypatch, frozen=False)
    got, one = values_and_gradients(model, PASSES[name], monkeypatch, frozen=True)
    assert (none, one) == (0, 1) and got.keys() == expected.keys()
    assert any(".lora_A." in key for key in got)
    for key, value in expected.items():
        assert torch.allclose(got[key], value, atol=1e-5, rtol=1e-5), key


def test_prepared_masks(monkeypatch):
    model = adapted(slot_start="left_token")
    masks = singleton_attention_mask("sdpa", 9, IDS.device)
    ids = {"position_ids": POSITIONS, "target_position_ids": POSITIONS + 1, "target_input_ids": IDS}
    arguments = {**ids, "attention_mask": masks, "labels": IDS}
    expected, _ = values_and_gradients(model, arguments, monkeypatch, frozen=False)
    got, passes = values_and_gradients(model, arguments, monkeypatch, frozen=True)
    assert passes == 1
    for key, value in expected.items():
        assert torch.allclose(got[key], value, atol=1e-5, rtol=1e-5), key


def test_masks_of_flex_attention_are_cut_at_the_first_slot():
    """(torch has no backward of flex attention on a CPU, so that the masks alone are compared.)"""
    content, slots = groups_of(GROUPS, GROUPS[:, 2:])
    (whole,) = group_attention_mask("sdpa", content, slots)
    for number, cut in enumerate((content_attention_mask, slots_attention_mask)):
        (part,) = cut(group_attention_mask("flex_attention", content, slots), 9)
        rows = (9, 7)[number]
        dense = create_mask(part.mask.mask_mod, 2, 1, rows, 9, device="cpu")
        assert torch.equal(dense, whole.mask[:, :, :9] if number == 0 else whole.mask[:, :, 9:])


@pytest.mark.parametrize("learns", ["embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "norm of a layer"])
def test_where_content_learns_it_has_its_gradients(learns, monkeypatch):
    model = adapted()
    body = model.get_base_model().model
    name = {"norm of a layer": "layers.1.input_layernorm.weight"}.get(learns, learns)
    parameter = body.get_parameter(name)
    parameter.requires_grad_(True)
    got, passes = values_and_gradients(model, PASSES["groups"], monkeypatch, frozen=True)
    assert passes == 0 and any(key.endswith(name) and value.abs().sum() > 0 for key, value in got.items())


def test_given_embeddings_that_learn_have_their_gradients(monkeypatch):
    model = adapted()
    embeds = model.get_base_model().model.embed_tokens(IDS).detach().requires_grad_(True)
    loss = model(inputs_embeds=embeds, group_ids=GROUPS, labels=LABELS).loss
    loss.backward()
    assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_layers_that_are_shown_hold_all_rows(asked):
    model = adapted(attn_implementation="eager")
    output = model(IDS, group_ids=GROUPS, labels=LABELS, **{asked: True})
    shown = output.hidden_states if asked == "output_hidden_states" else output.attentions
    assert len(shown) == 3 + (asked == "output_hidden_states") and shown[0].shape[-2] == 18
