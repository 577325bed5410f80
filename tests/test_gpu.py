"""What only a CUDA device can answer. Run by `make test-gpu`."""

import pytest
import torch

from a3_hf import GroupOrder
from a3_hf.devices import leave_out_cudnn_attention
from a3_hf.models.a3_llama.attention_masks import group_attention_mask, groups_of, singleton_attention_mask
from tests.conftest import tiny_model
from tests.models.a3_llama.test_modeling import generation_order, group_by_group, leaks, random_ids, text_order
from tests.models.a3_llama.test_orders import BUILDERS, generators, ragged_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def to_cuda(order: GroupOrder) -> GroupOrder:
    return GroupOrder(order.group_ids.cuda(), order.attention_mask.cuda(), order.given_mask.cuda())


def cuda_model(implementation: str, **changes):
    return tiny_model(attn_implementation=implementation, hidden_size=64, dtype=torch.float32, **changes).cuda()


def ragged_order(length: int = 200) -> GroupOrder:
    mask = ragged_mask([length, length * 2 // 3], length, "left")
    return to_cuda(GroupOrder.scattered(mask, group_size=4, generator=generators(2)))


@pytest.mark.parametrize("layout", [text_order, generation_order])
def test_flex_forward_and_backward_are_sdpas(layout):
    order, ids = ragged_order(), random_ids(2, 200).cuda()
    position_ids = (order.attention_mask.long().cumsum(1) - 1).clamp_min(0)
    gradients, logits = [], []
    for implementation in ("sdpa", "flex_attention"):
        model = cuda_model(implementation, max_position_embeddings=256)
        if layout is text_order:
            fields = {
                "position_ids": position_ids,
                "group_ids": order.group_ids,
                "attention_mask": order.attention_mask,
            }
            out = model(ids, labels=ids.masked_fill(~order.scored_mask, -100), use_cache=False, **fields)
        else:
            stored = order.lay_out(ids)
            out = model(**stored._asdict(), use_cache=False)
        out.loss.backward()
        logits.append(out.logits.detach())
        gradients.append([p.grad for p in model.parameters()])
    assert (logits[0] - logits[1])[order.scored_mask].abs().max() < 1e-3
    for sdpa, flex in zip(*gradients, strict=True):
        assert (sdpa - flex).norm() <= 1e-3 * sdpa.norm() + 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_bf16_is_close_to_fp32(implementation):
    order, ids = ragged_order(), random_ids(2, 200).cuda()
    exact = text_order(cuda_model("sdpa", max_position_embeddings=256), order, ids)
    rough = text_order(cuda_model(implementation, max_position_embeddings=256).to(torch.bfloat16), order, ids)
    exact, rough = (logits[order.scored_mask].float().log_softmax(-1) for logits in (exact, rough))
    assert (exact - rough).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("num_keys", [64, 192, 512])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_gradients_are_finite_and_close_to_fp32s(implementation, num_keys, autocast):
    """The slots of the first group see nothing, as in every step with groups: cuDNN's attention gave NaN (pytorch#196678)."""
    leave_out_cudnn_attention()
    order = GroupOrder.scattered(torch.ones(2, num_keys), group_size=4, generator=generators(2))
    order, ids = to_cuda(order), random_ids(2, num_keys).cuda()
    (mask,) = group_attention_mask("sdpa", *groups_of(order.group_ids, order.group_ids))
    assert mask.mask.shape[-1] == num_keys and not mask.mask.any(dim=-1).all()
    labels, gradients = ids.masked_fill(~order.scored_mask, -100), []
    for is_exact in (True, False):
        model = cuda_model("sdpa" if is_exact else implementation, max_position_embeddings=512, initializer_range=0.1)
        model = model if is_exact or autocast else model.to(torch.bfloat16)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast and not is_exact):
            model(ids, group_ids=order.group_ids, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: weight.grad.float() for name, weight in model.named_parameters()})
    exact, rough = gradients
    for name, gradient in exact.items():
        assert torch.isfinite(rough[name]).all(), name
        assert (rough[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_leak_through_cuda_kernels(implementation, dtype):
    model = cuda_model(implementation, num_hidden_layers=2).to(dtype)
    for builder in BUILDERS.values():
        order = to_cuda(builder(ragged_mask([13, 9], 13, "left"), generators(2)))
        for row in range(2):
            bounds = {"rounding": 1e-3 if dtype is torch.float32 else 0.1, "seen": 0.15}
            assert leaks(model, order, random_ids(2, 13).cuda(), text_order, row, **bounds) == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_rows_that_see_nothing_are_the_same_everywhere(implementation):
    ids = random_ids(2, 16).cuda()
    groups = torch.zeros_like(ids)
    with torch.no_grad():
        logits = cuda_model(implementation)(ids, group_ids=groups).logits
        other = cuda_model(implementation)((ids + 5) % 61, group_ids=groups).logits
    assert torch.isfinite(logits).all() and torch.equal(logits, other)


def test_one_pass_is_group_by_group_on_the_gpu():
    ids = random_ids(2, 14)
    order = GroupOrder.scattered(ragged_mask([14, 8], 14, "left"), group_size=3, generator=generators(2))
    slow = group_by_group(tiny_model(hidden_size=64), order, ids)
    fast = text_order(cuda_model("sdpa"), to_cuda(order), ids.cuda()).cpu()
    assert (slow - fast)[order.scored_mask].abs().max() < 1e-3


def test_singletons_through_a_causal_kernel():
    ids = random_ids(2, 64).cuda()
    order = to_cuda(GroupOrder.scattered(torch.ones(2, 64), group_size=1, generator=generators(2)))
    stored, model = order.lay_out(ids), cuda_model("sdpa")
    with torch.no_grad():
        logits = model(
            stored.input_ids[:, :-1],
            position_ids=stored.position_ids[:, :-1],
            target_position_ids=stored.position_ids[:, 1:],
            attention_mask=singleton_attention_mask("sdpa", 63, ids.device),
        ).logits
    index = order.generation_order()[:, 1:, None].expand_as(logits)
    assert (logits - text_order(model, order, ids).gather(1, index)).abs().max() < 1e-3
