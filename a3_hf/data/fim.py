"""Rows of one blank each: pieces of documents cut into prefix, middle and suffix (fill in the middle, FIM)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from .collator import IGNORED_LABEL

FORMS = ("psm", "spm", "suffix_template")
LONGEST_SENTENCE = 32  # tokens of a blank
SHORTEST = 4  # tokens of a piece that is cut; a shorter one stays a plain row


@dataclass(frozen=True)
class FimArguments:
    """Settings of rows with a blank, a recipe's `fim`: `fim: {rate: 0.5, psm: 1, spm: 1, tokens: [<repo_name>, <reponame>,
    <file_sep>]}` as code models are trained, or `fim: {rate: 1.0, suffix_template: 1, middle: [4, 24], score: middle}` for
    a model that fills blanks by its `suffix_template`.

    Args:
        rate: fraction of the pieces that get a blank; the others are plain rows.
        psm: weight of the form prefix, suffix, middle, each after its token, with EOS at the end.
        spm: weight of the form suffix, prefix, middle: both first tokens, the suffix, the middle's token, the prefix, and the
            middle with EOS (SPM of "Efficient Training of Language Models to Fill in the Middle", arXiv 2207.14255).
        suffix_template: weight of the form in which the model's `suffix_template`, with the suffix in it, stands before the
            prefix, and the middle ends the row.
        middle: least and most tokens of a blank, each number equally likely; null: two ends at random; `sentence`: a whole
            sentence with text on both sides, of at most `LONGEST_SENTENCE` tokens (where a piece has none: two ends).
        tokens: the tokens of `psm` and `spm`, for prefix, suffix and middle: tokens of the vocabulary that no text uses.
        score: `all` tokens of a row, or the `middle` of those with a blank alone; what is not scored is given.

    Raises:
        ValueError: a number out of range, no form, or tokens without a form that has them.
    """

    rate: float = 0.5
    psm: float = 0.0
    spm: float = 0.0
    suffix_template: float = 0.0
    middle: list[int] | Literal["sentence"] | None = None
    tokens: list[str] | None = None
    score: Literal["all", "middle"] = "all"

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(f"fim: rate={self.rate}: expected a number above 0, at most 1")
        for form, weight in zip(FORMS, self.weights, strict=True):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"fim: {form}={weight}: expected a number of at least 0")
        if not any(self.weights):
            raise ValueError(f"fim: no form has a weight; set one of {', '.join(FORMS)}")
        if self.middle not in (None, "sentence") and not (
            isinstance(self.middle, list)
            and len(self.middle) == 2
            and all(type(one) is int for one in self.middle)
            and 1 <= self.middle[0] <= self.middle[1]
        ):
            raise ValueError(f"fim: middle={self.middle!r}: expected [least, most] tokens, at least 1, or sentence")
        if (self.psm > 0 or self.spm > 0) != (self.tokens is not None):
            raise ValueError(f"fim: tokens={self.tokens!r}: needed by psm and spm, and by no other form")
        if self.tokens is not None and len(set(self.tokens)) != 3:
            raise ValueError(f"fim: tokens={self.tokens!r}: expected three tokens, for prefix, suffix and middle")

    @property
    def weights(self) -> tuple[float, float, float]:
        return self.psm, self.spm, self.suffix_template


class FimRows:
    """Makes rows of at most `block_size` tokens from tokenized documents.

    Raises:
        ValueError: tokens that the tokenizer lacks, `psm` or `spm` without EOS, a suffix template that is missing or too long.

    Examples:
        A piece of six tokens, cut before its third and its fifth, in the forms `psm` and `suffix_template`:

            bos <prefix> 5 6 <suffix> 9 10 <middle> 7 8 eos
            bos (words) 9 10 (words) 5 6 7 8
    """

    def __init__(
        self,
        fim: FimArguments,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        seed: int,
        suffix_template: str | None = None,
    ):
        self.fim, self.block_size, self.seed = fim, block_size, seed
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        for token in fim.tokens or ():
            if token not in vocabulary:
                raise ValueError(f"fim: tokens holds {token!r}, which the tokenizer lacks")
        self.marks = [vocabulary[token] for token in fim.tokens or ()]
        if fim.tokens is not None and self.eos is None:
            raise ValueError("fim: psm and spm end with EOS, which the tokenizer lacks; set tokenizer.eos_token")
        self.words: list[list[int]] = []
        if fim.suffix_template:
            if suffix_template is None:
                raise ValueError("fim: suffix_template has a weight: set suffix_template, the words around the suffix")
            self.words = template_words(tokenizer, suffix_template)
        if fim.middle == "sentence":
            texts = {token_id: tokenizer.convert_tokens_to_string([token]) for token, token_id in vocabulary.items()}
            self.ends = {one for one, text in texts.items() if text.rstrip("\"'”’)").endswith((".", "!", "?"))}
            # SentencePiece's mark of a space is lost where a token is decoded alone
            self.begins = {
                one for token, one in vocabulary.items() if texts[one][:1].isspace() or token.startswith("▁")
            }
            if not (self.ends and self.begins):
                raise ValueError(
                    "fim: middle=sentence: the tokenizer has no tokens that end sentences, or none with a space"
                )
        # BOS, and three marks and EOS, or the template's words
        self.room = block_size - 1 - max(4 if fim.tokens is not None else 0, sum(map(len, self.words)))
        if self.room < SHORTEST:
            raise ValueError(f"block_size={block_size}: too few tokens for fim; expected {SHORTEST - self.room} more")

    def rows(self, documents: Iterable[Sequence[int]]) -> Iterator[dict[str, list[int]]]:
        """Yields the rows of documents, token ids without boundary. A document is cut into pieces that fit, in order."""
        pieces = (
            list(document[start : start + self.room])
            for document in documents
            for start in range(0, len(document), self.room)
        )
        for number, piece in enumerate(pieces):
            yield self._row(piece, np.random.default_rng((self.seed, number)))

    def _row(self, piece: list[int], random: np.random.Generator) -> dict[str, list[int]]:
        has_blank = random.random() < self.fim.rate
        if not has_blank or len(piece) < SHORTEST:
            return _scored([self.bos], piece)
        first, last = self._cut(piece, random)
        prefix, middle, suffix = piece[:first], piece[first:last], piece[last:]
        weights = np.array(self.fim.weights)
        form = FORMS[random.choice(len(FORMS), p=weights / weights.sum())]
        given = [self.bos, *fim_prompt(form, prefix, suffix, self.words if form == "suffix_template" else self.marks)]
        if form != "suffix_template":
            middle = [*middle, self.eos]
        return _scored(given, middle) if self.fim.score == "middle" else _scored(given[:1], [*given[1:], *middle])

    def _inner_sentences(self, piece: list[int]) -> list[tuple[int, int]]:
        """The first token of each sentence of a piece and the first after it, without the piece's first and last sentence."""
        starts = [
            place for place in range(1, len(piece)) if piece[place - 1] in self.ends and piece[place] in self.begins
        ]
        return [(first, last) for first, last in pairwise(starts) if SHORTEST <= last - first <= LONGEST_SENTENCE]

    def _cut(self, piece: list[int], random: np.random.Generator) -> tuple[int, int]:
        """The first token of the middle and the first after it."""
        length = len(piece)
        if self.fim.middle == "sentence":
            sentences = self._inner_sentences(piece)
            if sentences:
                return sentences[random.integers(len(sentences))]
        if not isinstance(self.fim.middle, list):
            first, last = sorted(random.integers(0, length + 1, size=2).tolist())
            return (first, last) if first < last else (min(first, length - 1), min(first, length - 1) + 1)
        size = min(int(random.integers(self.fim.middle[0], self.fim.middle[1] + 1)), length - 1)
        first = int(random.integers(1, length - size + 1))
        return first, first + size


def template_words(tokenizer: PreTrainedTokenizerBase, suffix_template: str) -> list[list[int]]:
    """Returns the tokens on both sides of the suffix in a template."""
    return [tokenizer.encode(words, add_special_tokens=False) for words in suffix_template.split("{suffix}")]


def fim_prompt(form: str, prefix: Sequence[int], suffix: Sequence[int], words: Sequence) -> list[int]:
    """Returns what stands before the middle in a form, without BOS: prefix, suffix and `words`, which are the tokens for
    prefix, suffix and middle (`psm`, `spm`), or the tokens on both sides of the suffix (`suffix_template`).
    """
    if form == "suffix_template":
        before, after = words if suffix else ([], [])
        return [*before, *suffix, *after, *prefix]
    to_prefix, to_suffix, to_middle = words
    if form == "spm":
        return [to_prefix, to_suffix, *suffix, to_middle, *prefix]
    return [to_prefix, *prefix, to_suffix, *suffix, to_middle]


def _scored(given: list[int], scored: list[int]) -> dict[str, Any]:
    ids = [*given, *scored]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [IGNORED_LABEL] * len(given) + scored,
    }
