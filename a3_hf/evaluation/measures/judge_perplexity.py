"""Conditional generation by steps and criteria, and the perplexity of the texts under another model."""

import math
from collections.abc import Sequence
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt, special_token_ids
from a3_hf.models.a3_llama.orders import seed_of

from .batching import Track, next_token_scores, pad_rows, silently, span_mask
from .checks import check_counts, check_length

REFERENCE = "reference"  # `strategy` of the row of the documents' own continuations


def judge_rows(
    model,
    tokenizer: PreTrainedTokenizerBase,
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    steps: Sequence[int] = (16, 32, 64),
    criteria: Sequence[str] = ("random", "confidence", "entropy"),
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    count: int = 32,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    track: Track = silently,
) -> list[dict[str, Any]]:
    """Continues texts and measures their perplexity under another model (paper §1, Table 2).

    The prompts are the first `prompt_tokens` tokens of the first `count` documents that have at least `prompt_tokens` +
    `new_tokens`. Every continuation has `new_tokens` tokens; special tokens, EOS among them, are never written (not specified
    in the paper). Each number of steps commits new_tokens / steps tokens a step: `dynamic` by each criterion, and `groupwise`
    from left to right.

    Args:
        judge: a causal language model. An incomplete character is judged as the replacement character.
        temperature: temperature of sampling; None: the likeliest token.
        seed: seed of sampling and of the criterion "random", together with a document's number.

    Returns:
        A dict for the documents' own continuations (`strategy` "reference") and for each way of writing: `strategy`,
        `criterion`, `steps`, `tokens_per_step`, `texts`; then

        - `judge_tokens` (written, in the judge's own tokens), `judge_nats_per_token` and `judge_perplexity` (over all texts,
          given the prompts);
        - `unique_tokens`: the mean fraction of a text's tokens that are different (repetitive texts have a low perplexity);
        - `tokens` (written), `passes` (forward passes, each counted once per text), `tokens_per_forward`, `seconds`,
          `tokens_per_second`; None for the reference.

    Raises:
        ValueError: steps that don't divide `new_tokens`, an unknown criterion, numbers below 1, too few documents that are
            long enough, a text longer than the model's or the judge's context, a tokenizer without BOS.
    """
    ways = ways_to_write(steps, criteria, new_tokens=new_tokens, temperature=temperature)
    check_counts(prompt_tokens=prompt_tokens, count=count, batch_size=batch_size)
    length = 1 + prompt_tokens + new_tokens
    check_length("prompt_tokens + new_tokens + 1", length, model.config)
    references = _long_documents(tokenizer, documents, length, count)
    prompts = torch.tensor(references)[:, : 1 + prompt_tokens]
    starts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts.tolist()]
    suppressed = special_token_ids(tokenizer, model.config.vocab_size)
    fixed = {"batch_size": batch_size, "max_new_tokens": new_tokens, "seed": seed, "suppress_tokens": suppressed}

    def judged(sequences: list[list[int]]) -> dict[str, Any]:
        written = [ids[1 + prompt_tokens :] for ids in sequences]
        pairs = zip(prompts.tolist(), written, strict=True)
        ends = [decode_after(tokenizer, prompt, ids) for prompt, ids in pairs]
        nats, tokens = judged_nats(judge, judge_tokenizer, starts, ends, batch_size=batch_size)
        return {
            "texts": len(sequences),
            "judge_tokens": tokens,
            "judge_nats_per_token": nats / tokens,
            "judge_perplexity": math.exp(nats / tokens),
            "unique_tokens": sum(len(set(ids)) / len(ids) for ids in written) / len(written),
        }

    nothing = dict.fromkeys(("tokens", "passes", "tokens_per_forward", "seconds", "tokens_per_second"))
    way = {"strategy": REFERENCE, "criterion": None, "steps": None, "tokens_per_step": None}
    rows = [{**way, **judged(references), **nothing}]
    for about, settings in ways:
        start = perf_counter()
        sequences, passes = _continue(model, prompts, track=track, title=_title(about), **fixed, **settings)
        seconds = perf_counter() - start
        tokens = new_tokens * count
        speed = (tokens, passes, tokens / passes, seconds, tokens / seconds)
        rows.append({**about, **judged(sequences), **dict(zip(nothing, speed, strict=True))})
    return rows


def _long_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, count: int
) -> list[list[int]]:
    """The first `length` tokens, BOS included, of the first `count` documents that have as many."""
    bos = encode_prompt(tokenizer, "")
    encoded = (bos + encode_documents([document], tokenizer)[0] for document in documents)
    found = list(islice((ids[:length] for ids in encoded if len(ids) >= length), count))
    if len(found) < count:
        raise ValueError(
            f"count={count}: only {len(found)} of {len(documents)} documents have the {length - 1} tokens of a prompt and its "
            "continuation. Provide more documents, or ask for fewer or shorter texts"
        )
    return found


def ways_to_write(
    steps: Sequence[int], criteria: Sequence[str], *, new_tokens: int, temperature: float | None = None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Returns, for each way of writing, its columns in the table and its settings of `A3GenerationConfig`.

    Raises:
        ValueError: steps that don't divide `new_tokens`, an unknown criterion, a temperature of 0 or below.
    """
    if not steps or not criteria:
        raise ValueError(f"steps={list(steps)} and criteria={list(criteria)}: expected at least one each")
    check_counts(new_tokens=new_tokens)
    sampling = {} if temperature is None else {"do_sample": True, "temperature": temperature}
    ways = []
    for number in steps:
        if number < 1 or new_tokens % number:
            raise ValueError(
                f"steps={number}: expected a divisor of new_tokens={new_tokens}, because every step writes as many tokens"
            )
        size = new_tokens // number
        about = {"steps": number, "tokens_per_step": size}
        left_to_right = {"strategy": "groupwise", "group_size": size, **sampling}
        ways.append(({"strategy": "groupwise", "criterion": None, **about}, left_to_right))
        for criterion in criteria:
            dynamic = {"strategy": "dynamic", "criterion": criterion}
            ways.append(({**dynamic, **about}, {**dynamic, "tokens_per_step": size, **sampling}))
    for _, settings in ways:
        A3GenerationConfig(**settings)
    return ways


def _title(about: dict[str, Any]) -> str:
    by = f", {about['criterion']}" if about["criterion"] else ""
    return f"{about['strategy']}{by}, {about['steps']} steps"


def _continue(
    model, prompts: torch.Tensor, *, batch_size: int, seed: int, track: Track, title: str, **settings: Any
) -> tuple[list[list[int]], int]:
    """Prompts (B, S) with their continuations, and the passes, each counted once per text."""
    sequences, passes = [], 0
    for start in track(range(0, len(prompts), batch_size), title):
        batch = prompts[start : start + batch_size].to(model.device)
        seeds = [seed_of(seed, number) for number in range(start, start + len(batch))]
        output = model.generate_any_order(batch, seed=seeds, **settings)
        sequences += output.sequences.tolist()
        passes += output.num_forward_passes * len(batch)
    return sequences, passes


def judged_nats(
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[str],
    ends: Sequence[str],
    *,
    batch_size: int = 8,
) -> tuple[float, int]:
    """−log p of texts given their starts, under a causal model: the sum over all in nats, and its number of tokens.

    Each start and its end are encoded as one text, after BOS if the judge has one. Tokens that the start
    also has when encoded alone are given; a token that lies in both counts as written.

    Raises:
        ValueError: a text longer than the judge's context; ends without a token; a start that leaves none as given.
    """
    rows, given = [], []
    bos = [] if judge_tokenizer.bos_token_id is None else [judge_tokenizer.bos_token_id]
    context = judge.config.max_position_embeddings
    for start, end in zip(starts, ends, strict=True):
        alone = bos + judge_tokenizer.encode(start, add_special_tokens=False)
        whole = bos + judge_tokenizer.encode(start + end, add_special_tokens=False)
        same = next((i for i, pair in enumerate(zip(alone, whole, strict=False)) if pair[0] != pair[1]), len(alone))
        if len(whole) > context:
            raise ValueError(
                f"judge: a text has {len(whole)} of its tokens, more than its context (max_position_embeddings={context}). "
                "Ask for shorter texts, or another judge"
            )
        if same == 0:
            raise ValueError(f"judge: no token of the start {start!r} is given in its tokens. Use longer prompts")
        rows.append(whole)
        given.append(same)
    tokens = sum(len(row) - same for row, same in zip(rows, given, strict=True))
    if tokens == 0:
        raise ValueError("judge: expected at least one text with a token of its own after its start")
    nats = 0.0
    for first in range(0, len(rows), batch_size):
        part, starts_at = rows[first : first + batch_size], given[first : first + batch_size]
        ids, mask = pad_rows(part)
        lengths = [len(row) - same for row, same in zip(part, starts_at, strict=True)]
        log_probs, _ = next_token_scores(judge, ids, mask, span_mask(starts_at, lengths, ids.shape[1]))
        nats -= log_probs.double().sum().item()
    return nats, tokens
