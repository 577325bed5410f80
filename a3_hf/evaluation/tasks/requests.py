"""Additions to lm-eval's requests and answers: blanks with text on both sides, and counts of tokens."""

from dataclasses import dataclass
from typing import Any

KEY = "blank"


class LogLikelihood(tuple):
    """lm-eval's answer to `loglikelihood`, (log-likelihood in nats, whether greedy decoding would write it), with its number
    of tokens. It is a pair, so that it works with every task and cache of lm-eval.
    """

    num_tokens: int

    def __new__(cls, log_likelihood: float, is_greedy: bool, num_tokens: int) -> "LogLikelihood":
        answer = super().__new__(cls, (log_likelihood, is_greedy))
        answer.num_tokens = num_tokens
        return answer

    def __reduce__(self):
        return LogLikelihood, (*self, self.num_tokens)


@dataclass(frozen=True)
class Blank:
    """A blank of a `generate_until` request, between its context and `suffix`. It has as many tokens as the text `length_of`
    there, or a number that the model chooses from `lengths` (least, most). A model that writes left to right stops after
    `sentences` sentences.
    """

    suffix: str = ""
    length_of: str | None = None
    lengths: tuple[int, int] | None = None
    sentences: int | None = None

    def __post_init__(self):
        if (self.length_of is None) == (self.lengths is None):
            raise ValueError(f"length_of={self.length_of!r} and lengths={self.lengths!r}: expected exactly one of them")

    def in_kwargs(self) -> dict[str, Any]:
        """Its entry in `gen_kwargs`: plain values, so that lm-eval's cache can hash them."""
        size = {"length_of": self.length_of} if self.lengths is None else {"lengths": list(self.lengths)}
        if self.sentences is not None:
            size["sentences"] = self.sentences
        return {KEY: {"suffix": self.suffix, **size}}


def take_blank(gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], Blank | None]:
    """`gen_kwargs` without the blank, and the blank, if any."""
    rest = dict(gen_kwargs)
    entry = rest.pop(KEY, None)
    if entry is None:
        return rest, None
    if "lengths" in entry:
        entry = {**entry, "lengths": tuple(entry["lengths"])}
    return rest, Blank(**entry)
