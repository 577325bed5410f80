"""Measurement: what is written into stories, and how likely what stood there: a middle sentence, a single word."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from a3_hf.evaluation.tasks.datasets import rocstories
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import row_generator

from .next_token import NEXT_TOKEN_ARCHITECTURES, check_counts, check_max_length, next_token_log_probs, padded
from .trained_run import Trained

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
WORD = re.compile(r"(?<=\s)[^\W\d_]{3,}(?=\s)")  # letters alone, between white space
FEWEST_SENTENCES = 3
ROC_SENTENCES = 5


class Blank(NamedTuple):
    """A story with a blank in it, in tokens: those before (BOS first), those that stood in the blank, and those after; and
    the `text` that stood there, without the white space around it.
    """

    before: list[int]
    target: list[int]
    after: list[int]
    text: str


def measure_infilling(
    trained: Trained,
    *,
    num_documents: int = 100,
    num_generated: int = 50,
    max_length: int = 256,
    seed: int = 21,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Infilling of held-out documents: the middle sentence of each (of an even number, the first behind the middle), and
    one word of it. A story is the first whole sentences of a document, as many as fit in `max_length` tokens (with BOS, and
    the line break of the prompt below): most TinyStories have more tokens than a row of training, and leaving these out
    would leave the shortest alone.

    Story, sentence, word and tokens are the same for every architecture and run. Each part of a story (before the blank,
    in it, after it) is tokenised by itself, as it is inside a text.

    Each architecture sees both sides. Plain LLaMA reads what stands after the blank, a line break, then what stands
    before, and goes on (as in `a3_ar` with `infilling="suffix_prompt"`); the others read the story as it stands.

    Args:
        num_documents: how many stories, the first that can be used; a text of fewer than three sentences, or without a word
            to blank, is skipped.
        num_generated: in how many of these the sentence is written.
        max_length: tokens of a story.
        seed: of which word is blanked; a story's comes from it and the document's number alone.
        batch_size: stories of a batch.

    Returns:
        - `nll_middle_sentence`: nats per token of the true sentence, both sides given, left to right within the blank: exact
          for every architecture (masked diffusion takes a pass for each token of it).
        - `nll_middle_sentence_prefix_only`: of plain LLaMA and of A3's content stream, the same sentence given only what
          stands before it, token by token.
        - `rouge1`, `rougeL`: F-measures × 100, words unstemmed, of the sentence written greedily at its true number of
          tokens: left to right, and by masked diffusion one token a pass, the one it is surest of. Special tokens are
          never written.
        - `exact_match_words`: the percentage of stories where a single word, drawn among those of three letters or more
          that stand between white space, neither the first nor the last of the story, is written exactly; greedily, at its
          true number of tokens.
        - `infilling_stories`, `infilling_tokens` (of the sentences), `infilling_generated`, `infilling_skipped` (texts that
          were passed over before the last story was found).

    Raises:
        ValueError: numbers that are not whole or below 1, more stories to write in than to measure, a `max_length` above
            the model's context, too few documents that can be used, a tokenizer without BOS.
    """
    stories = (split_sentences(document) for document in trained.documents)
    return _measure(
        trained,
        stories,
        fewest_sentences=FEWEST_SENTENCES,
        source=f"{len(trained.documents)} held-out documents",
        num_documents=num_documents,
        num_generated=num_generated,
        max_length=max_length,
        seed=seed,
        batch_size=batch_size,
    )


def measure_infilling_rocstories(
    trained: Trained,
    *,
    data_dir: str,
    num_documents: int = 100,
    num_generated: int = 50,
    max_length: int = 256,
    seed: int = 21,
    batch_size: int = 16,
) -> dict[str, Any]:
    """What `measure_infilling` measures, on ROCStories: of five sentences the third is blanked (paper §1). A story that
    does not fit in `max_length` tokens whole is skipped.

    Args:
        data_dir: the folder that holds `rocstories/cloze_test_val__spring2016.csv`, as in `a3_hf.evaluation.tasks.datasets`.
        num_documents, num_generated, max_length, seed, batch_size: as in `measure_infilling`.

    Returns:
        As `measure_infilling`, each name with `_roc` behind it.

    Raises:
        ValueError: as `measure_infilling`; a file that is absent or can't be read.
    """
    told = rocstories(data_dir=data_dir)["validation"]["sentences"]
    stories = ([start, *(f" {sentence}" for sentence in others)] for start, *others in told)
    result = _measure(
        trained,
        stories,
        fewest_sentences=ROC_SENTENCES,
        source=f"{len(told)} stories of ROCStories",
        num_documents=num_documents,
        num_generated=num_generated,
        max_length=max_length,
        seed=seed,
        batch_size=batch_size,
    )
    return {f"{name}_roc": value for name, value in result.items()}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space before it; joined, they are the text without that around it. One
    ends with a full stop, an exclamation or question mark, or several, and the quotes and brackets closed behind.

    Example:
        >>> split_sentences('"Hi, Tim!" said Mr. Toad. He left')
        ['"Hi, Tim!"', ' said Mr.', ' Toad.', ' He left']
    """
    text = text.strip()
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    starts = [0, *ends]
    return [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True) if start < end]


def _measure(
    trained: Trained,
    stories: Iterable[list[str]],
    *,
    fewest_sentences: int,
    source: str,
    num_documents: int,
    num_generated: int,
    max_length: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    from rouge_score.rouge_scorer import RougeScorer  # of the extra `eval`

    check_counts(num_documents=num_documents, num_generated=num_generated, batch_size=batch_size)
    check_max_length(max_length, trained)
    if num_generated > num_documents:
        raise ValueError(f"num_generated={num_generated}; it takes at most num_documents={num_documents}")

    # 1. The blanks: a sentence and a word of each story.
    tokenizer, sentences, words, skipped = trained.tokenizer, [], [], 0
    line = encode_piece(tokenizer, "\n", is_start=False)
    for number, story in enumerate(stories):
        pair = _blanks_of(tokenizer, story, max_length - len(line), row_generator(seed, number), fewest_sentences)
        if pair is None:
            skipped += 1
            continue
        sentences.append(pair[0])
        words.append(pair[1])
        if len(sentences) == num_documents:
            break
    if len(sentences) < num_documents:
        raise ValueError(
            f"num_documents={num_documents}: of {source} {len(sentences)} have {fewest_sentences} sentences within "
            f"max_length={max_length} tokens and a word to blank; ask for fewer, or give more"
        )

    # 2. How likely the sentences are.
    tokens = sum(len(blank.target) for blank in sentences)
    nats = _both_sides_nats(trained, sentences, line, batch_size=batch_size)
    result: dict[str, Any] = {"nll_middle_sentence": nats / tokens}
    if trained.architecture in NEXT_TOKEN_ARCHITECTURES:
        nats = _next_token_nats(trained, [blank.before for blank in sentences], sentences, batch_size=batch_size)
        result["nll_middle_sentence_prefix_only"] = nats / tokens

    # 3. What is written into the blanks.
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    chosen = sentences[:num_generated]
    written = _write(trained, chosen, line, batch_size=batch_size, title="sentences")
    scores = [scorer.score(blank.text, text) for blank, text in zip(chosen, written, strict=True)]
    for name in ("rouge1", "rougeL"):
        result[name] = 100 * sum(score[name].fmeasure for score in scores) / num_generated
    written = _write(trained, words, line, batch_size=batch_size, title="words")
    matches = [blank.text == text for blank, text in zip(words, written, strict=True)]
    return result | {
        "exact_match_words": 100 * sum(matches) / num_documents,
        "infilling_stories": num_documents,
        "infilling_tokens": tokens,
        "infilling_generated": num_generated,
        "infilling_skipped": skipped,
    }


def _blanks_of(
    tokenizer: PreTrainedTokenizerBase,
    story: list[str],
    length: int,
    generator: torch.Generator,
    fewest_sentences: int,
) -> tuple[Blank, Blank] | None:
    """The story without its middle sentence and without a word, each of at most `length` tokens; None where it can't be
    used.
    """
    encoded, used = [], len(encode_prompt(tokenizer, ""))
    for sentence in story:
        ids = encode_piece(tokenizer, sentence, is_start=not encoded)
        used += len(ids)
        if used > length:
            break
        encoded.append(ids)
    if len(encoded) < fewest_sentences:
        return None
    middle, text = len(encoded) // 2, "".join(story[: len(encoded)])
    start = len("".join(story[:middle]))
    blanks = [_blank(tokenizer, text, start, start + len(story[middle]))]
    places = [match.span() for match in WORD.finditer(text)]
    if not places:
        return None
    start, end = places[int(torch.randint(len(places), (), generator=generator))]
    blanks.append(_blank(tokenizer, text, len(text[:start].rstrip(" ")), end))
    if any(len(blank.before) + len(blank.target) + len(blank.after) > length for blank in blanks):
        return None
    return blanks[0], blanks[1]


def _blank(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> Blank:
    return Blank(
        encode_prompt(tokenizer, text[:start]),
        encode_piece(tokenizer, text[start:end], is_start=False),
        encode_piece(tokenizer, text[end:], is_start=False),
        text[start:end].strip(),
    )


def _suffix_prompt(blank: Blank, line: list[int]) -> list[int]:
    """What stands after the blank, a line break, what stands before it."""
    return [*blank.before[:1], *blank.after, *line, *blank.before[1:]]


def _target_mask(blanks: Sequence[Blank], starts: Sequence[int], width: int) -> torch.Tensor:
    """(B, S), True at the tokens of the blanks, which begin at the columns `starts`."""
    first = torch.tensor(starts)[:, None]
    last = first + torch.tensor([len(blank.target) for blank in blanks])[:, None]
    columns = torch.arange(width)
    return (columns >= first) & (columns < last)


def _both_sides_nats(trained: Trained, blanks: Sequence[Blank], line: list[int], *, batch_size: int) -> float:
    """−log p of all targets given both sides, nats."""
    if trained.architecture == "llama":
        prompts = [_suffix_prompt(blank, line) for blank in blanks]
        return _next_token_nats(trained, prompts, blanks, batch_size=batch_size)
    model, nats = trained.model, 0.0
    for start in tqdm(range(0, len(blanks), batch_size), desc="middle sentences", leave=False):
        part = blanks[start : start + batch_size]
        ids, mask = padded([[*blank.before, *blank.target, *blank.after] for blank in part])
        is_blank = _target_mask(part, [len(blank.before) for blank in part], ids.shape[1])
        group_ids = GroupOrder.infilling(is_blank, attention_mask=mask).group_ids
        inputs = (tensor.to(model.device) for tensor in (ids, group_ids, mask))
        log_probs = model.log_likelihood(*inputs, scored_mask=is_blank.to(model.device))
        nats -= log_probs.double().sum().item()
    return nats


def _next_token_nats(
    trained: Trained, prompts: Sequence[list[int]], blanks: Sequence[Blank], *, batch_size: int
) -> float:
    """−log p of all targets, each behind its prompt, next token by next token, nats."""
    nats = 0.0
    for start in tqdm(range(0, len(blanks), batch_size), desc="middle sentences, next token", leave=False):
        part, given = blanks[start : start + batch_size], prompts[start : start + batch_size]
        ids, mask = padded([[*prompt, *blank.target] for prompt, blank in zip(given, part, strict=True)])
        log_probs = next_token_log_probs(trained, ids, mask)
        nats -= log_probs[_target_mask(part, list(map(len, given)), ids.shape[1])].double().sum().item()
    return nats


def _write(trained: Trained, blanks: Sequence[Blank], line: list[int], *, batch_size: int, title: str) -> list[str]:
    """What is written greedily into each blank, as many tokens as stood there, without the white space around it."""
    by_length = sorted(range(len(blanks)), key=lambda index: len(blanks[index].target))  # a batch waits for its longest
    texts = [""] * len(blanks)
    for start in tqdm(range(0, len(blanks), batch_size), desc=f"writing {title}", leave=False):
        places = by_length[start : start + batch_size]
        part = [blanks[index] for index in places]
        written = _continue(trained, part, line) if trained.architecture == "llama" else _fill(trained, part)
        for index, blank, tokens in zip(places, part, written, strict=True):
            texts[index] = decode_after(trained.tokenizer, blank.before, tokens).strip()
    return texts


def _fill(trained: Trained, blanks: Sequence[Blank]) -> list[list[int]]:
    """Tokens of each blank, by a model that writes between what is given."""
    model = trained.model
    ids, mask = padded([[*blank.before, *([0] * len(blank.target)), *blank.after] for blank in blanks])
    is_blank = _target_mask(blanks, [len(blank.before) for blank in blanks], ids.shape[1])
    if trained.architecture == "masked_diffusion":
        strategy = {"strategy": "dynamic", "criterion": "confidence", "tokens_per_step": 1}
    else:
        strategy = {"strategy": "groupwise", "order": "left_to_right", "group_size": 1}
    sequences = model.generate_any_order(
        ids.to(model.device),
        is_blank.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        suppress_tokens=sorted(trained.tokenizer.all_special_ids),
        **strategy,
    ).sequences.cpu()
    return [row[blank].tolist() for row, blank in zip(sequences, is_blank, strict=True)]


@torch.no_grad()
def _continue(trained: Trained, blanks: Sequence[Blank], line: list[int]) -> list[list[int]]:
    """Tokens of each blank, by a plain LLaMA behind a prompt that holds both sides."""
    model = trained.model
    ids, mask = padded([_suffix_prompt(blank, line) for blank in blanks], side="left")
    longest = max(len(blank.target) for blank in blanks)
    sequences = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=longest,
        min_new_tokens=longest,
        suppress_tokens=sorted(trained.tokenizer.all_special_ids),
        pad_token_id=0,
    )[:, ids.shape[1] :].tolist()
    return [row[: len(blank.target)] for row, blank in zip(sequences, blanks, strict=True)]
