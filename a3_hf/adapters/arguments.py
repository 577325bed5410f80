"""Settings of a LoRA adapter and of a draft head in a recipe."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoraArguments:
    """Settings of `lora: {r: 16, …}` in a recipe, which trains low-rank adapters instead of all weights (not in the paper).

    Args:
        r: rank.
        alpha: the adapters' output is scaled by alpha / r.
        dropout: dropout of an adapter's input in training.
        target: name suffixes of the decoder's linear layers (`q_proj`, `layers.3.mlp.up_proj`), or `"all-linear"`: every
            layer that `rows` allows.
        rows: `"all"` adapts both streams; `"slots"` adapts query slots only, so the content stream equals the LLaMA bit for
            bit.

    Raises:
        ValueError: a number out of range, no target, or a duplicate target.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: list[str] | Literal["all-linear"] = "all-linear"
    rows: Literal["all", "slots"] = "all"

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"lora.r={self.r}: expected 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}: expected 0 or more, and less than 1")
        if self.rows not in ("all", "slots"):
            raise ValueError(f"lora.rows={self.rows!r}: expected 'all' or 'slots'")
        if self.target != "all-linear" and (isinstance(self.target, str) or not self.target):
            raise ValueError(f"lora.target={self.target!r}: expected a list of names, or 'all-linear'")
        if self.target != "all-linear" and len(set(self.target)) < len(self.target):
            raise ValueError(f"lora.target={self.target!r}: expected each name once")


@dataclass(frozen=True)
class DraftHeadArguments:
    """Settings of `draft_head: {rank: 32, …}` in a recipe with architecture `draft_head`; see `DraftHeadConfig`, which checks
    them.

    Args:
        num_drafts: distances that are guessed, from the token after the next one on.
        first_layer: the first layer of the base that slots pass; None: that of the last fifth.
        rank: rank of the adapters in those layers; 0: none.
        sampler_size: width of the network that gives each draft the one before; 0: none.
        num_candidates: tokens of the vocabulary that a draft may be, the most frequent ones of the text; at most all.
    """

    num_drafts: int = 3
    first_layer: int | None = None
    rank: int = 32
    sampler_size: int = 768
    num_candidates: int = 8192
