"""Corruption for masked diffusion: random choice of the tokens to mask, and checks of the mask token."""

import torch
from transformers import PreTrainedTokenizerBase


def mask_by_rate(is_open: torch.Tensor, rate: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks each open token independently with probability t (paper §3, DiffuLLaMA and Dream).

    Args:
        is_open: (B, S) bool, the tokens that may be masked.
        rate: (B, 1) t, in (0, 1].
        noise: (B, S) uniform numbers in [0, 1); a row's n-th open token uses its n-th number, regardless of padding.

    Returns:
        (B, S) bool, the masked tokens, and (B, 1) the weight 1/t of each masked token's loss; the expected weighted sum is an
        upper bound on the row's negative log-likelihood in nats.
    """
    return is_open & (_of_open(is_open, noise) < rate), 1.0 / rate


def mask_by_count(is_open: torch.Tensor, count: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks exactly l of the L open tokens, uniformly (LLaDA's estimator). With l uniform in 1..L, the expected loss is that
    of `mask_by_rate` with uniform t, since ∫ t^(l−1) (1−t)^(L−l) dt = 1 / (l · C(L, l)); its variance is lower.

    Args:
        is_open, noise: as in `mask_by_rate`.
        count: (B, 1) l, from 1 to L.

    Returns:
        (B, S) bool, the masked tokens, and (B, 1) the weight L/l of their losses.
    """
    noise = _of_open(is_open, noise).masked_fill(~is_open, torch.inf)
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return is_open & (rank < count), is_open.sum(dim=1, keepdim=True) / count


def spread_counts(num_open: torch.Tensor, offset: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Returns (B, n) numbers of tokens to mask: each is uniform in 1..L, and those of a row are evenly spread.

    Args:
        num_open: (B,) L; 0 counts as 1.
        offset: (B,) uniform numbers in [0, 1), one for all samples of a row.

    Example:
        >>> spread_counts(torch.tensor([8]), torch.tensor([0.1]), 4)
        tensor([[1, 3, 5, 7]])
    """
    place = torch.arange(num_samples, device=offset.device, dtype=torch.float64) / num_samples
    num_open = num_open.clamp_min(1)[:, None]
    return (((offset.double()[:, None] + place) % 1.0) * num_open).long().clamp_max(num_open - 1) + 1


def _of_open(is_open: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return noise.gather(1, (is_open.long().cumsum(dim=1) - 1).clamp_min(0))


def check_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None, *, vocab_size: int) -> None:
    """Raises a ValueError unless `mask_token_id` is one of the model's `vocab_size` ids, special or unknown to the tokenizer,
    and neither BOS nor EOS.
    """
    takes = (
        "expected an id that the tokenizer marks as special, or one outside its vocabulary. set_mask_token finds one."
    )
    if mask_token_id is None:
        raise ValueError(f"mask_token_id is not set: {takes}")
    is_id = isinstance(mask_token_id, int) and not isinstance(mask_token_id, bool)
    if not is_id or not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id={mask_token_id!r} is not one of the model's {vocab_size} ids: {takes}")
    for name in ("bos", "eos"):
        if mask_token_id == {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}[name]:
            raise ValueError(
                f"mask_token_id={mask_token_id} is the tokenizer's {name} token, part of every text: {takes}"
            )
    added = tokenizer.added_tokens_decoder.get(mask_token_id)
    is_special = mask_token_id in tokenizer.all_special_ids or (added is not None and added.special)
    token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if token is not None and not is_special:
        raise ValueError(f"mask_token_id={mask_token_id} is a text token of the tokenizer, {token!r}: {takes}")


def required_mask_token(config) -> int:
    """Returns the config's `mask_token_id`.

    Raises:
        ValueError: it is not set.
    """
    if config.mask_token_id is None:
        raise ValueError(
            "the model has no mask token (config.mask_token_id is None). Call model.set_mask_token(tokenizer), which chooses "
            "or adds one."
        )
    return config.mask_token_id


def check_text(input_ids: torch.Tensor, is_text: torch.Tensor, mask_token_id: int) -> None:
    """Raises a ValueError if the text, True in `is_text` (B, S), holds the mask token."""
    wrong = (input_ids == mask_token_id) & is_text
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids holds the mask token, {mask_token_id}, as text at row {row}, column {column}: expected any other "
            "token. Mark blanks by blank_mask."
        )
