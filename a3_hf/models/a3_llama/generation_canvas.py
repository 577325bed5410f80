"""The canvas: token, position and bookkeeping tensors of the text being filled."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.nn.functional import pad

from .generation_config import A3GenerationConfig
from .input_validation import checked_rows
from .likelihood import likeliest_tokens, token_log_probs

SHARED = ("eos_token_ids", "failed_step", "excluded_step")  # fields that all rows have in common


@dataclass
class Canvas:
    """State of the text being filled, (B, S + 1) unless noted. Column S is the padding column: a dummy write target for
    padding in ragged batches, so that per-step tensors are rectangular.
    """

    sequences: torch.Tensor
    position_ids: torch.Tensor
    commit_step: torch.Tensor
    log_probs: torch.Tensor
    by_position: torch.Tensor  # (B, S) the column of each position; the padding column after the row's last position
    given_mask: torch.Tensor  # (B, S)
    blank_mask: torch.Tensor  # (B, S)
    new_from: torch.Tensor  # (B, 1) the first column of each row's continuation; S without a continuation
    eos_token_ids: torch.Tensor  # (n,) tokens that end the continuation; empty without a continuation
    end: torch.Tensor  # (B,) the last column of each row's continuation; S − 1 until an EOS is written
    logits: torch.Tensor | None = None  # (B, S + 1, V), with `output_logits`
    top_log_probs: torch.Tensor | None = None  # (B, S + 1, n), with `num_top_log_probs`
    top_token_ids: torch.Tensor | None = None  # (B, S + 1, n), with `num_top_log_probs`
    failed_step: torch.Tensor | None = None  # () the first step with NaN logits; −1: none
    excluded_step: torch.Tensor | None = None  # () the first step that wrote a token of probability 0; −1: none

    @classmethod
    def prepare(cls, model, input_ids, blank_mask, attention_mask, config: A3GenerationConfig) -> "Canvas":
        """Creates a canvas from rows (B, S): each repeated `num_return_sequences` times, with its continuation appended."""
        input_ids, real, blank = checked_rows(model.config, input_ids, blank_mask, attention_mask, config)
        given_columns = input_ids.shape[1]
        if config.max_new_tokens is not None:
            new = (0, config.max_new_tokens)
            input_ids = pad(input_ids, new)
            real, blank = (pad(mask, new, value=True) for mask in (real, blank))
        if config.num_return_sequences is not None:
            copies = config.num_return_sequences
            input_ids, real, blank = (each.repeat_interleave(copies, dim=0) for each in (input_ids, real, blank))
        sequences = pad(input_ids.masked_fill(blank, 0), (0, 1))
        device, width = sequences.device, sequences.shape[1]
        dtype = torch.promote_types(model.dtype, torch.float32)
        ends = config.eos_token_ids() if config.max_new_tokens is not None else ()
        num_top = config.num_top_log_probs or 0
        return cls(
            sequences=sequences,
            position_ids=pad((real.long().cumsum(dim=1) - 1).clamp_min(0), (0, 1)),
            commit_step=torch.full_like(sequences, -1),
            log_probs=torch.zeros(sequences.shape, dtype=dtype, device=device),
            by_position=pack(torch.arange(width - 1, device=device).expand_as(real), real, width - 1),
            given_mask=real & ~blank,
            blank_mask=blank,
            new_from=torch.full_like(sequences[:, :1], given_columns),
            eos_token_ids=torch.tensor(ends, dtype=torch.long, device=device),
            end=torch.full_like(sequences[:, 0], width - 2),
            logits=torch.zeros(*sequences.shape, model.config.vocab_size, dtype=dtype, device=device)
            if config.output_logits
            else None,
            top_log_probs=torch.zeros(*sequences.shape, num_top, dtype=dtype, device=device) if num_top else None,
            top_token_ids=torch.zeros(*sequences.shape, num_top, dtype=torch.long, device=device) if num_top else None,
            failed_step=torch.tensor(-1, device=device),
            excluded_step=torch.tensor(-1, device=device),
        )

    @property
    def pad_column(self) -> int:
        return self.given_mask.shape[1]

    def has_blanks_inside(self) -> bool:
        """True if there are blanks before the continuation."""
        columns = torch.arange(self.pad_column, device=self.blank_mask.device)
        return bool((self.blank_mask & (columns < self.new_from)).any())

    def has_text_after_blanks(self) -> bool:
        """True if a row has a given token after a blank."""
        after = self.blank_mask.cumsum(dim=1) > 0
        return bool((after & self.given_mask).any())

    def is_ragged(self) -> bool:
        """True if rows have padding or different numbers of blanks, so that steps need padding."""
        if not (self.given_mask | self.blank_mask).all():
            return True
        return int(self.blank_mask.sum(dim=1).min()) != int(self.blank_mask.sum(dim=1).max())

    def known(self) -> torch.Tensor:
        """(B, S), True where a token is given or written."""
        return self.given_mask | (self.commit_step[:, :-1] >= 0)

    def columns_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns (B, …) the columns of `positions` (B, …); the padding column for positions outside the row's text."""
        inside = (positions >= 0) & (positions < self.pad_column)
        places = positions.clamp(0, self.pad_column - 1).flatten(1)
        return self.by_position.gather(1, places).view_as(positions).masked_fill(~inside, self.pad_column)

    def is_over(self, columns: torch.Tensor) -> torch.Tensor:
        """Returns (B, n), True where `columns` are after the end of the row's continuation."""
        return columns > self.end[:, None]

    def commit(
        self,
        index: torch.Tensor,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        scores: torch.Tensor,
        step: int | torch.Tensor,
    ) -> None:
        """Writes `tokens` (B, n) at columns `index` (B, n). Tokens after an EOS among them are dropped: no token has seen
        them yet.

        Args:
            logits: (B, n, V) the model's logits.
            scores: (B, n, V) processed logits, from which the tokens were chosen.
            step: the number of the step; or (B, 1), of each row.
        """
        if self.eos_token_ids.numel():
            is_end = torch.isin(tokens, self.eos_token_ids) & (index >= self.new_from) & (index != self.pad_column)
            self.end = torch.minimum(self.end, index.masked_fill(~is_end, self.pad_column).amin(dim=1))
            index = index.masked_fill(self.is_over(index), self.pad_column)
        log_probs = token_log_probs(logits, tokens)
        if self.top_log_probs is not None:
            number = self.top_log_probs.shape[2]
            where = index[..., None].expand(-1, -1, number)
            for kept, values in zip(
                (self.top_log_probs, self.top_token_ids), likeliest_tokens(logits, number), strict=True
            ):
                kept.scatter_(1, where, values)
        self.sequences.scatter_(1, index, tokens)
        self.log_probs.scatter_(1, index, log_probs)
        steps = step.expand_as(index) if isinstance(step, torch.Tensor) else torch.full_like(index, step)
        self.commit_step.scatter_(1, index, steps)
        if self.logits is not None:
            where = index[..., None].expand(-1, -1, logits.shape[-1])
            self.logits.scatter_(1, where, logits.to(self.logits.dtype))
        has_chance = scores.gather(-1, tokens[..., None]).squeeze(-1) > -torch.inf
        for name, wrong in (("failed_step", log_probs.isnan()), ("excluded_step", ~has_chance)):
            first = getattr(self, name)
            here = wrong & (index != self.pad_column)
            setattr(self, name, torch.where(here.any() & (first < 0), steps.masked_fill(~here, 0).amax(), first))

    def rows(self, index: torch.Tensor) -> "Canvas":
        """Returns the canvas of the rows `index` (n,)."""
        names = [field.name for field in fields(self) if field.name not in SHARED]
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if value is None else value[index] for name, value in found.items()})

    @classmethod
    def joined(cls, canvases: Sequence["Canvas"]) -> "Canvas":
        """Returns one canvas with the rows of several, which have the same ends; shorter ones are padded on the right."""
        width = max(canvas.pad_column for canvas in canvases)
        wide = [canvas._widened(width) for canvas in canvases]
        names = [field.name for field in fields(cls) if field.name not in SHARED]
        parts = {name: [getattr(canvas, name) for canvas in wide] for name in names}
        firsts = ("failed_step", "excluded_step")
        return replace(
            wide[0],
            **{name: None if each[0] is None else torch.cat(each) for name, each in parts.items()},
            **{name: torch.stack([getattr(canvas, name) for canvas in wide]).amax() for name in firsts},
        )

    def _widened(self, width: int) -> "Canvas":
        old = self.pad_column
        if width == old:
            return self

        def longer(tensor: torch.Tensor | None, columns: int, value: float = 0) -> torch.Tensor | None:
            if tensor is None:
                return None
            more = (0, columns - old)
            return pad(tensor[:, :old], more if tensor.dim() == 2 else (0, 0, *more), value=value)

        with_padding = {"sequences": 0, "position_ids": 0, "commit_step": -1, "log_probs": 0}
        with_padding |= {"logits": 0, "top_log_probs": 0, "top_token_ids": 0}
        by_position = self.by_position.masked_fill(self.by_position == old, width)
        return replace(
            self,
            **{name: longer(getattr(self, name), width + 1, value) for name, value in with_padding.items()},
            given_mask=longer(self.given_mask, width),
            blank_mask=longer(self.blank_mask, width),
            by_position=longer(by_position, width, width),
            new_from=self.new_from.masked_fill(self.new_from == old, width),
            end=self.end.masked_fill(self.end == old - 1, width - 1),
        )

    def close(self, pad_token_id: int) -> None:
        """Writes `pad_token_id` into blanks that were not filled."""
        self._clear(pad(self.blank_mask, (0, 1)) & (self.commit_step < 0), pad_token_id)

    def rollback(self, step: int) -> None:
        """Reopens the blanks that were written at `step` or later."""
        blank = pad(self.blank_mask, (0, 1))
        self._clear(blank & ((self.commit_step >= step) | (self.commit_step < 0)), 0)

    def _clear(self, where: torch.Tensor, token_id: int) -> None:
        self.sequences.masked_fill_(where, token_id)
        self.commit_step.masked_fill_(where, -1)
        self.log_probs.masked_fill_(where, 0.0)
        if self.logits is not None:
            self.logits.masked_fill_(where[..., None], 0.0)


def columns_of(mask: torch.Tensor, pad_column: int) -> torch.Tensor:
    """Returns (B, n) the columns where `mask` (B, S) is True, in text order, padded with the padding column."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return pack(columns, mask, pad_column)[:, : int(mask.sum(dim=1).max())]


def pack(columns: torch.Tensor, keep: torch.Tensor, pad_column: int) -> torch.Tensor:
    """Returns each row with its kept entries first, in order, and the padding column in the remaining places."""
    first = (~keep).long().argsort(dim=1, stable=True)
    return columns.masked_fill(~keep, pad_column).gather(1, first)
