"""Long context: whether a fact hidden in a text is found when the text ends with a question about it."""

import random
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.infilling_templates import encode_piece, encode_prompt
from a3_hf.models.a3_llama.orders import seed_of

from .batching import Track, order_inputs, pad_rows, silently, span_mask
from .checks import check_counts, check_length
from .text_windows import SCALE

ANSWERS = ("dog", "ball", "tree", "car", "bird", "cake", "boat", "hat")
FACT = " The secret word is {answer}."
QUESTION = " What is the secret word? The secret word is"
# The default haystack, repeated.
FILLER = (
    " A small wind moved the leaves. The road went up the hill and down again. Nobody was in the garden. A bell rang far "
    "away, and then it was still."
)
SENTENCE_ENDS = (".", "!", "?", "\n")


class Needle(NamedTuple):
    """Tokens of a text and its question, from BOS on; the tokens of each answer; and the index of the right one."""

    prompt: list[int]
    answers: list[list[int]]
    right: int


def make_needle(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Sequence[int],
    *,
    length: int,
    depth: float,
    right: int,
    answers: Sequence[str] = ANSWERS,
    seed: int = 0,
) -> Needle:
    """Hides one of the answers in a piece of a haystack and ends with a question about it, so that prompt and longest answer
    have `length` tokens together.

    Args:
        haystack: tokens, at least as many as fit around the fact.
        length: tokens of prompt and longest answer.
        depth: place of the fact. 0: right after BOS; 1: right before the question; between: after the last whole sentence
            before that fraction of the haystack, or after that fraction if there is none.
        right: index of the hidden answer.
        seed: seed of the piece of the haystack, the same at every depth.

    Raises:
        ValueError: a depth outside 0 to 1; a length without room for the haystack, or that the haystack doesn't fill; answers
            with the same tokens; a tokenizer without BOS.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depths holds {depth}: expected numbers from 0 to 1")
    encoded = _encode_answers(tokenizer, answers)
    bos = encode_prompt(tokenizer, "")
    fact = encode_piece(tokenizer, FACT.format(answer=answers[right]), is_start=False)
    question = encode_piece(tokenizer, QUESTION, is_start=False)
    room = length - len(bos) - len(fact) - len(question) - max(map(len, encoded))
    if room < 1:
        raise ValueError(
            f"lengths holds {length}: expected more than the {length - room} tokens of fact, question and answer"
        )
    if room > len(haystack):
        raise ValueError(
            f"haystack has {len(haystack)} tokens: expected at least {room} for length {length}. Give a longer text"
        )
    start = random.Random(seed).randint(0, len(haystack) - room)
    hay = list(haystack[start : start + room])
    place = int(depth * room)
    if 0 < place < room:
        ends = {token for token in set(hay[:place]) if tokenizer.decode([token]).rstrip(" ").endswith(SENTENCE_ENDS)}
        place = next((before for before in range(place, 0, -1) if hay[before - 1] in ends), place)
    return Needle([*bos, *hay[:place], *fact, *hay[place:], *question], encoded, right)


def _encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    if len(answers) < 2:
        raise ValueError(f"answers={list(answers)}: expected at least two")
    known: dict[tuple[int, ...], str] = {}
    for answer in answers:
        ids = tuple(encode_piece(tokenizer, f" {answer}", is_start=False))
        if not answer.strip() or not ids:
            raise ValueError(f"answers holds {answer!r}, which has no token")
        if ids in known:
            raise ValueError(f"answers holds {known[ids]!r} and {answer!r}, which have the same tokens")
        known[ids] = answer
    return [list(ids) for ids in known]


def needle_rows(
    model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] = (128, 256, 512),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    haystack: str | None = None,
    answers: Sequence[str] = ANSWERS,
    count: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    track: Track = silently,
) -> list[dict[str, Any]]:
    """Measures how often the right answer is the likeliest of all answers, for each length and depth (not in the paper). An
    answer's score is its exact log-likelihood given the whole text before it, left to right, per token.

    Args:
        lengths: tokens of text, question and longest answer.
        depths: places of the fact, see `make_needle`.
        haystack: a text that pieces are taken from; None: a few sentences, repeated.
        answers: the words to choose among.
        count: texts per length and depth. Each answer is right in turn, so with a multiple of their number a constant answer
            has the accuracy of chance.
        seed: seed of the pieces of the haystack, the same at every depth.

    Returns:
        A dict per length and depth: `length`, `depth`, `count`, `choices` (number of answers), `accuracy`, `exact_match` (the
        fraction of texts after which greedy decoding writes the right answer), `nats_per_token` (of the right answer),
        `passes` (forward passes, each counted once per row), `seconds`, `tokens_per_second` (of the texts).

    Raises:
        ValueError: a length above the model's context; the errors of `make_needle`.
    """
    for name, numbers in (("lengths", lengths), ("depths", depths)):
        if not numbers:
            raise ValueError(f"{name} is empty: expected at least one number")
    check_counts(count=count, batch_size=batch_size)
    for length in lengths:
        check_length("lengths", length, model.config, advice=SCALE)
    if haystack is None:
        once = encode_piece(tokenizer, FILLER, is_start=False)
        hay = once * (max(lengths) // len(once) + 2)
    else:
        (hay,) = encode_documents([haystack], tokenizer)

    def hide(length: int, depth: float) -> list[Needle]:
        place = {"length": length, "depth": depth, "answers": answers}
        seeds = [seed_of(seed, length, number) for number in range(count)]
        rights = [number % len(answers) for number in range(count)]
        return [
            make_needle(tokenizer, hay, right=right, seed=one, **place)
            for right, one in zip(rights, seeds, strict=True)
        ]

    hidden = {(length, depth): hide(length, depth) for length in lengths for depth in depths}
    rows = []
    for (length, depth), needles in track(list(hidden.items()), "needles"):
        start = perf_counter()
        scores, found = score_answers(model, needles, batch_size=batch_size)
        seconds = perf_counter() - start
        tokens = sum(len(needle.prompt) + len(ids) for needle in needles for ids in needle.answers)
        right = torch.tensor([needle.right for needle in needles])
        own = torch.arange(count), right
        row = {"length": length, "depth": depth, "count": count, "choices": len(answers)}
        row["accuracy"] = (scores.argmax(dim=1) == right).double().mean().item()
        row["exact_match"] = found[own].double().mean().item()
        row["nats_per_token"] = -scores[own].mean().item()
        row |= {"passes": count * len(answers), "seconds": seconds, "tokens_per_second": tokens / seconds}
        rows.append(row)
    return rows


def score_answers(model, needles: Sequence[Needle], *, batch_size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean log-probability per token of each answer (needles, answers), in nats; and whether it is what the model
    would write greedily.
    """
    pairs = [(needle.prompt, answer) for needle in needles for answer in needle.answers]
    means, found = [], []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ids, mask = pad_rows([prompt + answer for prompt, answer in batch])
        scored = span_mask(*([len(ids) for ids in part] for part in zip(*batch, strict=True)), ids.shape[1])
        log_probs, greedy = model.log_likelihood_and_greedy(**order_inputs(ids, mask, scored, model.device))
        means.append(log_probs.cpu().double().sum(dim=1) / scored.sum(dim=1))
        found.append((greedy.cpu() | ~scored).all(dim=1))
    shape = (len(needles), -1)
    return torch.cat(means).view(shape), torch.cat(found).view(shape)
