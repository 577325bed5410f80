"""The tokens of a text: the text that each adds, the step at which it was written, and its log-probability."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Probability 0 to 1, orange to blue, in steps of about equal size in OKLab. Lightness falls all the way, so the order is
# visible without colour and with any kind of colour blindness.
SCALE = ("#f09103", "#d38b69", "#b08695", "#8182ba", "#3d7adc")
CUT_AFTER = 64  # tokens decoded together before token_texts starts a new part
# Replacements of characters that a terminal or a page would execute or can't encode: control characters other than newline
# and tab, marks that change the direction of a text, and lone surrogates.
PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    127: "\u2421",
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}


@dataclass(frozen=True)
class Piece:
    """One token of a text.

    Attributes:
        text: the text that the token adds.
        group: lower groups are earlier.
        step: the step at which it was written, from 0; -1: given.
        log_prob: its log-probability in nats; None: not scored.

    Raises:
        ValueError: a step below -1; a log_prob that is NaN.
    """

    text: str
    group: int
    step: int
    log_prob: float | None
    token_id: int | None = None

    def __post_init__(self):
        if self.step < -1:
            raise ValueError(f"step={self.step}: expected the step from 0, or -1 for a given token")
        if self.log_prob is not None and math.isnan(self.log_prob):
            raise ValueError("log_prob is NaN: expected nats, or None for a token that is not scored")

    @property
    def confidence(self) -> float | None:
        """The probability of the token; None if it is not scored."""
        return None if self.log_prob is None else math.exp(min(self.log_prob, 0.0))


def generated_pieces(tokenizer, output) -> list[Piece]:
    """The pieces of the first row of a generation output; padding is left out."""
    real = (output.group_ids[0] >= 0).cpu()
    fields = (output.sequences, output.group_ids, output.commit_step, output.log_probs)
    ids, groups, steps, log_probs = (field[0].cpu()[real].tolist() for field in fields)
    log_probs = (log_prob if step >= 0 else None for log_prob, step in zip(log_probs, steps, strict=True))
    return _pieces(tokenizer, ids, groups, steps, log_probs)


def scored_pieces(tokenizer, scored) -> list[Piece]:
    """The pieces of a scored text (the output of `model.score`): the first token is given, the others have their mean
    log-probability.
    """
    groups = scored.group_ids[0].tolist()
    log_probs = [None, *scored.mean.tolist()[1:]]
    return _pieces(tokenizer, scored.token_ids.tolist(), groups, [-1, *groups[1:]], log_probs)


def _pieces(tokenizer, ids: list[int], groups: Iterable, steps: Iterable, log_probs: Iterable) -> list[Piece]:
    return [Piece(*row) for row in zip(token_texts(tokenizer, ids), groups, steps, log_probs, ids, strict=True)]


def token_texts(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds. Joined, they are `tokenizer.decode(token_ids, skip_special_tokens=True)`.

    A character made of several tokens belongs to the last of them; the others, and special tokens, add "".
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    token_ids = list(token_ids)
    whole = decode(token_ids)
    texts, end = [], 0
    start, base = 0, 0  # the current part: token_ids[start:], which decodes to whole[base:]
    for index in range(len(token_ids)):
        prefix = decode(token_ids[start : index + 1])
        known = base + _common_length(prefix, whole[base : base + len(prefix)])
        if index + 1 == len(token_ids):
            known = len(whole)
        texts.append(whole[end : max(end, known)])
        end = max(end, known)
        is_clean = end == known == base + len(prefix) and not prefix.endswith("\ufffd")
        if is_clean and index + 1 - start >= CUT_AFTER and decode(token_ids[index + 1 :]) == whole[end:]:
            start, base = index + 1, end
    return texts


def _common_length(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def confidence_colour(confidence: float) -> str:
    """The colour "#rrggbb" of a probability, from orange (0) to blue (1), legible on black and on white."""
    place = min(max(confidence, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in SCALE[low : low + 2]]
    return "#" + "".join(f"{round(one + (other - one) * (place - low)):02x}" for one, other in zip(*ends, strict=True))


def visible(text: str) -> str:
    """The text with each character of `PICTURES` replaced by its picture."""
    return text.translate(PICTURES)


def number_of_steps(pieces: Sequence[Piece]) -> int:
    """The number of steps in which the pieces were written.

    Raises:
        ValueError: no pieces.
    """
    if not pieces:
        raise ValueError("pieces is empty: expected at least one token")
    return max(piece.step for piece in pieces) + 1
