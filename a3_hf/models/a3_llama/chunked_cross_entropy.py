"""Cross entropy of labels that are not shifted: from logits, or from hidden states with logits made in chunks of rows."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
# Number of fp32 logits held at once; smaller chunks are slower, above all on a GPU.
LOGITS_AT_ONCE = {"cpu": 2**24}
LOGITS_AT_ONCE_ELSEWHERE = 2**27


class ChunkedLoss(NamedTuple):
    """`loss` () with gradient; `token_losses` (…) of each row, in nats, fp32, without gradient, 0 where ignored."""

    loss: torch.Tensor
    token_losses: torch.Tensor


class HeadOutput(NamedTuple):
    """Logits (…, V) or, with a chunked loss, `token_losses` (…); and the loss (), if there are labels."""

    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


def apply_head(
    model,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    keywords: dict[str, Any],
    *,
    is_shifted: bool,
    chunked: bool,
) -> HeadOutput:
    """Applies `model.lm_head` and the loss to hidden states (…, D) and labels (…; None: no loss).

    Args:
        keywords: further keyword arguments of the forward; `num_items_in_batch` divides the loss.
        is_shifted: True: transformers' loss shifts the labels; False: each label belongs to the state at its index.
        chunked: use `chunked_cross_entropy`, without logits; needs labels, not shifted.
    """
    num_items = keywords.get("num_items_in_batch")
    if chunked:
        loss, token_losses = chunked_cross_entropy(hidden_states, model.lm_head, labels, num_items=num_items)
        return HeadOutput(loss=loss, token_losses=token_losses)
    logits = model.lm_head(hidden_states)
    if labels is None:
        return HeadOutput(logits)
    if is_shifted:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **keywords)
        return HeadOutput(logits, loss)
    return HeadOutput(logits, slot_cross_entropy(logits, labels, num_items=num_items))


def slot_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Returns the mean cross entropy (), fp32 or fp64, of logits (…, V) and labels (…), not shifted; −100 is ignored.

    Args:
        num_items: divisor of the sum over labels; None: the number of labels that are not −100.
    """
    reduction = "mean" if num_items is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2),
        labels.flatten().to(logits.device),
        ignore_index=IGNORED_LABEL,
        reduction=reduction,
    )
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | int | None = None,
    rows_at_once: int | None = None,
) -> ChunkedLoss:
    """Returns the mean cross entropy of `head(hidden_states)` without holding all logits (…, V) at once (not specified in
    the paper). Gradients are computed in the forward pass, chunk by chunk, so no matrix product is repeated; one gradient
    (…, D) and one (V, D) are kept for the backward pass.

    Products are in the autocast dtype, or else the weight's; softmax and sums are in fp32.

    Args:
        hidden_states: (…, D).
        head: an `nn.Linear` (D → V) without bias; its weight may be tied.
        labels: (…) integers below V; −100 is ignored.
        num_items: divisor of the sum over labels; None: the number of labels that are not −100.
        rows_at_once: rows of logits held at once; None: chosen by device.

    Raises:
        ValueError: shapes that don't match, or a head that is not a plain `nn.Linear` (e.g. one with an adapter).
    """
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"lm_head is a {type(head).__name__}: the chunked loss expects an nn.Linear without bias. Use the plain loss, or "
            "leave lm_head out of the adapter's targets."
        )
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: expected {tuple(hidden_states.shape[:-1])}")
    weight, labels_in_line = head.weight, labels.reshape(-1).to(hidden_states.device)
    if rows_at_once is None:
        at_once = LOGITS_AT_ONCE.get(hidden_states.device.type, LOGITS_AT_ONCE_ELSEWHERE)
        rows_at_once = max(at_once // weight.shape[0], 1)
    if num_items is None:
        num_items = (labels_in_line != IGNORED_LABEL).sum()
    divisor = torch.as_tensor(num_items, device=hidden_states.device, dtype=torch.float32)
    loss, token_losses = _ChunkedCrossEntropy.apply(
        hidden_states.reshape(-1, hidden_states.shape[-1]), weight, labels_in_line, divisor, rows_at_once
    )
    return ChunkedLoss(loss, token_losses.view(labels.shape))


class _ChunkedCrossEntropy(torch.autograd.Function):
    # d loss / d logits = (softmax(logits) − one-hot(label)) / divisor, row by row, 0 where the label is ignored.
    @staticmethod
    def forward(ctx, hidden_states, weight, labels, divisor, rows_at_once):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.hidden_dtype, ctx.weight_dtype = hidden_states.dtype, weight.dtype
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden_states) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        token_losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden_states.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, labels.shape[0], rows_at_once):
                rows = slice(start, start + rows_at_once)
                scored = labels[rows] != IGNORED_LABEL
                target = labels[rows].masked_fill(~scored, 0)[:, None]
                logits = (hidden_states[rows] @ weight.t()).float()
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                token_losses[rows] = ((normaliser - logits.gather(1, target)).squeeze(1)).masked_fill(~scored, 0.0)
                if not (wants_hidden or wants_weight):
                    continue
                scale = (scored / divisor)[:, None]
                gradient = logits.sub_(normaliser).exp_().mul_(scale)
                gradient = gradient.scatter_add_(1, target, -scale).to(dtype)
                if wants_hidden:
                    hidden_gradient[rows] = gradient @ weight
                if wants_weight:
                    _add_product(weight_gradient, gradient.t(), hidden_states[rows])
        ctx.gradients = [hidden_gradient, weight_gradient]
        ctx.mark_non_differentiable(token_losses)
        return token_losses.sum() / divisor, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, _):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass. Compute the loss again.")
        hidden_gradient, weight_gradient = ctx.gradients
        ctx.gradients = None
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.mul_(loss_gradient).to(ctx.hidden_dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(loss_gradient).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds `left` · `right`, computed in their dtype, to `total` (fp32)."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
