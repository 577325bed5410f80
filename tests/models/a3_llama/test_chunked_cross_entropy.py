"""The chunked loss against the plain one over all logits: values, gradients, and what exists at one time."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from a3_hf.models.a3_llama.chunked_cross_entropy import chunked_cross_entropy
from a3_hf.models.a3_llama.orders import GroupOrder
from tests.conftest import tiny_model
from tests.models.a3_llama.test_modeling import random_ids

ROWS, HIDDEN, VOCABULARY = 23, 8, 50


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[[0, 3, 4, 22]] = -100
    return hidden_states, head, labels


# Losses are made in float32, and machines differ there by 1e-6; a row or a factor that is lacking changes them by 1e-2.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("rows_at_once", [1, 4, 5, 23, 100, None])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(31)])
def test_values_and_gradients_are_the_plain_losss(rows_at_once, num_items):
    hidden_states, head, labels = problem()
    chunked = chunked_cross_entropy(hidden_states, head, labels, num_items=num_items, rows_at_once=rows_at_once)
    each = cross_entropy(head(hidden_states), labels, reduction="none")
    plain = each.sum() / (19 if num_items is None else num_items)
    torch.testing.assert_close(chunked.loss, plain, **CLOSE)
    torch.testing.assert_close(chunked.token_losses, each.detach(), **CLOSE)
    # times 3: what comes from above, such as a scaler's factor, reaches the gradients
    expected = gradients(3 * plain, hidden_states, head.weight)
    for ours, theirs in zip(gradients(3 * chunked.loss, hidden_states, head.weight), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_only_the_gradients_that_are_asked_for_are_made():
    hidden_states, head, labels = problem()
    expected = gradients(cross_entropy(head(hidden_states), labels), hidden_states)[0]
    head.requires_grad_(False)
    loss = chunked_cross_entropy(hidden_states, head, labels, rows_at_once=6).loss
    torch.testing.assert_close(gradients(loss, hidden_states)[0], expected, **CLOSE)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden_states, head, labels, rows_at_once=6).loss, loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_errs_no_more_than_the_plain_loss(autocast):
    exact_states, exact_head, labels = problem()
    exact = gradients(cross_entropy(exact_head(exact_states), labels), exact_states, exact_head.weight)
    dtype = torch.float32 if autocast else torch.bfloat16
    errors = []
    for is_chunked in (False, True):
        hidden_states, head, _ = problem(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            if is_chunked:
                loss = chunked_cross_entropy(hidden_states, head, labels, rows_at_once=6).loss
            else:
                loss = cross_entropy(head(hidden_states).float(), labels)
        assert loss.dtype == torch.float32
        rough = gradients(loss, hidden_states, head.weight)
        assert all(one.dtype == dtype for one in rough)
        errors.append(max(float((a.float() - b).norm() / b.norm()) for a, b in zip(rough, exact, strict=True)))
    assert 0 < errors[1] < 0.02 and errors[1] < 1.5 * errors[0]


class LargestLogits(TorchDispatchMode):
    """Notes the most rows of logits that any operation under it makes, backward included."""

    rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        made = function(*arguments, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return made


def test_the_logits_never_exist_all_at_once():
    hidden_states, head, labels = problem()
    with LargestLogits() as plain:
        cross_entropy(head(hidden_states), labels).backward()
    with LargestLogits() as chunked:
        chunked_cross_entropy(hidden_states, head, labels, rows_at_once=9).loss.backward()
    # the transposed weight (8 rows) is as wide as the logits
    assert (plain.rows, chunked.rows) == (ROWS, 9)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_with_it_is_the_model_without(tied):
    ids = random_ids()
    order = GroupOrder.scattered(torch.ones_like(ids), group_size=4, generator=torch.Generator().manual_seed(0))
    layout = order.lay_out(ids)._asdict()
    outputs, grads = [], []
    for chunked_loss in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        outputs.append(model(**layout, chunked_loss=chunked_loss, num_items_in_batch=torch.tensor(40), use_cache=False))
        outputs[-1].loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    plain, chunked = outputs
    torch.testing.assert_close(chunked.loss, plain.loss, check_dtype=False, **CLOSE)
    each = cross_entropy(plain.logits.transpose(1, 2), layout["labels"], reduction="none")
    torch.testing.assert_close(chunked.token_losses, each, check_dtype=False, **CLOSE)
    assert chunked.logits is None and plain.token_losses is None
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, **CLOSE, msg=name)


def test_what_it_does_not_take_is_refused(model):
    hidden_states, head, labels = problem()
    with pytest.raises(ValueError, match=r"labels has shape \(22,\): expected \(23,\)"):
        chunked_cross_entropy(hidden_states, head, labels[1:])
    for wrong in (nn.Sequential(head), nn.Linear(HIDDEN, VOCABULARY)):
        with pytest.raises(ValueError, match=f"lm_head is a {type(wrong).__name__}: .* without bias"):
            chunked_cross_entropy(hidden_states, wrong, labels)
    loss = chunked_cross_entropy(hidden_states, head, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    ids = random_ids()
    for arguments in ({"labels": ids}, {"group_ids": ids}):
        with pytest.raises(ValueError, match="chunked_loss=True: expected labels"):
            model(ids, chunked_loss=True, **arguments)
