"""Texts that are being filled, pass by pass: rows may leave, and rows of other texts may join, between two passes."""

from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch.nn.functional import pad

from .generation_decoder import Decoder


class Filling:
    """The rows of one decoder, and what a strategy knows of them between two passes.

    Subclasses name in `columns` their tensors (B, …) of canvas columns.
    """

    columns: tuple[str, ...] = ()
    rewrites = False  # whether a written token may still change

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def step(self) -> bool:
        """Runs a pass, and returns whether blanks are left."""
        raise NotImplementedError

    def is_open(self) -> torch.Tensor:
        """(B,), True at rows that have blanks left."""
        raise NotImplementedError

    def run(self) -> None:
        """Fills all blanks."""
        while self.step():
            pass

    def keep_rows(self, index: torch.Tensor) -> None:
        """Lets all rows but `index` (n,) go, with their place in the cache."""
        self.decoder.keep_rows(index)
        for name in self.columns:
            setattr(self, name, _trimmed(getattr(self, name)[index], self.decoder.canvas.pad_column))

    @classmethod
    def joined(cls, fillings: "Sequence[Filling]") -> "Filling":
        """Returns one filling with the rows of several, whose settings are the same. They are used up.

        A row's tokens stay those that it would get alone.
        """
        first = fillings[0]
        olds = [filling.decoder.canvas.pad_column for filling in fillings]
        whole = copy(first)
        whole.decoder = Decoder.joined([filling.decoder for filling in fillings])
        new = whole.decoder.canvas.pad_column
        for name in cls.columns:
            parts = [getattr(filling, name) for filling in fillings]
            parts = [part.masked_fill(part == old, new) for part, old in zip(parts, olds, strict=True)]
            setattr(whole, name, torch.cat(padded_alike(parts, new)))
        return whole


class SteadyFilling(Filling):
    """Rows of a strategy that they begin and end together: they may be joined before their first pass only."""

    def __init__(self, decoder: Decoder):
        super().__init__(decoder)
        self._passes: Iterator[None] | None = None
        self._goes_on = True

    def passes(self) -> Iterator[None]:
        """Returns an iterator that runs a pass at each step."""
        raise NotImplementedError

    def step(self) -> bool:
        if self._passes is None:
            self._passes = self.passes()
        self._goes_on = next(self._passes, self) is None
        return self._goes_on

    def is_open(self) -> torch.Tensor:
        return torch.full_like(self.decoder.canvas.end, self._goes_on, dtype=torch.bool)


def padded_alike(parts: Sequence[torch.Tensor], value: float) -> list[torch.Tensor]:
    """Returns tensors (B, …) padded to the largest size of each dimension but the first."""
    sizes = [max(part.shape[number] for part in parts) for number in range(parts[0].dim())]
    missing = [[wide - size for size, wide in zip(part.shape, sizes, strict=True)] for part in parts]
    return [  # `pad` takes the last dimension first
        pad(part, [end for more in each[:0:-1] for end in (0, more)], value=value)
        for part, each in zip(parts, missing, strict=True)
    ]


def _trimmed(columns: torch.Tensor, pad_column: int) -> torch.Tensor:
    """Returns `columns` (B, n, …) up to the last that is not padding in some row."""
    is_used = (columns != pad_column).flatten(2).any(dim=2) if columns.dim() > 2 else columns != pad_column
    places = torch.arange(1, columns.shape[1] + 1, device=columns.device)
    return columns[:, : int((places * is_used.any(dim=0)).amax()) if columns.numel() else 0]
